"""The ends of edges: groups of sources, modules that read, and an edge between two of them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

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
        if not re.fullmatch(r"0|[1-9]\d*", number) or kind != {"heads": "head", "latents": "latent"}.get(
            self.kind
        ):
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


def readers(groups: Iterable[SourceGroup], stage: int) -> int:
    """Number of sources that a reader at a stage sees."""
    return sum(group.n for group in groups if group.stage <= stage)


def row_name(destination: Destination, row: int) -> str:
    """Return the name of a destination's row."""
    return destination.name if destination.heads is None else f"{destination.name}/head.{row}"
