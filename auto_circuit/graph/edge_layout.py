"""Edges by number and by name, without ever holding them as objects, and without the model.

Sources stand in one order, that in which they write: groups (the stream's start, each layer's heads, each
MLP, each SAE site's latents with what they leave over) as they run, within a group heads or latents by
index, the remainder last. A destination reads a prefix of that order. The scores of one destination module
are a tensor `[(seq,) (heads,) n_sources]`; edges are numbered through these tensors, destination after
destination.

Names: `blocks.1.attn/head.2->blocks.3.attn.q/head.5`, `start->end`, `blocks.6.hook_mlp_out/latent.123->
blocks.7.mlp.in@4`. A latent is named by its published id; `@4` is the token position.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from auto_circuit.errors import InputError, unknown_name

START, END = "start", "end"


@dataclass(frozen=True, eq=False)
class SourceGroup:
    """Sources that write together.

    Attributes:
        name: `start`, `blocks.3.attn`, `blocks.3.mlp`, or the name of an SAE's site.
        kind: `dense` (one source), `heads`, or `latents`.
        n: number of sources, the remainder included.
        stage: when it writes: 0 the start, 2·layer + 1 attention, 2·layer + 2 the MLP.
        remainder: what a site writes that its latents do not account for, a source of its own: `error`,
            `bias` (a token-dependent one, where there are no error nodes), or None.
        latent_ids: published ids `[(seq,) n_latents]`, for latents.
    """

    name: str
    kind: str
    n: int
    stage: int
    remainder: str | None = None
    latent_ids: Tensor | None = None

    @property
    def n_columns(self) -> int:
        """Number of heads or latents; 0 for a dense source."""
        return 0 if self.kind == "dense" else self.n - (self.remainder is not None)

    def source_name(self, index: int, position: int | None) -> str:
        """Return the name of the group's source at an index."""
        if self.kind == "dense":
            return self.name
        if index >= self.n_columns:
            return f"{self.name}/{self.remainder}"
        if self.kind == "heads":
            return f"{self.name}/head.{index}"
        ids = self.latent_ids if self.latent_ids is not None else torch.arange(self.n_columns)
        return f"{self.name}/latent.{int(ids[index] if ids.ndim == 1 else ids[position or 0, index])}"

    def source_index(self, part: str, position: int | None) -> int | None:
        """Return the index of the source called `name/part`; None where there is none."""
        if part == "":
            return 0 if self.kind == "dense" else None
        if part == self.remainder:
            return self.n - 1
        kind, _, number = part.partition(".")
        if not number.isdecimal() or kind != {"heads": "head", "latents": "latent"}.get(self.kind):
            return None
        wanted = int(number)
        if self.kind == "heads" or self.latent_ids is None:
            return wanted if wanted < self.n_columns else None
        ids = self.latent_ids if self.latent_ids.ndim == 1 else self.latent_ids[position or 0]
        found = (ids == wanted).nonzero()
        return int(found[0]) if len(found) else None


@dataclass(frozen=True)
class Destination:
    """A module that reads the stream.

    Attributes:
        name: `blocks.3.attn.q` (`.k`, `.v`, or `.in` for all three), `blocks.3.mlp.in`, `end`.
        heads: number of rows: heads, key/value heads under GQA; None for one row without a name.
        n_sources: how many sources come before it.
        stage: the last stage of sources that it sees.
    """

    name: str
    heads: int | None
    n_sources: int
    stage: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.heads or 1


@dataclass(frozen=True)
class Edge:
    """One edge, made on demand.

    Attributes:
        index: its number in the layout.
        source, destination: names of nodes, `blocks.1.attn/head.2`, `blocks.3.attn.q/head.5`.
        position: token position, when edges are per position.
        score: its score, where it comes from scores; else None.
    """

    index: int
    source: str
    destination: str
    position: int | None
    score: float | None = None

    @property
    def name(self) -> str:
        """For people and files."""
        at = "" if self.position is None else f"@{self.position}"
        return f"{self.source}->{self.destination}{at}"


