import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_circuit.errors import AutoCircuitError, InputError, UnknownNameError
from auto_circuit.graph.edge_ends import Destination, SourceGroup, readers
from auto_circuit.graph.edge_layout import EdgeLayout
from auto_circuit.graph.prune_scores import Circuit, PruneScores

SITE = "blocks.0.hook_mlp_out"
N_EDGES = 2 * 1 + 3 + 6 + 8


def make_layout(seq_len: int | None = None, ids: tuple[int, int] = (7, 3)) -> EdgeLayout:
    groups = (
        SourceGroup("start", "dense", 1, 0),
        SourceGroup("blocks.0.attn", "heads", 2, 1),
        SourceGroup(SITE, "latents", 3, 2, "error", torch.tensor(ids)),
        SourceGroup("blocks.1.attn", "heads", 2, 3),
    )
    rows = [
        ("blocks.0.attn.q", 2, 0),
        ("blocks.0.mlp.in", None, 1),
        ("blocks.1.attn.k", 1, 2),
        ("end", None, 4),
    ]
    destinations = [Destination(name, heads, readers(groups, s), s) for name, heads, s in rows]
    return EdgeLayout(groups, tuple(destinations), seq_len)


def scores_of(values: Tensor, seq_len: int | None = None) -> PruneScores:
    layout = make_layout(seq_len)
    return PruneScores(layout, layout.split(values))


