import json
from typing import Any

import pytest
import torch

from auto_circuit.errors import InputError, UnknownNameError
from auto_circuit.graph.edge_ends import Destination, SourceGroup, readers
from auto_circuit.graph.edge_layout import EdgeLayout

#: Published ids of the latents at each of three positions.
IDS = torch.tensor([[7, 3, 9], [3, 8, 1], [9, 2, 7]])
SITE = "blocks.0.hook_mlp_out"

#: (seq_len, whether latents differ by position)
KINDS = [(None, False), (3, False), (3, True)]


def make_layout(seq_len: int | None = None, ids_differ: bool = False) -> EdgeLayout:
    """Block 0: heads (one key/value head), MLP in an SAE; block 1, parallel: an SAE without error, an MLP."""
    groups = (
        SourceGroup("start", "dense", 1, 0),
        SourceGroup("blocks.0.attn", "heads", 3, 1),
        SourceGroup(SITE, "latents", 4, 2, "error", IDS if ids_differ else IDS[0]),
        SourceGroup("blocks.1.attn.hook_z", "latents", 2, 3),
        SourceGroup("blocks.1.mlp", "dense", 1, 4),
        SourceGroup("blocks.2.attn", "heads", 2, 5),
    )
    rows: list[tuple[str, int | None, int]] = [
        ("blocks.0.attn.q", 3, 0),
        ("blocks.0.attn.k", 1, 0),
        ("blocks.0.attn.v", 1, 0),
        ("blocks.0.mlp.in", None, 1),
        ("blocks.1.attn.in", 3, 2),
        ("blocks.1.mlp.in", None, 2),
        ("blocks.2.attn.in", 2, 3),
        ("end", None, 6),
    ]
    destinations = [Destination(name, heads, readers(groups, s), s) for name, heads, s in rows]
    return EdgeLayout(groups, tuple(destinations), seq_len)


def sources_at(position: int | None, ids_differ: bool) -> list[tuple[int, str]]:
    """Every source's stage and name, by hand."""
    ids = ([7, 3, 9], [3, 8, 1], [9, 2, 7])[(position or 0) if ids_differ else 0]
    return [
        (0, "start"),
        *[(1, f"blocks.0.attn/head.{head}") for head in (0, 1, 2)],
        *[(2, f"blocks.0.hook_mlp_out/latent.{i}") for i in ids],
        (2, "blocks.0.hook_mlp_out/error"),
        (3, "blocks.1.attn.hook_z/latent.0"),
        (3, "blocks.1.attn.hook_z/latent.1"),
        (4, "blocks.1.mlp"),
        (5, "blocks.2.attn/head.0"),
        (5, "blocks.2.attn/head.1"),
    ]


def readers_by_hand() -> list[tuple[int, list[str]]]:
    """Every destination's stage and the names of its rows."""
    return [
        (0, ["blocks.0.attn.q/head.0", "blocks.0.attn.q/head.1", "blocks.0.attn.q/head.2"]),
        (0, ["blocks.0.attn.k/head.0"]),
        (0, ["blocks.0.attn.v/head.0"]),
        (1, ["blocks.0.mlp.in"]),
        (2, ["blocks.1.attn.in/head.0", "blocks.1.attn.in/head.1", "blocks.1.attn.in/head.2"]),
        (2, ["blocks.1.mlp.in"]),
        (3, ["blocks.2.attn.in/head.0", "blocks.2.attn.in/head.1"]),
        (6, ["end"]),
    ]


def names_by_hand(seq_len: int | None, ids_differ: bool) -> list[str]:
    names = []
    for reads, rows in readers_by_hand():
        for position in [None] if seq_len is None else range(seq_len):
            for row in rows:
                for writes, source in sources_at(position, ids_differ):
                    if writes <= reads:
                        names.append(f"{source}->{row}" + ("" if position is None else f"@{position}"))
    return names


