"""One score for every edge, and the circuits that scores choose.

A score is, to first order, `objective(kept) − objective(ablated)`, mean over prompts: positive means that
the edge helps. Scores and circuits are one tensor for each destination, `[(seq,) (heads,) n_sources]`, and
know their edges by name without the model.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from auto_circuit.errors import InputError
from auto_circuit.files import write_json, write_tensors
from auto_circuit.graph.edge_ends import Edge
from auto_circuit.graph.edge_layout import EdgeLayout

FORMAT = "auto_circuit edge scores 1"


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of edges, or a degree of belonging for every edge.

    Attributes:
        layout: which edges there are.
        kept: destination → `[(seq,) (heads,) n_sources]`: 1 in the circuit, 0 not, or between; other values
            extrapolate.
    """

    layout: EdgeLayout
    kept: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.layout.check(self.kept, "A circuit")
        for name, kept in self.kept.items():
            if kept.is_complex() or (kept.is_floating_point() and not bool(kept.isfinite().all())):
                raise InputError(f"A circuit's weights of edges into {name} are not finite real numbers.")

    @classmethod
    def of(cls, layout: EdgeLayout, edges: Any) -> "Circuit":
        """Make the circuit of some edges.

        Args:
            layout: which edges there are.
            edges: their numbers, names or `Edge`s; or a mask, a bool tensor `[n_edges]`.

        Raises:
            UnknownNameError: for a name of no node.
            InputError: for a number or name of no edge, or anything else.
        """
        if not isinstance(edges, Tensor) and hasattr(edges, "__array__"):
            edges = torch.as_tensor(edges)
        if isinstance(edges, Tensor) and edges.dtype == torch.bool:
            return cls(layout, layout.split(edges))
        if isinstance(edges, str) or (isinstance(edges, Tensor) and edges.is_floating_point()):
            raise InputError(
                "Circuit.of takes a sequence of edges (numbers, names) or a bool mask of all; for degrees of "
                "belonging give Circuit(layout, layout.split(tensor))."
            )
        flat = torch.zeros(layout.n_edges, dtype=torch.bool)
        numbers = edges if isinstance(edges, Tensor) else [_number(layout, edge) for edge in edges]
        chosen = torch.as_tensor(numbers, dtype=torch.long).cpu()
        wrong = chosen[(chosen < 0) | (chosen >= layout.n_edges)]
        if len(wrong):
            raise InputError(f"Edges are numbered 0 to {layout.n_edges - 1:,}; given {int(wrong[0])}.")
        if len(chosen) == layout.n_edges > 2 and int(chosen.max()) <= 1:
            raise InputError("A mask of all edges must be a bool tensor; numbers 0 and 1 are edges 0 and 1.")
        flat[chosen] = True
        return cls(layout, layout.split(flat))

    @property
    def n_edges(self) -> int:
        """Number of edges that belong to it at all."""
        return sum(int((kept != 0).sum()) for kept in self.kept.values())

    def __len__(self) -> int:
        return self.n_edges

    def indices(self) -> Tensor:
        """Numbers of its edges, in order."""
        return torch.cat(
            [
                (self.kept[d.name].detach().flatten() != 0).nonzero().flatten().cpu()
                + self.layout.slice_of(d.name).start
                for d in self.layout.destinations
            ]
        )

    def edges(self) -> Iterator[Edge]:
        """Yield its edges one by one."""
        return (self.layout.edge(int(i)) for i in self.indices())


def _number(layout: EdgeLayout, edge: Any) -> int:
    """Return the number of an edge, given by number, name or as an object."""
    if isinstance(edge, Edge):
        return layout.edge_index(edge.name)
    if isinstance(edge, str):
        return layout.edge_index(edge)
    try:
        number: Any = str(edge) if isinstance(edge, bool) else edge
        return index(number)
    except TypeError as error:
        raise InputError(f"Edges are given by number or name; given {edge!r}.") from error


