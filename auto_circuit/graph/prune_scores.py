"""One score for every edge, and the circuits that scores choose.

A score is, to first order, `objective(kept) − objective(ablated)`, mean over prompts: positive means that
the edge helps. Scores and circuits are one tensor for each destination, `[(seq,) (heads,) n_sources]`, and
know their edges by name without the model.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from auto_circuit.errors import InputError
from auto_circuit.files import write_json, write_tensors
from auto_circuit.graph.edge_layout import Edge, EdgeLayout

FORMAT = "auto_circuit edge scores 1"


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of edges, or a degree of belonging for every edge.

    Attributes:
        layout: which edges there are.
        kept: destination → `[(seq,) (heads,) n_sources]`: 1 in the circuit, 0 not, or between.
    """

    layout: EdgeLayout
    kept: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.layout.check(self.kept, "A circuit")

    @classmethod
    def of(cls, layout: EdgeLayout, edges: "Tensor | list[int] | list[str]") -> "Circuit":
        """Make the circuit of edges given by number or by name.

        Raises:
            UnknownNameError: for a name of no node; InputError: for a number or name of no edge.
        """
        given = edges.tolist() if isinstance(edges, Tensor) else edges
        numbers = [layout.edge_index(edge) if isinstance(edge, str) else edge for edge in given]
        flat = torch.zeros(layout.n_edges, dtype=torch.bool)
        index = torch.tensor(numbers, dtype=torch.long)
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= layout.n_edges):
            raise InputError(f"Edges are numbered 0 to {layout.n_edges - 1:,}; given {int(index.max())}.")
        flat[index] = True
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


class PruneScores:
    """One score for every edge of a graph.

    Args:
        layout: which edges there are.
        scores: destination → `[(seq,) (heads,) n_sources]`.

    Raises:
        InputError: for tensors that do not fit the layout, or scores that are not finite.
    """

    def __init__(self, layout: EdgeLayout, scores: Mapping[str, Tensor]) -> None:
        layout.check(scores, "Scores")
        self.layout = layout
        self.scores = {d.name: scores[d.name].detach().float().cpu() for d in layout.destinations}
        for name, values in self.scores.items():
            if not bool(values.isfinite().all()):
                raise InputError(
                    f"Scores of edges into {name} are not finite: the model, an SAE or the objective gives "
                    f"NaN or infinity on these prompts. Check its weights, and try float32."
                )

    def __len__(self) -> int:
        return self.layout.n_edges

    def __getitem__(self, edge: str | int) -> float:
        """Return the score of an edge, by name or by number."""
        index = self.layout.edge_index(edge) if isinstance(edge, str) else edge
        self.layout.edge(index)
        return float(self.flat()[index])

    def flat(self) -> Tensor:
        """Every edge's score by number, `[n_edges]`."""
        return torch.cat([values.flatten() for values in self.scores.values()])

    # ---- choosing --------------------------------------------------------------------------------

    def top_indices(self, k: int, *, signed: bool = False) -> Tensor:
        """Return the numbers of the `k` best edges, best first; ties go to the lower number.

        Args:
            k: how many, up to all.
            signed: rank by score instead of absolute score.
        """
        values = self.flat() if signed else self.flat().abs()
        k = min(max(int(k), 0), len(values))
        if k == 0:
            return torch.zeros(0, dtype=torch.long)
        cut = values.kthvalue(len(values) - k + 1).values
        above = (values > cut).nonzero().flatten()
        ties = (values == cut).nonzero().flatten()[: k - len(above)]
        chosen = torch.cat([above, ties]).sort().values
        return chosen[values[chosen].argsort(descending=True, stable=True)]

    def top(self, k: int, *, signed: bool = False) -> Circuit:
        """Return the circuit of the `k` best edges; ties go to the lower number."""
        return Circuit.of(self.layout, self.top_indices(k, signed=signed))

    def threshold(self, value: float, *, signed: bool = False) -> Circuit:
        """Return the circuit of all edges whose (absolute) score is at least `value`."""
        kept = {name: (s if signed else s.abs()) >= value for name, s in self.scores.items()}
        return Circuit(self.layout, kept)

    def edges(self, k: int, *, signed: bool = False) -> list[Edge]:
        """Return the `k` best edges as objects, with their scores, best first."""
        flat = self.flat()
        return [self.layout.edge(int(i), float(flat[i])) for i in self.top_indices(k, signed=signed)]

    # ---- arithmetic ------------------------------------------------------------------------------

    def __add__(self, other: "PruneScores") -> "PruneScores":
        self._same(other)
        return PruneScores(self.layout, {n: s + other.scores[n] for n, s in self.scores.items()})

    def __mul__(self, factor: float) -> "PruneScores":
        return PruneScores(self.layout, {n: s * factor for n, s in self.scores.items()})

    __rmul__ = __mul__

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
        write_tensors(path, dict(self.scores))
        write_json(path.with_suffix(".json"), {"format": FORMAT, **self.layout.describe()})

    @classmethod
    def load(cls, path: str | Path) -> "PruneScores":
        """Read what `save` wrote; no model is needed.

        Raises:
            InputError: for files that are missing, damaged, or hold something else.
        """
        path = _checked(path)
        beside = path.with_suffix(".json")
        try:
            tensors = load_file(path)
            content = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(
                f"{path} and {beside.name} hold no edge scores ({error}); expected what save wrote."
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{beside} does not describe edge scores ({FORMAT!r}).")
        return cls(EdgeLayout.from_description(content), tensors)


def _checked(path: str | Path) -> Path:
    if Path(path).suffix != ".safetensors":
        raise InputError(f"Edge scores are kept in NAME.safetensors and NAME.json; given {path}.")
    return Path(path)


def _mean_ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