@pytest.mark.parametrize(("seq_len", "ids_differ"), KINDS)
def test_numbers_and_names_are_those_of_a_nested_loop(seq_len: int | None, ids_differ: bool) -> None:
    layout, names = make_layout(seq_len, ids_differ), names_by_hand(seq_len, ids_differ)
    assert layout.n_edges == len(names) == len(set(names))
    assert [layout.edge(i).name for i in range(layout.n_edges)] == names
    assert [layout.edge_name(i) for i in range(layout.n_edges)] == names
    assert [layout.edge_index(name) for name in names] == list(range(len(names)))


def test_number_of_edges_grows_with_positions() -> None:
    assert make_layout().n_edges == 3 + 1 + 1 + 4 + 3 * 8 + 8 + 2 * 10 + 13
    assert make_layout(3).n_edges == 3 * make_layout().n_edges
    assert make_layout().n_sources == 13


def test_an_edge_knows_its_parts() -> None:
    layout = make_layout(3, True)
    edge = layout.edge(layout.edge_index(f"{SITE}/latent.8->end@1"), score=0.5)
    assert (edge.source, edge.destination, edge.position) == (f"{SITE}/latent.8", "end", 1)
    assert (
        edge.score == 0.5 and make_layout().edge(0).score is None and make_layout().edge(0).position is None
    )


@pytest.mark.parametrize(("seq_len", "ids_differ"), KINDS)
def test_split_puts_each_edge_at_its_position_row_and_source(seq_len: int | None, ids_differ: bool) -> None:
    layout = make_layout(seq_len, ids_differ)
    tensors, next_edge = layout.split(torch.arange(layout.n_edges)), 0
    layout.check(tensors, "Numbers")
    for destination, (reads, rows) in zip(layout.destinations, readers_by_hand(), strict=True):
        n_sources = sum(writes <= reads for writes, _ in sources_at(0, False))
        numbers = tensors[destination.name]
        assert numbers.shape == (
            *(() if seq_len is None else (seq_len,)),
            *(() if len(rows) == 1 and "/" not in rows[0] else (len(rows),)),
            n_sources,
        )
        assert numbers.flatten().tolist() == list(range(next_edge, next_edge + numbers.numel()))
        next_edge += numbers.numel()
    assert next_edge == layout.n_edges


@pytest.mark.parametrize(("seq_len", "ids_differ"), KINDS)
def test_sources_of_a_module_or_a_row_are_those_that_write_before(
    seq_len: int | None, ids_differ: bool
) -> None:
    layout = make_layout(seq_len, ids_differ)
    for destination, (reads, rows) in zip(layout.destinations, readers_by_hand(), strict=True):
        names = [name for writes, name in sources_at(0, ids_differ) if writes <= reads]
        for asked in (destination.name, *rows):
            assert layout.sources_of(asked) == names
        assert [g.name for g in layout.groups_before(destination)] == list(
            dict.fromkeys(name.partition("/")[0] for name in names)
        )


@pytest.mark.parametrize(("seq_len", "ids_differ"), KINDS)
def test_described_in_json_and_built_again_has_the_same_edges(seq_len: int | None, ids_differ: bool) -> None:
    layout = make_layout(seq_len, ids_differ)
    again = EdgeLayout.from_description(json.loads(json.dumps(layout.describe())))
    assert again.same_as(layout) and again.describe() == layout.describe()
    assert [again.edge_name(i) for i in range(again.n_edges)] == names_by_hand(seq_len, ids_differ)