def with_ties(seed: int = 0, seq_len: int | None = None) -> PruneScores:
    """Halves from −1 to 1, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, (make_layout(seq_len).n_edges,), generator=generator) / 2
    values[values == 0] *= torch.where(torch.arange(int((values == 0).sum())) % 2 == 0, 1.0, -1.0)
    return scores_of(values, seq_len)


def without_ties(seed: int = 0, seq_len: int | None = None) -> PruneScores:
    generator = torch.Generator().manual_seed(seed)
    return scores_of(torch.randn(make_layout(seq_len).n_edges, generator=generator), seq_len)


SCORES = {
    "ties": with_ties(),
    "no ties": without_ties(),
    "positions": with_ties(1, seq_len=3),
    "equal": scores_of(torch.ones(N_EDGES)),
    "zero": scores_of(torch.zeros(N_EDGES)),
}
some_scores = pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)


def sorted_by_hand(scores: PruneScores, signed: bool) -> list[int]:
    values = [v if signed else abs(v) for v in scores.flat().tolist()]
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


# ---- choosing ------------------------------------------------------------------------------------


@some_scores
@pytest.mark.parametrize("signed", [False, True])
def test_top_k_is_a_stable_sort(scores: PruneScores, signed: bool) -> None:
    ranking = sorted_by_hand(scores, signed)
    for k in (0, 1, 2, 5, len(scores) - 1, len(scores), len(scores) + 9):
        assert scores.top_indices(k, signed=signed).tolist() == ranking[:k]
        circuit = scores.top(k, signed=signed)
        assert circuit.indices().tolist() == sorted(ranking[:k])
        assert len(circuit) == circuit.n_edges == min(k, len(scores))
        edges = scores.edges(k, signed=signed)
        assert [edge.index for edge in edges] == ranking[:k]
        assert [edge.name for edge in edges] == [scores.layout.edge_name(i) for i in ranking[:k]]
        assert [edge.score for edge in edges] == [scores.flat()[i].item() for i in ranking[:k]]


@some_scores
def test_the_ranking_depends_on_nothing_but_the_scores(scores: PruneScores) -> None:
    backwards = dict(reversed(scores.scores.items()))
    strided = {n: torch.stack([s, s], -1)[..., 0].double() for n, s in backwards.items()}
    for given in (backwards, strided):
        again = PruneScores(scores.layout, given)
        assert list(again.scores) == list(scores.scores) and torch.equal(again.flat(), scores.flat())
        assert torch.equal(again.top_indices(7), scores.top_indices(7))


@some_scores
@pytest.mark.parametrize("signed", [False, True])
def test_threshold_keeps_what_is_at_least_that(scores: PruneScores, signed: bool) -> None:
    values = [v if signed else abs(v) for v in scores.flat().tolist()]
    for value in (*sorted(set(values)), -2.0, 2.0, 0.25):
        kept = [i for i, v in enumerate(values) if v >= value]
        assert scores.threshold(value, signed=signed).indices().tolist() == kept


def test_a_score_by_name_and_by_number() -> None:
    scores = without_ties(seq_len=3)
    for i, value in enumerate(scores.flat().tolist()):
        assert scores[i] == scores[scores.layout.edge_name(i)] == value
    for number in (-1, len(scores)):
        with pytest.raises(InputError, match=f"given {number}"):
            scores[number]
    with pytest.raises(UnknownNameError, match="Nearest: end"):
        scores["start->ende@0"]


# ---- circuits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [None, 3])
@pytest.mark.parametrize("numbers", [[], [4], [7, 0, 5, 7], list(range(N_EDGES))])
def test_a_circuit_of_edges_by_number_or_by_name(seq_len: int | None, numbers: list[int]) -> None:
    layout = make_layout(seq_len)
    names = [layout.edge_name(i) for i in numbers]
    for given in (numbers, names, torch.tensor(numbers, dtype=torch.long)):
        circuit = Circuit.of(layout, given)
        assert circuit.indices().tolist() == sorted(set(numbers)) and len(circuit) == len(set(numbers))
        assert {edge.name for edge in circuit.edges()} == set(names)
        layout.check(circuit.kept, "Kept")


def test_an_edge_in_part_is_in_the_circuit() -> None:
    layout = make_layout()
    flat = torch.zeros(layout.n_edges)
    flat[torch.tensor([2, 6, 17])] = torch.tensor([0.5, 1.0, 1e-6])
    circuit = Circuit(layout, layout.split(flat.requires_grad_()))
    assert circuit.indices().tolist() == [2, 6, 17] and circuit.n_edges == 3
    assert [edge.name for edge in circuit.edges()] == [layout.edge_name(i) for i in (2, 6, 17)]
    assert all(edge.score is None for edge in circuit.edges())


@pytest.mark.parametrize(("edges", "sentence"), [([3, 19], "0 to 18; given 19"), ([-1], "0 to 18; given -1")])
def test_a_circuit_of_numbers_without_an_edge(edges: list[int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Circuit.of(make_layout(), edges)


def test_a_circuit_of_names_without_an_edge() -> None:
    with pytest.raises(UnknownNameError, match="Nearest: blocks.0.hook_mlp_out/latent.7"):
        Circuit.of(make_layout(), ["start->end", f"{SITE}/latent.77->end"])
    with pytest.raises(InputError, match="writes after"):
        Circuit.of(make_layout(), ["blocks.1.attn/head.0->blocks.0.mlp.in"])


def test_tensors_that_do_not_fit_the_layout() -> None:
    layout, other = make_layout(), make_layout(3)
    tensors = other.split(torch.zeros(other.n_edges))
    with pytest.raises(InputError, match=r"A circuit for .*q: expected a tensor \[2, 1\], given \[3, 2, 1\]"):
        Circuit(layout, tensors)
    with pytest.raises(InputError, match=r"Scores for .*q: expected a tensor \[2, 1\], given \[3, 2, 1\]"):
        PruneScores(layout, tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    values = torch.zeros(N_EDGES)
    values[5] = value
    assert make_layout().edge(5).destination == "blocks.1.attn.k/head.0"
    with pytest.raises(InputError, match="edges into blocks.1.attn.k are not finite"):
        scores_of(values)


# ---- arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [None, 3])
def test_sums_and_multiples_are_those_of_each_score(seq_len: int | None) -> None:
    a, b = without_ties(0, seq_len), without_ties(1, seq_len)
    assert (a + b).flat().tolist() == [x + y for x, y in zip(a.flat(), b.flat(), strict=True)]
    assert torch.equal((a * 0.5).flat(), a.flat() * 0.5) and torch.equal((0.5 * a).flat(), (a * 0.5).flat())
    assert (a + a * -1.0).flat().abs().max() == 0
    assert (a + b).layout is a.layout


@some_scores
def test_normalised_scores_add_up_to_one(scores: PruneScores) -> None:
    total = math.fsum(abs(v) for v in scores.flat().tolist())
    normalised = scores.normalised().flat()
    if total == 0:
        assert torch.equal(normalised, scores.flat())
    else:
        assert normalised.abs().sum().item() == pytest.approx(1, rel=1e-6)
        torch.testing.assert_close(normalised, scores.flat() / total)


def mean_ranks_by_hand(values: list[float]) -> list[float]:
    below = [sum(v < x for v in values) for x in values]
    equal = [sum(v == x for v in values) for x in values]
    return [b + (e + 1) / 2 for b, e in zip(below, equal, strict=True)]


def spearman_by_hand(a: list[float], b: list[float]) -> float:
    ra, rb = mean_ranks_by_hand(a), mean_ranks_by_hand(b)
    middle = (len(a) + 1) / 2
    da, db = [r - middle for r in ra], [r - middle for r in rb]
    both = sum(x * y for x, y in zip(da, db, strict=True))
    return both / math.sqrt(sum(x * x for x in da) * sum(y * y for y in db))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("make", [with_ties, without_ties])
@pytest.mark.parametrize("seq_len", [None, 3])
def test_rank_correlation_is_spearmans_with_mean_ranks(make: Any, seq_len: int | None, signed: bool) -> None:
    for a, b in ((make(0, seq_len), make(1, seq_len)), (make(2, seq_len), with_ties(3, seq_len))):
        x, y = ([v if signed else abs(v) for v in s.flat().tolist()] for s in (a, b))
        assert a.rank_correlation(b, signed=signed) == pytest.approx(spearman_by_hand(x, y), abs=1e-12)
        assert a.rank_correlation(a, signed=signed) == pytest.approx(1)
    assert a.rank_correlation(a * -2.0) == pytest.approx(-1)


def test_rank_correlation_with_equal_scores_is_not_a_number() -> None:
    assert math.isnan(without_ties().rank_correlation(SCORES["equal"]))
    assert math.isnan(SCORES["zero"].rank_correlation(without_ties()))


@pytest.mark.parametrize(
    ("k", "signed", "expected"),
    [
        (0, False, 1.0),
        (1, False, 0.0),
        (2, False, 1 / 3),
        (3, False, 0.5),
        (N_EDGES, False, 1.0),
        (3, True, 0.2),
    ],
)
def test_jaccard_is_edges_in_both_over_edges_in_either(k: int, signed: bool, expected: float) -> None:
    a, b = torch.zeros(N_EDGES), torch.zeros(N_EDGES)
    a[:4] = torch.tensor([-5.0, 4.0, 3.0, 2.0])  # best 0, 1, 2; signed 1, 2, 3
    b[torch.tensor([0, 1, 8, 9])] = torch.tensor([4.0, -2.0, 5.0, 1.0])  # best 8, 0, 1; signed 8, 0, 9
    b[2] = 1.5  # signed 8, 0, 2
    assert scores_of(a).jaccard(scores_of(b), k, signed=signed) == pytest.approx(expected)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("seq_len", [None, 3])
def test_node_scores_add_up_the_edges_that_leave_a_source(seq_len: int | None, absolute: bool) -> None:
    scores = without_ties(seq_len=seq_len)
    sums: dict[tuple[str, int | None], float] = {}
    for i in range(len(scores)):
        edge = scores.layout.edge(i)
        value = abs(scores[i]) if absolute else scores[i]
        sums[edge.source, edge.position] = sums.get((edge.source, edge.position), 0.0) + value
    found = scores.node_scores(absolute=absolute)
    assert list(found) == [group.name for group in scores.layout.groups]
    for group in scores.layout.groups:
        assert found[group.name].shape == ((group.n,) if seq_len is None else (seq_len, group.n))
        for position in [None] if seq_len is None else range(seq_len):
            at = found[group.name] if position is None else found[group.name][position]
            by_hand = [sums[group.source_name(i, position), position] for i in range(group.n)]
            assert at.tolist() == pytest.approx(by_hand, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("other", [make_layout(3), make_layout(ids=(7, 4))], ids=["positions", "latents"])
def test_scores_of_another_graph_are_neither_added_nor_compared(other: EdgeLayout) -> None:
    ours, theirs = without_ties(), PruneScores(other, other.split(torch.randn(other.n_edges)))
    for use in (
        lambda: ours + theirs,
        lambda: ours.rank_correlation(theirs),
        lambda: theirs.jaccard(ours, 3),
    ):
        with pytest.raises(InputError, match="of different graphs .* can be compared or added"):
            use()


# ---- files ---------------------------------------------------------------------------------------


@some_scores
def test_saved_and_loaded_without_a_model(tmp_path: Path, scores: PruneScores) -> None:
    scores.save(tmp_path / "new folder" / "s.safetensors")
    assert sorted(p.name for p in (tmp_path / "new folder").iterdir()) == ["s.json", "s.safetensors"]
    again = PruneScores.load(str(tmp_path / "new folder" / "s.safetensors"))
    assert torch.equal(again.flat(), scores.flat()) and again.layout.same_as(scores.layout)
    assert again.edges(5) == scores.edges(5)
    assert torch.equal((again + scores).flat(), 2 * scores.flat())


@pytest.mark.parametrize("name", ["scores", "scores.pt", "scores.json"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    for use in (without_ties().save, PruneScores.load):
        with pytest.raises(InputError, match=f"NAME.safetensors and NAME.json; given .*{name}"):
            use(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("s.safetensors", None, "s.safetensors and s.json hold no edge scores"),
        ("s.json", None, "s.safetensors and s.json hold no edge scores .*s.json"),
        ("s.safetensors", "not tensors", "hold no edge scores"),
        ("s.json", "{", "hold no edge scores"),
        ("s.json", "[]", "s.json does not describe edge scores"),
        ("s.json", '{"format": "something else"}', "s.json does not describe edge scores"),
        ("s.json", '{"format": "auto_circuit edge scores 1"}', "no description of a graph"),
    ],
)
def test_missing_and_damaged_files(tmp_path: Path, file: str, content: str | None, sentence: str) -> None:
    without_ties().save(tmp_path / "s.safetensors")
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=sentence):
        PruneScores.load(tmp_path / "s.safetensors")


def test_a_description_of_another_graph_is_refused(tmp_path: Path) -> None:
    without_ties().save(tmp_path / "s.safetensors")
    content = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps({**content, "seq_len": 3}))
    with pytest.raises(InputError, match="not saved together"):
        PruneScores.load(tmp_path / "s.safetensors")


def small_layout(ids: tuple[int, int] = (7, 3)) -> EdgeLayout:
    groups = (
        SourceGroup("start", "dense", 1, 0),
        SourceGroup("s", "latents", 3, 1, "error", torch.tensor(ids)),
    )
    return EdgeLayout(groups, (Destination("m", None, 1, 0), Destination("end", None, 4, 2)), None)


def small_scores() -> PruneScores:
    return PruneScores(small_layout(), small_layout().split(torch.tensor([1.0, 5, 4, 3, 2])))


def test_a_mask_is_not_read_as_numbers() -> None:
    mask = torch.tensor([False, False, True, True, False])
    assert Circuit.of(small_layout(), mask).indices().tolist() == [2, 3]


@pytest.mark.parametrize("edges", [[1.7], torch.tensor([1.5])])
def test_fractions_are_not_read_as_numbers(edges: Any) -> None:
    with pytest.raises(AutoCircuitError):
        Circuit.of(small_layout(), edges)


def test_the_number_that_is_out_of_range_is_named() -> None:
    with pytest.raises(InputError, match="given -1"):
        Circuit.of(small_layout(), [-1, 3])


def test_edges_from_scores_make_a_circuit() -> None:
    assert Circuit.of(small_layout(), small_scores().edges(2)).indices().tolist() == [1, 2]


def test_tensors_and_layout_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    small_scores().save(tmp_path / "a.safetensors")
    other = small_layout((7, 4))
    PruneScores(other, other.split(torch.zeros(5))).save(tmp_path / "b.safetensors")
    (tmp_path / "b.json").rename(tmp_path / "a.json")
    with pytest.raises(InputError):
        PruneScores.load(tmp_path / "a.safetensors")


def test_scores_that_share_a_tensor_are_saved(tmp_path: Path) -> None:
    groups = (SourceGroup("start", "dense", 1, 0),)
    one = EdgeLayout(groups, (Destination("m", None, 1, 0), Destination("end", None, 1, 2)), None)
    zero = torch.zeros(1)
    PruneScores(one, {"m": zero, "end": zero}).save(tmp_path / "a.safetensors")


def test_arithmetic_that_overflows_does_not_blame_the_model() -> None:
    with pytest.raises(AutoCircuitError) as error:
        small_scores() * math.nan
    assert "SAE" not in str(error.value)


def test_scores_can_be_summed() -> None:
    assert sum([small_scores(), small_scores()]).flat()[0] == 2


def test_a_name_instead_of_a_list_is_refused() -> None:
    with pytest.raises(InputError, match="sequence of edges"):
        Circuit.of(small_layout(), "start->end")


def test_negative_or_fractional_sizes_are_refused() -> None:
    for k in (-1, 2.7):
        with pytest.raises(InputError):
            small_scores().top_indices(k)


def test_scores_can_be_listed() -> None:
    assert [edge.score for edge in small_scores()] == [1, 5, 4, 3, 2]


def test_scores_are_subtracted_negated_and_divided() -> None:
    twice = small_scores() + small_scores()
    assert torch.equal((twice - small_scores()).flat(), small_scores().flat())
    assert torch.equal((-twice / 2).flat(), -small_scores().flat())


def test_a_mask_of_whole_numbers_is_refused_and_numpy_is_read() -> None:
    numpy = pytest.importorskip("numpy")
    assert Circuit.of(small_layout(), numpy.array([1, 3])).indices().tolist() == [1, 3]
    assert Circuit.of(small_layout(), [numpy.int64(2)]).indices().tolist() == [2]
    assert Circuit.of(small_layout(), numpy.array([True, False, False, False, True])).n_edges == 2
    with pytest.raises(InputError, match="bool tensor"):
        Circuit.of(small_layout(), torch.ones(5, dtype=torch.long))
    with pytest.raises(InputError, match="not finite real numbers"):
        Circuit(small_layout(), small_layout().split(torch.full((5,), torch.nan)))
