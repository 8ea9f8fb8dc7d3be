"""Without a process group everything stays what it is."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from auto_circuit.model_utils.sparse_autoencoders.training import processes
from auto_circuit.model_utils.sparse_autoencoders.training.processes import (
    any_of,
    average_gradients,
    from_first,
    gathered,
    join,
    mean_over,
    n_processes,
    process_index,
    total_over,
)

CPU = torch.device("cpu")


def test_there_is_one_process() -> None:
    assert n_processes() == 1 and process_index() == 0


@pytest.mark.parametrize("value", [torch.tensor(2.5), torch.tensor([1.0, -3.0]), torch.tensor([[1, 2]])])
def test_totals_means_and_rows_are_the_values(value: torch.Tensor) -> None:
    for function in (total_over, mean_over, gathered):
        assert torch.equal(function(value), value.to(function(value).dtype))
    assert total_over(value).dtype == value.dtype and gathered(value) is value
    assert gathered(value[:0] if value.dim() else value).shape == (value[:0] if value.dim() else value).shape


def test_totals_and_means_have_no_gradients_and_rows_keep_theirs() -> None:
    value = torch.ones(3, requires_grad=True)
    assert not total_over(value * 2).requires_grad and not mean_over(value * 2).requires_grad
    assert gathered(value * 2).requires_grad


def test_objects_and_flags_are_those_of_this_process() -> None:
    held = object()
    assert from_first(held) is held and from_first(None) is None
    assert any_of(True, CPU) is True and any_of(False, CPU) is False


def test_gradients_stay() -> None:
    with_one, without = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    (with_one * torch.tensor([1.0, 5.0])).sum().backward()
    average_gradients([with_one, without])
    assert with_one.grad is not None and with_one.grad.tolist() == [1.0, 5.0] and without.grad is None


@pytest.mark.parametrize("size", [None, "1", "0"])
def test_a_lone_process_joins_nothing(size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr(dist, "init_process_group", lambda *_args: pytest.fail("joined"))
    join(CPU)
    assert n_processes() == 1


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_torchrun_s_processes_join_until_the_end(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", calls.append)
    monkeypatch.setattr(processes.atexit, "register", calls.append)
    join(torch.device(device))
    assert calls == [backend, processes._leave]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)  # a second run, or the caller's own group
    join(torch.device(device))
    assert len(calls) == 2
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    processes._leave()
    assert calls[-1] == "left"


def test_a_group_of_one_is_none(tmp_path: object) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        value = torch.ones(2, requires_grad=True)
        assert n_processes() == 1 and process_index() == 0
        assert gathered(value) is value and processes.from_first(value) is value
    finally:
        dist.destroy_process_group()