def test_layouts_with_other_edges_are_not_the_same() -> None:
    layouts = [make_layout(*kind) for kind in KINDS] + [make_layout(4)]
    for i, a in enumerate(layouts):
        for j, b in enumerate(layouts):
            assert a.same_as(b) == (i == j)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "blocks.0.atn/head.1->end",
            "No source is called 'blocks.0.atn/head.1'. Nearest: blocks.0.attn/head",
        ),
        ("blocks.0.attn/head.3->end", "No source .* Nearest: blocks.0.attn/head.2, blocks.0.attn/head.1"),
        ("blocks.0.attn->end", "No source .* Nearest: blocks.0.attn/head"),
        ("blocks.0.attn/latent.0->end", "No source .* Nearest: blocks.0.attn/head"),
        ("blocks.0.hook_mlp_out/latent.4->end", "No source .* Nearest: blocks.0.hook_mlp_out/latent.9"),
        ("blocks.0.hook_mlp_out/eror->end", "No source .* Nearest: blocks.0.hook_mlp_out/error"),
        ("blocks.1.attn.hook_z/error->end", "No source .* Nearest: blocks.1.attn.hook_z/latent"),
        ("blocks.1.attn.hook_z/latent.2->end", "No source .* Nearest: blocks.1.attn.hook_z/latent.1"),
        ("start/head.0->end", "No source .* Nearest: start"),
        ("->end", "No source is called ''"),
        ("start->ende", "No destination is called 'ende'. Nearest: end"),
        (
            "start->blocks.0.attn.z/head.0",
            "No destination is called 'blocks.0.attn.z'. Nearest: blocks.0.attn",
        ),
        ("start->blocks.0.attn.q/head.3", "No destination .* Nearest: blocks.0.attn.q/head"),
        ("start->blocks.0.attn.k/head.1", "No destination .* Nearest: blocks.0.attn.k/head.0"),
        ("start->blocks.0.attn.q", "No destination .* Nearest: blocks.0.attn.q/head"),
        ("start->blocks.0.attn.q/2", "No destination .* Nearest: blocks.0.attn.q/head.2"),
        ("start->end/head.0", "No destination .* Nearest: end"),
        ("start->", "No destination is called ''"),
    ],
)
def test_unknown_nodes_are_refused_naming_the_nearest(name: str, sentence: str) -> None:
    with pytest.raises(UnknownNameError, match=sentence):
        make_layout().edge_index(name)


def test_a_latent_of_another_position_is_unknown() -> None:
    layout = make_layout(3, True)
    assert layout.edge(layout.edge_index(f"{SITE}/latent.8->end@1")).position == 1
    with pytest.raises(UnknownNameError, match="Nearest: .*latent.9"):
        layout.edge_index(f"{SITE}/latent.8->end@0")


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn/head.0->blocks.0.attn.q/head.0",
        "blocks.0.hook_mlp_out/error->blocks.0.mlp.in",
        "blocks.1.attn.hook_z/latent.0->blocks.1.mlp.in",
        "blocks.1.mlp->blocks.2.attn.in/head.1",
    ],
)
def test_a_source_that_writes_too_late_has_no_edge(name: str) -> None:
    source, destination = name.split("->")
    with pytest.raises(InputError, match=f"{source} writes after {destination} reads"):
        make_layout().edge_index(name)


