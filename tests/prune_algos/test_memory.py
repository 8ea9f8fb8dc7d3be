import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_prompts
from torch import Tensor

from auto_circuit import logit_diff
from auto_circuit.errors import InputError
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.prune_algos.edge_attribution import METHODS, edge_attribution
from auto_circuit.prune_algos.memory import GIB, USUAL_BATCH, Need, chosen_batch_size

#: 2 GiB, and half a GiB more for each prompt: 18 GiB for 32 prompts, 2.5 for one.
NEED = Need(
    fixed=2 * GIB,
    per_prompt=GIB // 2,
    limit=100 * GIB,
    with_latents=True,
    per_position=True,
    seq_len=9,
    n_edges=1234567,
)


def with_limit(gib: float) -> Need:
    return replace(NEED, limit=int(gib * GIB))


def watched(sizes: list[int]) -> Callable[[Tensor, Any], Tensor]:
    """The logit difference, noting how many prompts ran together."""

    def objective(logits: Tensor, batch: Any) -> Tensor:
        sizes.append(len(batch))
        return logit_diff(logits, batch)

    return objective


# ---- the estimate --------------------------------------------------------------------------------


def test_more_prompts_and_longer_prompts_need_more(shared_model: Any) -> None:
    graph = CircuitGraph(shared_model("gpt2"))
    needs = [Need.of(graph, seq_len) for seq_len in (1, 2, 7, 30)]
    for need in needs:
        by_batch = [need.bytes(size) for size in range(1, 70)]
        assert by_batch == sorted(set(by_batch)) and by_batch[0] > need.fixed > 0
    by_length = [need.bytes(4) for need in needs]
    assert by_length == sorted(set(by_length))
    assert [need.seq_len for need in needs] == [1, 2, 7, 30]
    assert {need.n_edges for need in needs} == {graph.n_edges}


def test_edges_of_each_position_need_more(shared_model: Any) -> None:
    model = shared_model("gpt2")
    whole, each = (Need.of(CircuitGraph(model, per_position=n), 7) for n in (None, 7))
    assert each.n_edges == 7 * whole.n_edges and each.fixed > whole.fixed
    assert each.per_prompt == whole.per_prompt


@pytest.mark.parametrize("family", ["gpt2", "native_attn_only"])
def test_latents_need_more(shared_model: Any, family: str) -> None:
    from transformer_lens.hook_points import HookPoint

    import auto_circuit as ac

    model = shared_model(family)
    needs = [Need.of(CircuitGraph(model), 7)]
    for n in (16, 64):
        with ac.sae_model(model, {"blocks.1.hook_attn_out": ac.SparseAutoencoder(HookPoint(), n, 24)}) as m:
            needs.append(Need.of(CircuitGraph(m), 7))
    assert needs[0].n_edges < needs[1].n_edges < needs[2].n_edges
    assert needs[0].bytes(1) < needs[1].bytes(1) < needs[2].bytes(1)


def test_the_limit_is_in_gib_and_otherwise_less_than_all_that_is_free(shared_model: Any) -> None:
    graph = CircuitGraph(shared_model("gpt2"))
    assert Need.of(graph, 7, limit=1.5).limit == 3 * GIB // 2
    assert 0 < Need.of(graph, 7).limit < 2**60


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_that_is_not_positive_is_refused(shared_model: Any, limit: float) -> None:
    with pytest.raises(InputError, match=f"memory_limit is in GiB and positive; given {limit}"):
        edge_attribution(CircuitGraph(shared_model("gpt2")), make_prompts(), memory_limit=limit)


def test_tokens_wait_only_as_long_as_there_is_room() -> None:
    waiting = [with_limit(gib).tokens_at_once(4) for gib in (1, 4, 5, 8, 100, 10**6)]
    assert waiting == sorted(waiting) and waiting[0] == 1 and waiting[-1] == 4096


# ---- the batch size ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "expected"),
    [(100, USUAL_BATCH), (18, 32), (17.9, 31), (10, 16), (9.9, 15), (4, 4), (3, 2), (2.9, 1), (2.5, 1)],
)
def test_the_batch_is_as_large_as_fits(gib: float, expected: int) -> None:
    need = with_limit(gib)
    assert chosen_batch_size(need, None) == expected
    assert need.bytes(expected) <= need.limit