@dataclass(frozen=True, eq=False)
class EdgeLayout:
    """Which edges there are.

    Attributes:
        groups: the groups of sources, in order.
        destinations: the modules that read, in order.
        seq_len: number of positions when edges are per position, else None.
    """

    groups: tuple[SourceGroup, ...]
    destinations: tuple[Destination, ...]
    seq_len: int | None = None
    _by_name: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._by_name.update({d.name: i for i, d in enumerate(self.destinations)})

    # ---- sizes -----------------------------------------------------------------------------------

    @cached_property
    def group_starts(self) -> dict[str, int]:
        """Index of each group's first source among all sources."""
        starts = accumulate((group.n for group in self.groups), initial=0)
        return {group.name: start for group, start in zip(self.groups, starts, strict=False)}

    @property
    def n_sources(self) -> int:
        """Number of sources."""
        return sum(group.n for group in self.groups)

    def shape(self, destination: Destination) -> tuple[int, ...]:
        """Shape of a destination's tensor, `[(seq,) (heads,) n_sources]`."""
        seq = () if self.seq_len is None else (self.seq_len,)
        heads = () if destination.heads is None else (destination.heads,)
        return (*seq, *heads, destination.n_sources)

    @cached_property
    def _offsets(self) -> list[int]:
        sizes = ((self.seq_len or 1) * d.rows * d.n_sources for d in self.destinations)
        return list(accumulate(sizes, initial=0))

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return self._offsets[-1]

    def groups_before(self, destination: Destination) -> list[SourceGroup]:
        """The groups that a destination reads."""
        return [group for group in self.groups if group.stage <= destination.stage]

    def slice_of(self, destination: str) -> slice:
        """The edge numbers of a destination's tensor, flattened."""
        i = self.destination_index(destination)
        return slice(self._offsets[i], self._offsets[i + 1])

    def destination_index(self, name: str) -> int:
        """Return the place of a destination module among all.

        Raises:
            UnknownNameError: naming the nearest.
        """
        if name not in self._by_name:
            raise unknown_name("destination", name, self._by_name)
        return self._by_name[name]

    # ---- edges -----------------------------------------------------------------------------------

    def edge(self, index: int, score: float | None = None) -> Edge:
        """Return the edge with a number.

        Raises:
            InputError: when there is none.
        """
        if not 0 <= index < self.n_edges:
            raise InputError(f"There are edges 0 to {self.n_edges - 1:,}; given {index}.")
        i = bisect_right(self._offsets, index) - 1
        destination = self.destinations[i]
        rest, source = divmod(index - self._offsets[i], destination.n_sources)
        position, row = divmod(rest, destination.rows)
        at = None if self.seq_len is None else position
        return Edge(index, self.source_name(source, at), _row_name(destination, row), at, score)

    def edge_name(self, index: int) -> str:
        """Return the name of the edge with a number."""
        return self.edge(index).name

    def edge_index(self, name: str) -> int:
        """Return the number of the edge called `name`.

        Raises:
            UnknownNameError: naming the nearest source or destination.
            InputError: for a name of another form, a position that does not exist, or a source that
                comes after its destination.
        """
        nodes, _, at = name.partition("@")
        source_name, arrow, destination_name = nodes.partition("->")
        if not arrow or (at != "" and not at.isdecimal()):
            raise InputError(
                f"Edges are named source->destination, such as {self.edge_name(0)}; given {name!r}."
            )
        position = int(at) if at else None
        if (position is None) != (self.seq_len is None) or (position or 0) >= (self.seq_len or 1):
            wanted = "no position" if self.seq_len is None else f"@0 to @{self.seq_len - 1} at the end"
            raise InputError(f"{name!r}: edges of this graph have {wanted}.")
        i, row = self._destination(destination_name)
        source = self.source_index(source_name, position)
        destination = self.destinations[i]
        if source >= destination.n_sources:
            raise InputError(f"{source_name} writes after {destination_name} reads; there is no such edge.")
        at_row = (position or 0) * destination.rows + row
        return self._offsets[i] + at_row * destination.n_sources + source

    def sources_of(self, destination: str) -> list[str]:
        """Return the names of a destination's sources (at position 0 where latents differ by position).

        Args:
            destination: a module (`blocks.3.attn.q`) or a row of one (`blocks.3.attn.q/head.5`).
        """
        i = self._destination(destination)[0] if "/" in destination else self.destination_index(destination)
        at = None if self.seq_len is None else 0
        return [self.source_name(s, at) for s in range(self.destinations[i].n_sources)]

    def source_name(self, index: int, position: int | None = None) -> str:
        """Return the name of the source with an index among all sources."""
        for group in self.groups:
            if index < group.n:
                return group.source_name(index, position)
            index -= group.n
        raise InputError(f"There are {self.n_sources} sources; no such index.")

    def source_index(self, name: str, position: int | None = None) -> int:
        """Return the index of a source among all sources.

        Raises:
            UnknownNameError: naming the nearest sources.
        """
        group_name, _, part = name.partition("/")
        for group in self.groups:
            if group.name == group_name:
                index = group.source_index(part, position)
                if index is not None:
                    return self.group_starts[group.name] + index
                known = [group.source_name(i, position) for i in range(group.n)]
                raise unknown_name("source", name, known)
        raise unknown_name("source", name, [group.source_name(0, position) for group in self.groups])

    def _destination(self, name: str) -> tuple[int, int]:
        module, _, row = name.partition("/")
        i = self.destination_index(module)
        destination = self.destinations[i]
        number = re.fullmatch(r"head\.(\d+)", row)
        if destination.heads is None and row == "":
            return i, 0
        if destination.heads is None or number is None or int(number[1]) >= destination.heads:
            known = [_row_name(destination, r) for r in range(destination.rows)]
            raise unknown_name("destination", name, known)
        return i, int(number[1])

    # ---- tensors ---------------------------------------------------------------------------------

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a tensor `[n_edges]` into one for each destination."""
        return {d.name: flat[self.slice_of(d.name)].view(self.shape(d)) for d in self.destinations}

    def check(self, tensors: Mapping[str, Any], what: str) -> None:
        """Refuse tensors that are not one for each destination, of the right shape.

        Raises:
            InputError: naming the first that is not.
        """
        for name in tensors:
            self.destination_index(name)
        for destination in self.destinations:
            given = tensors.get(destination.name)
            if not isinstance(given, Tensor) or tuple(given.shape) != self.shape(destination):
                has = list(given.shape) if isinstance(given, Tensor) else "nothing"
                raise InputError(
                    f"{what} for {destination.name}: expected a tensor {list(self.shape(destination))}, "
                    f"given {has}. Were they made for another graph (other SAEs, pruning, positions)?"
                )

    def same_as(self, other: "EdgeLayout") -> bool:
        """Whether both have the same edges."""
        return self.describe() == other.describe()

    # ---- files -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return this layout as plain data for JSON."""
        return {
            "seq_len": self.seq_len,
            "groups": [
                {
                    "name": g.name,
                    "kind": g.kind,
                    "n": g.n,
                    "stage": g.stage,
                    "remainder": g.remainder,
                    "latent_ids": None if g.latent_ids is None else g.latent_ids.tolist(),
                }
                for g in self.groups
            ],
            "destinations": [
                {"name": d.name, "heads": d.heads, "n_sources": d.n_sources, "stage": d.stage}
                for d in self.destinations
            ],
        }

    @classmethod
    def from_description(cls, content: Mapping[str, Any]) -> "EdgeLayout":
        """Build a layout from what `describe` returned.

        Raises:
            InputError: when an entry is missing or of another kind.
        """
        try:
            groups = tuple(_group(entry) for entry in content["groups"])
            destinations = tuple(Destination(**entry) for entry in content["destinations"])
            return cls(groups, destinations, content["seq_len"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"This is no description of a graph ({error!r}).") from error


def _group(entry: Mapping[str, Any]) -> SourceGroup:
    ids = entry["latent_ids"]
    return SourceGroup(
        **{**entry, "latent_ids": None if ids is None else torch.tensor(ids, dtype=torch.long)}
    )


def _row_name(destination: Destination, row: int) -> str:
    return destination.name if destination.heads is None else f"{destination.name}/head.{row}"


def readers(groups: Iterable[SourceGroup], stage: int) -> int:
    """Number of sources that a reader at a stage sees."""
    return sum(group.n for group in groups if group.stage <= stage)