@pytest.mark.parametrize(
    ("seq_len", "name", "sentence"),
    [
        (None, "start->end@0", "have no position"),
        (3, "start->end", "have @0 to @2 at the end"),
        (3, "start->end@3", "have @0 to @2 at the end"),
        (3, "start->end@x", r"such as start->blocks.0.attn.q/head.0@0; given 'start->end@x'"),
        (3, "start->end@-1", "source->destination"),
        (None, "start", r"such as start->blocks.0.attn.q/head.0; given 'start'"),
        (None, "", "source->destination"),
        (None, "start→end", "source->destination"),
    ],
)
def test_positions_and_forms_that_do_not_fit(seq_len: int | None, name: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make_layout(seq_len).edge_index(name)


@pytest.mark.parametrize("index", [-1, 74, 10**9])
def test_numbers_without_an_edge(index: int) -> None:
    assert make_layout().n_edges == 74
    with pytest.raises(InputError, match=rf"0 to 73; given {index}"):
        make_layout().edge(index)


@pytest.mark.parametrize("name", ["blocks.3.attn.q", "blocks.0.attn.q/head.7", "end/head.0", "start"])
def test_sources_of_no_destination(name: str) -> None:
    with pytest.raises(UnknownNameError, match="No destination .* Nearest: "):
        make_layout().sources_of(name)


def test_tensors_of_another_layout_are_refused_by_name() -> None:
    layout = make_layout()
    tensors = layout.split(torch.zeros(layout.n_edges))
    with pytest.raises(InputError, match=r"Scores for end: expected a tensor \[13\], given nothing"):
        layout.check({n: t for n, t in tensors.items() if n != "end"}, "Scores")
    with pytest.raises(InputError, match=r"blocks.0.attn.q: expected a tensor \[3, 1\], given \[3, 3, 1\]"):
        layout.check(make_layout(3).split(torch.zeros(3 * layout.n_edges)), "Scores")
    with pytest.raises(UnknownNameError, match="'blocks.0.mlp.out'. Nearest: blocks.0.mlp.in"):
        layout.check({**tensors, "blocks.0.mlp.out": torch.zeros(1)}, "Scores")


def _without(content: dict[str, Any], path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        content = content[key]
    del content[path[-1]]


@pytest.mark.parametrize(
    "path",
    [
        ("seq_len",),
        ("groups",),
        ("destinations",),
        ("groups", 1, "name"),
        ("groups", 2, "latent_ids"),
        ("destinations", 0, "heads"),
    ],
)
def test_a_description_that_lacks_an_entry_is_refused(path: tuple[Any, ...]) -> None:
    content = make_layout().describe()
    _without(content, path)
    with pytest.raises(InputError, match=f"no description of a graph.*{path[-1]}"):
        EdgeLayout.from_description(content)


@pytest.mark.parametrize(
    "changed",
    [
        {"groups": None},
        {"destinations": "blocks"},
        {"groups": [3]},
        {"groups": [{**make_layout().describe()["groups"][2], "latent_ids": [[7, 3], [9]]}]},
        {"groups": [{**make_layout().describe()["groups"][2], "latent_ids": ["a", "b", "c"]}]},
        {"destinations": [{**make_layout().describe()["destinations"][0], "width": 3}]},
    ],
)
def test_a_description_with_entries_of_another_kind_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no description of a graph"):
        EdgeLayout.from_description({**make_layout().describe(), **changed})


def small_layout(ids: tuple[int, int] = (7, 3)) -> EdgeLayout:
    groups = (
        SourceGroup("start", "dense", 1, 0),
        SourceGroup("s", "latents", 3, 1, "error", torch.tensor(ids)),
    )
    return EdgeLayout(groups, (Destination("m", None, 1, 0), Destination("end", None, 4, 2)), None)


def damaged(which: str, i: int, **changed: Any) -> EdgeLayout:
    content = json.loads(json.dumps(small_layout().describe()))
    content[which][i] |= changed
    return EdgeLayout.from_description(content)


@pytest.mark.parametrize(
    ("which", "i", "changed"),
    [
        ("groups", 0, {"n": "1"}),
        ("groups", 0, {"kind": "foo"}),
        ("groups", 1, {"latent_ids": [1]}),
        ("groups", 1, {"latent_ids": [1.5, 2]}),
        ("groups", 0, {"name": "s"}),
        ("destinations", 1, {"n_sources": 99}),
        ("destinations", 1, {"n_sources": -1}),
        ("destinations", 1, {"name": "m"}),
    ],
)
def test_damaged_descriptions_are_refused(which: str, i: int, changed: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        damaged(which, i, **changed)


@pytest.mark.parametrize("seq_len", ["3", 0, -2, 1.5])
def test_positions_that_are_no_number(seq_len: Any) -> None:
    with pytest.raises(InputError):
        EdgeLayout.from_description({**small_layout().describe(), "seq_len": seq_len})


def test_at_without_a_position_is_refused() -> None:
    with pytest.raises(InputError):
        small_layout().edge_index("start->end@")


@pytest.mark.parametrize("n", [4, 6])
def test_split_refuses_another_size(n: int) -> None:
    with pytest.raises(InputError):
        small_layout().split(torch.zeros(n))


def test_what_is_no_tensor_is_not_called_nothing() -> None:
    with pytest.raises(InputError) as error:
        small_layout().check({"m": [0.0], "end": [0.0] * 4}, "Scores")
    assert "nothing" not in str(error.value)