@pytest.mark.parametrize(("gib", "asked"), [(100, 1), (100, 196), (2.5, 1), (5.5, 7)])
def test_the_batch_asked_for_is_taken_where_it_fits(gib: float, asked: int) -> None:
    assert chosen_batch_size(with_limit(gib), asked) == asked


@pytest.mark.parametrize(
    ("gib", "asked", "numbers", "option"),
    [
        (2.4, None, r"1 prompt of 9 tokens needs about 2.5 GiB \(2 .* 0.5 .*\); 2.4", "shorter prompts"),
        (0.5, 8, r"8 prompts of 9 tokens needs about 6 GiB \(2 .* 4 .*\); 0.5", "memory_limit"),
        (5.4, 7, r"7 prompts of 9 tokens needs about 5.5 GiB \(2 .* 3.5 .*\); 5.4", "smaller than 7"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers_and_options(
    gib: float, asked: int | None, numbers: str, option: str
) -> None:
    with pytest.raises(InputError, match=f"1,234,567 edges on {numbers} GiB may be used") as error:
        chosen_batch_size(with_limit(gib), asked)
    for way_out in (option, "prune_latents(", "per_position", "memory_limit (GiB)"):
        assert way_out in str(error.value)
    assert ("batch_size smaller" in str(error.value)) == (gib > 2 and asked is not None)


@pytest.mark.parametrize("asked", [0, -3])
def test_a_batch_of_no_prompts_is_refused(asked: int) -> None:
    with pytest.raises(InputError, match=f"batch_size must be at least 1; given {asked}"):
        chosen_batch_size(NEED, asked)


# ---- attribution under a limit -------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2])
def test_attribution_that_does_not_fit_is_refused_before_anything_runs(
    shared_model: Any, batch_size: int | None
) -> None:
    graph, sizes = CircuitGraph(shared_model("gpt2")), []
    with pytest.raises(InputError, match=rf"{graph.n_edges:,} edges .* tokens needs .*GiB.*memory_limit"):
        edge_attribution(
            graph, make_prompts(), watched(sizes), batch_size=batch_size, memory_limit=1e-6, progress=False
        )
    assert sizes == []


@pytest.mark.parametrize("method", METHODS)
def test_attribution_in_the_small_batches_that_fit_gives_the_same_scores(
    shared_model: Any, method: str
) -> None:
    graph, prompts = CircuitGraph(shared_model("gpt2")), make_prompts(lengths=(6, 5))
    together: list[int] = []
    options = dict(method=method, steps=2, progress=False)
    whole = edge_attribution(graph, prompts, watched(together), **options)
    assert set(together) == {3}
    need = Need.of(graph, max(prompts.lengths))
    for fits, seen in ((2, {2, 1}), (1, {1})):
        sizes: list[int] = []
        limit = (need.bytes(fits) + need.per_prompt // 2) / GIB
        scores = edge_attribution(graph, prompts, watched(sizes), memory_limit=limit, **options)
        assert set(sizes) == seen
        torch.testing.assert_close(scores.flat(), whole.flat(), rtol=1e-4, atol=1e-7)
    assert whole.flat().abs().max() > 1e-4


@pytest.mark.parametrize("limit", [math.inf, math.nan])
def test_infinity_is_no_limit_and_nan_is_refused(shared_model: Any, limit: float) -> None:
    graph = CircuitGraph(shared_model("gpt2"))
    if math.isnan(limit):
        with pytest.raises(InputError, match="positive"):
            Need.of(graph, 7, limit=limit)
    else:
        assert chosen_batch_size(Need.of(graph, 7, limit=limit), None) == 32


def test_a_small_graph_runs_in_little_memory(shared_model: Any) -> None:
    edge_attribution(CircuitGraph(shared_model("gpt2")), make_prompts(), memory_limit=0.1, progress=False)


def test_no_more_prompts_are_counted_than_there_are() -> None:
    assert chosen_batch_size(NEED, 32, 4) == 4 and chosen_batch_size(NEED, None, 6) == 6
    assert chosen_batch_size(NEED, 3, 6) == 3
    with pytest.raises(InputError, match="on 4 prompts"):
        chosen_batch_size(with_limit(1.0), 32, 4)
