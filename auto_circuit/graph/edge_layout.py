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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from auto_circuit.errors import AutoCircuitError, InputError, unknown_name
from auto_circuit.graph.edge_ends import Destination, Edge, SourceGroup, readers, row_name


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
        destination, within = self.place(index)
        rest, source = divmod(within, destination.n_sources)
        position, row = divmod(rest, destination.rows)
        at = None if self.seq_len is None else position
        return Edge(index, self.source_name(source, at), row_name(destination, row), at, score)

    def place(self, index: int) -> tuple[Destination, int]:
        """Return the destination of the edge with a number, and where it is in its flattened tensor.

        Raises:
            InputError: when there is no such edge.
        """
        if not 0 <= index < self.n_edges or int(index) != index:
            raise InputError(f"There are edges 0 to {self.n_edges - 1:,}; given {index}.")
        i = bisect_right(self._offsets, index) - 1
        return self.destinations[i], index - self._offsets[i]

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
        nodes, sign, at = name.partition("@")
        source_name, arrow, destination_name = nodes.partition("->")
        if not arrow or (sign and not at.isdecimal()) or source_name.endswith("/"):
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
                raise self._unknown_source(group, part, position)
        raise unknown_name("source", name, [group.source_name(0, position) for group in self.groups])

    def _unknown_source(self, group: SourceGroup, part: str, position: int | None) -> AutoCircuitError:
        """Say which sources of a group are near to the one asked for."""
        kind, _, number = part.partition(".")
        known = range(group.n)
        if kind == "latent" and number.isdecimal() and group.kind == "latents":
            # The nearest numbers: comparing spellings would take seconds with many latents.
            ids = group.latent_ids if group.latent_ids is not None else torch.arange(group.n_columns)
            ids = ids if ids.ndim == 1 else ids[position or 0]
            known = (ids - int(number)).abs().argsort(stable=True)[:4].tolist()
        names = [group.source_name(i, position) for i in known]
        return unknown_name("source", f"{group.name}/{part}", names)

    def _destination(self, name: str) -> tuple[int, int]:
        module, _, row = name.partition("/")
        i = self.destination_index(module)
        destination = self.destinations[i]
        number = re.fullmatch(r"head\.(0|[1-9]\d*)", row)
        if destination.heads is None and row == "":
            return i, 0
        if destination.heads is None or number is None or int(number[1]) >= destination.heads:
            known = [row_name(destination, r) for r in range(destination.rows)]
            raise unknown_name("destination", name, known)
        return i, int(number[1])

    # ---- tensors ---------------------------------------------------------------------------------

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a tensor `[n_edges]` into one for each destination.

        Raises:
            InputError: for a tensor of another length.
        """
        if flat.shape != (self.n_edges,):
            raise InputError(f"Expected a tensor [{self.n_edges}]; given {list(flat.shape)}.")
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
                has = type(given).__name__ if destination.name in tensors else "nothing"
                has = list(given.shape) if isinstance(given, Tensor) else has
                raise InputError(
                    f"{what} for {destination.name}: expected a tensor {list(self.shape(destination))}, "
                    f"given {has}. Were they made for another graph (other SAEs, pruning, positions)?"
                )

    def same_as(self, other: "EdgeLayout") -> bool:
        """Whether both have the same edges."""
        return self is other or self.describe() == other.describe()

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
            layout = cls(groups, destinations, content["seq_len"])
            _check_described(layout)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"This is no description of a graph ({error!r}).") from error
        return layout


def _check_described(layout: EdgeLayout) -> None:
    """Raise a ValueError unless a layout read from a file fits together."""

    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    names = [group.name for group in layout.groups], [d.name for d in layout.destinations]
    if any(len(set(kind)) != len(kind) or not all(isinstance(n, str) for n in kind) for kind in names):
        raise ValueError("names that are not strings, or not unique")
    if layout.seq_len is not None and not whole(layout.seq_len, 1):
        raise ValueError(f"seq_len {layout.seq_len!r}")
    for group in layout.groups:
        kinds, remainders = ("dense", "heads", "latents"), (None, "error", "bias")
        fits = whole(group.n, 1) and whole(group.stage, 0) and group.kind in kinds
        if not fits or group.remainder not in remainders or (group.kind == "dense" and group.n != 1):
            raise ValueError(f"group {group.name}")
        if group.latent_ids is not None and group.latent_ids.shape[-1] != group.n_columns:
            raise ValueError(f"latent_ids of {group.name}")
    for d in layout.destinations:
        fits = whole(d.stage, 0) and (d.heads is None or whole(d.heads, 1))
        if not fits or d.n_sources != readers(layout.groups, d.stage):
            raise ValueError(f"destination {d.name}")


def _group(entry: Mapping[str, Any]) -> SourceGroup:
    ids = entry["latent_ids"]
    held = None if ids is None else torch.tensor(ids)
    if held is not None and held.dtype != torch.long:
        raise ValueError(f"latent_ids of {entry['name']} that are not whole numbers")
    return SourceGroup(**{**entry, "latent_ids": held})