class PruneScores:
    """One score for every edge of a graph.

    Args:
        layout: which edges there are.
        scores: destination → `[(seq,) (heads,) n_sources]`; copied, so that these scores stay as they are.
        copy: False: keep these very tensors where they are float32 on the CPU.

    Raises:
        InputError: for tensors that do not fit the layout, or scores that are not finite.
    """

    def __init__(self, layout: EdgeLayout, scores: Mapping[str, Tensor], *, copy: bool = True) -> None:
        layout.check(scores, "Scores")
        self.layout = layout
        self.scores = {
            d.name: scores[d.name].detach().to("cpu", torch.float32, copy=copy) for d in layout.destinations
        }
        for name, values in self.scores.items():
            if not bool(values.isfinite().all()):
                raise InputError(
                    f"Scores of edges into {name} are not finite. Where attribution made them, weights or "
                    f"the objective give NaN or infinity: check them, and try float32."
                )

    def __len__(self) -> int:
        return self.layout.n_edges

    def __getitem__(self, edge: str | int) -> float:
        """Return the score of an edge, by name or by number."""
        destination, within = self.layout.place(_number(self.layout, edge))
        return float(self.scores[destination.name].flatten()[within])

    def __iter__(self) -> Iterator[Edge]:
        """Yield every edge with its score, by number."""
        return (self.layout.edge(i, self[i]) for i in range(len(self)))

    def flat(self) -> Tensor:
        """Every edge's score by number, `[n_edges]`."""
        return torch.cat([values.flatten() for values in self.scores.values()])

    # ---- choosing --------------------------------------------------------------------------------

    def top_indices(self, k: int | float, *, signed: bool = False) -> Tensor:
        """Return the numbers of the `k` best edges, best first; ties go to the lower number.

        Args:
            k: how many; more than all: all.
            signed: rank by score instead of absolute score.
        """
        if k < 0 or int(k) != k:
            raise InputError(f"The number of edges is a whole number from 0; given {k}.")
        values = self.flat() if signed else self.flat().abs_()
        k = min(int(k), len(values))
        if k == 0:
            return torch.zeros(0, dtype=torch.long)
        if k * 20 < len(values):  # the k-th value, piece by piece: topk of everything takes gigabytes
            pieces = [piece.topk(min(k, len(piece))).values for piece in values.split(max(k, 2**22))]
            cut = torch.cat(pieces).topk(k).values[-1]
        else:
            cut = values.kthvalue(len(values) - k + 1).values
        above = (values > cut).nonzero().flatten()
        ties = (values == cut).nonzero().flatten()[: k - len(above)]
        chosen = torch.cat([above, ties]).sort().values
        return chosen[values[chosen].argsort(descending=True, stable=True)]

    def top(self, k: int, *, signed: bool = False) -> Circuit:
        """Return the circuit of the `k` best edges; ties go to the lower number."""
        return Circuit.of(self.layout, self.top_indices(k, signed=signed))

    def threshold(self, value: float | int, *, signed: bool = False) -> Circuit:
        """Return the circuit of all edges whose (absolute) score is at least `value`."""
        kept = {name: (s if signed else s.abs()) >= value for name, s in self.scores.items()}
        return Circuit(self.layout, kept)

    def edges(self, k: int, *, signed: bool = False) -> list[Edge]:
        """Return the `k` best edges as objects, with their scores, best first."""
        flat = self.flat()
        return [self.layout.edge(int(i), float(flat[i])) for i in self.top_indices(k, signed=signed)]

    # ---- arithmetic ------------------------------------------------------------------------------

    def __add__(self, other: Any) -> "PruneScores":
        if not isinstance(other, PruneScores):
            return NotImplemented
        self._same(other)
        return PruneScores(self.layout, {n: s + other.scores[n] for n, s in self.scores.items()})

    def __radd__(self, other: Any) -> "PruneScores":
        return self if isinstance(other, int) and other == 0 else NotImplemented  # what sum() starts from

    def __mul__(self, factor: float | int) -> "PruneScores":
        return PruneScores(self.layout, {n: s * factor for n, s in self.scores.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "PruneScores":
        return self * -1

    def __sub__(self, other: Any) -> "PruneScores":
        return self + -other if isinstance(other, PruneScores) else NotImplemented

    def __truediv__(self, divisor: float | int) -> "PruneScores":
        return self * (1 / divisor)

    def normalised(self) -> "PruneScores":
        """Return these scores divided by the sum of their absolute values (all zero: unchanged)."""
        total = sum(float(s.abs().sum(dtype=torch.float64)) for s in self.scores.values())
        return self * (1 / total if total else 1.0)

    def rank_correlation(self, other: "PruneScores", *, signed: bool = True) -> float:
        """Return Spearman's correlation of the two rankings, ties at their mean rank.

        NaN when one of the two has equal scores everywhere.
        """
        self._same(other)
        pair = [s.flat() if signed else s.flat().abs() for s in (self, other)]
        ranks = torch.stack([_mean_ranks(values) for values in pair])
        return float(torch.corrcoef(ranks)[0, 1])

    def jaccard(self, other: "PruneScores", k: int, *, signed: bool = False) -> float:
        """Return how much the two top-k circuits overlap: edges in both over edges in either."""
        self._same(other)
        ours, theirs = (set(s.top_indices(k, signed=signed).tolist()) for s in (self, other))
        return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0

    def node_scores(self, *, absolute: bool = True) -> dict[str, Tensor]:
        """Return a score for every source: the sum over its outgoing edges.

        Args:
            absolute: sum absolute scores, so that edges of both signs do not cancel.

        Returns:
            Group of sources → `[(seq,) n]`, in the order of `EdgeLayout.groups`.
        """
        seq = () if self.layout.seq_len is None else (self.layout.seq_len,)
        totals = torch.zeros(*seq, self.layout.n_sources, dtype=torch.float64)
        for destination in self.layout.destinations:
            values = self.scores[destination.name].double()
            values = values.abs() if absolute else values
            values = values.sum(-2) if destination.heads is not None else values
            totals[..., : destination.n_sources] += values
        starts = self.layout.group_starts
        return {
            g.name: totals[..., starts[g.name] : starts[g.name] + g.n].float() for g in self.layout.groups
        }

    def _same(self, other: "PruneScores") -> None:
        if not self.layout.same_as(other.layout):
            raise InputError(
                f"These scores are of different graphs ({len(self):,} and {len(other):,} edges); only scores "
                f"of one graph can be compared or added."
            )

    # ---- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write `path` (safetensors, one tensor for each destination) and beside it `.json`, the layout."""
        path = _checked(path)
        layout = self.layout.describe()
        write_tensors(path, dict(self.scores), {"layout": _digest(layout)})
        write_json(path.with_suffix(".json"), {"format": FORMAT, **layout})

    @classmethod
    def load(cls, path: str | Path) -> "PruneScores":
        """Read what `save` wrote; no model is needed.

        Raises:
            InputError: for files that are missing, damaged, or hold something else.
        """
        path = _checked(path)
        beside = path.with_suffix(".json")
        try:
            with safe_open(str(path), "pt") as file:
                digest = (file.metadata() or {}).get("layout")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(
                f"{path} and {beside.name} hold no edge scores ({error}); expected what save wrote."
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{beside} does not describe edge scores ({FORMAT!r}).")
        layout = EdgeLayout.from_description(content)
        if digest != _digest(layout.describe()):
            raise InputError(
                f"{path} and {beside.name} were not saved together, so its edges have no names. Restore the "
                f"two files of one save."
            )
        return cls(layout, tensors)


def _checked(path: str | Path) -> Path:
    if Path(path).suffix != ".safetensors":
        raise InputError(f"Edge scores are kept in NAME.safetensors and NAME.json; given {path}.")
    return Path(path)


def _digest(description: Mapping[str, Any]) -> str:
    text = json.dumps(description, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _mean_ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
