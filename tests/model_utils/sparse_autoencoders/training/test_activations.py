"""Activations of many sites from one pass, and the buffer that mixes them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCAB

from auto_circuit.errors import InputError, UnknownNameError
from auto_circuit.model_utils.hooked_model import hooked_model
from auto_circuit.model_utils.sparse_autoencoders.training.activations import (
    ModelActivations,
    ShuffleBuffer,
    is_counted,
)


class Tokens:
    """Random token batches of two lengths in turn; a source whose state is its number."""

    def __init__(self, only: int | None = None) -> None:
        self.n, self.only = 0, only

    def next_batch(self, n_tokens: int) -> torch.Tensor:
        self.n += 1
        length = 5 + self.n % 2
        make = torch.Generator().manual_seed(self.n)
        if self.only is not None:
            return torch.full((max(1, n_tokens // length), length), self.only)
        return torch.randint(0, VOCAB, (max(1, n_tokens // length), length), generator=make)

    def state(self) -> dict[str, Any]:
        return {"n": self.n}

    def restore(self, state: Any) -> None:
        self.n = state["n"]

    def description(self) -> dict[str, Any]:
        return {"random": True}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_what_hooks_see_at_counted_positions(family: str, shared_model: Callable[..., Any]) -> None:
    model = shared_model(family)
    sites = [site.name for site in hooked_model(model).sites() if site.layer == 1]
    source = ModelActivations(model, sites, Tokens(), tokens_per_pass=20, excluded=[0, 7])
    rows = source.next_rows()
    tokens = Tokens().next_batch(20)
    keep = torch.tensor([[token not in (0, 7) for token in row] for row in tokens.tolist()])
    names = {site.name: site.canonical for site in hooked_model(model).sites()}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    assert list(rows) == sorted(sites, key=sites.index) and len(rows) == len(sites)
    for name in sites:
        expected = cache[names[name]] if names[name] in cache else cache[name]
        expected = expected.flatten(2)[keep]
        assert torch.equal(rows[name], expected), name


def test_the_pass_stops_after_the_last_site(shared_model: Callable[..., Any]) -> None:
    model = shared_model("gpt2")
    ran: list[int] = []
    handles = [
        model.blocks[i].register_forward_hook(lambda *_args, layer=i: ran.append(layer)) for i in range(3)
    ]
    try:
        ModelActivations(model, ["blocks.0.hook_mlp_out"], Tokens(), 20).next_rows()
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0]


def test_special_tokens_are_left_out_by_default(shared_model: Callable[..., Any]) -> None:
    model = shared_model("gpt2")
    source = ModelActivations(model, ["blocks.0.hook_mlp_out"], Tokens(), 40)
    assert source.excluded == [0, 1, 2]  # BOS, EOS and unknown of the tests' tokenizer
    tokens = Tokens().next_batch(40)
    assert len(source.next_rows()["blocks.0.hook_mlp_out"]) == int((tokens > 2).sum())
    assert torch.equal(is_counted(tokens, [0, 1, 2]), tokens > 2)
    with pytest.raises(InputError, match="nothing but special tokens"):
        ModelActivations(model, ["blocks.0.hook_mlp_out"], Tokens(only=1), 20).next_rows()


def test_wrong_sites_are_refused(shared_model: Callable[..., Any]) -> None:
    model = shared_model("gpt2")
    with pytest.raises(UnknownNameError, match="hook_mlp_out"):
        ModelActivations(model, ["blocks.0.hook_mlp_ou"], Tokens())
    with pytest.raises(InputError, match="twice"):
        ModelActivations(model, ["blocks.0.hook_mlp_out", "blocks.0.mlp.hook_out"], Tokens())
    with pytest.raises(InputError, match="No sites"):
        ModelActivations(model, [], Tokens())


class Counting:
    """Rows that say their own number, in two sites."""

    widths = {"a": 1, "b": 2}

    def __init__(self, size: int = 7) -> None:
        self.n, self.size = 0, size

    def next_rows(self) -> dict[str, torch.Tensor]:
        rows = torch.arange(self.n, self.n + self.size, dtype=torch.float32)
        self.n += self.size
        return {"a": rows[:, None], "b": torch.stack([rows, -rows], 1)}

    def state(self) -> dict[str, Any]:
        return {"n": self.n}

    def restore(self, state: Any) -> None:
        self.n = state["n"]

    def description(self) -> dict[str, Any]:
        return {}


def _buffer(size: int = 7, capacity: int = 50) -> ShuffleBuffer:
    return ShuffleBuffer(Counting(size), capacity, torch.Generator().manual_seed(0))


def test_the_buffer_gives_every_row_once_mixed_and_aligned() -> None:
    buffer = _buffer()
    batches = [buffer.next_batch(10) for _ in range(30)]
    for batch in batches:
        assert torch.equal(batch["b"], torch.cat([batch["a"], -batch["a"]], 1))
    seen = torch.cat([batch["a"] for batch in batches]).flatten().tolist()
    assert len(set(seen)) == 300  # none twice
    first = batches[0]["a"].flatten()
    assert first.max() > 25 and (first.diff() < 0).any()  # drawn from all of the buffer, in no order
    buffer.fill()
    held = set(buffer.first(50)["a"].flatten().tolist())
    assert held | set(seen) == set(range(350))  # none lost


def test_no_more_rows_are_asked_for_than_are_drawn() -> None:
    source = Counting(10)
    buffer = ShuffleBuffer(source, 50, torch.Generator().manual_seed(0), total=200)
    seen = torch.cat([buffer.next_batch(20)["a"] for _ in range(10)]).flatten()
    assert sorted(seen.tolist()) == list(range(200)) and source.n == 200  # each once, the buffer is empty
    assert len(buffer.first(50)["a"]) == 50 and source.n == 200  # still there to look at


def test_batches_do_not_depend_on_how_many_rows_come_at_once() -> None:
    one, other = _buffer(1), _buffer(13)
    for _ in range(12):
        assert torch.equal(one.next_batch(9)["a"], other.next_batch(9)["a"])


@pytest.mark.parametrize("total", [None, 110])
def test_a_restored_buffer_goes_on_with_the_same_batches(total: int | None) -> None:
    buffer = ShuffleBuffer(Counting(), 50, torch.Generator().manual_seed(0), total)
    for _ in range(5):
        buffer.next_batch(10)
    state = buffer.state()
    state = {**state, "held": {k: v.clone() for k, v in state["held"].items()}}
    expected = [buffer.next_batch(10)["b"] for _ in range(6)]
    other = ShuffleBuffer(Counting(), 50, torch.Generator().manual_seed(99), total)
    other.restore(state)
    assert all(torch.equal(a, other.next_batch(10)["b"]) for a in expected)
