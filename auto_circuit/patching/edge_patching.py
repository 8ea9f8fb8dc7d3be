"""Running circuits of edges, exactly.

| patch type | input | edges of the circuit carry | other edges carry |
|---|---|---|---|
| `tree` | the clean prompts | the clean run | the ablation of the corrupt prompts |
| `edge` | the corrupt prompts | the ablation of the clean prompts (`resample`: their run) | the corrupt run |

An edge carries to its reader what its source wrote; every other reader of that source sees what its own edge
carries. With all edges patched the run is the other run; with none it is its own. Circuits may be fractional
(an edge in half carries the mean of both) and, as tensors that require gradients, differentiable.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from auto_circuit.data.prompts import PromptBatch, PromptDataset
from auto_circuit.errors import InputError, unknown_name
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.edge_ends import END
from auto_circuit.graph.prune_scores import Circuit, PruneScores
from auto_circuit.model_utils.block_wiring import Block
from auto_circuit.patching.ablations import Ablation, Ablator, AnyAblation, GraphRecorder
from auto_circuit.patching.mixing import Differences, Mix, plan_circuit
from auto_circuit.patching.sources import Source, SourceValues
from auto_circuit.patching.stream_run import StreamRun


class PatchType(StrEnum):
    """Which run is patched with which (see the module's docstring)."""

    TREE = "tree"
    EDGE = "edge"

    @classmethod
    def named(cls, name: "str | PatchType") -> "PatchType":
        """Return the patch type called `name`, or an error that lists them."""
        if name not in set(cls):
            raise unknown_name("patch type", str(name), set(cls))
        return cls(name)


class PatchedRun(StreamRun):
    """A forward pass whose readers read what their edges carry.

    Args:
        graph: the graph.
        sources: its sources.
        mixes: what each reading place reads, from `plan_circuit`.
        patch: what patched edges carry.
        differentiable: whether masks have gradients.
    """

    def __init__(
        self,
        graph: CircuitGraph,
        sources: Mapping[str, Source],
        mixes: Mapping[str, Mix],
        patch: SourceValues,
        *,
        differentiable: bool = False,
    ) -> None:
        super().__init__(graph, sources, differentiable=differentiable)
        self.mixes = mixes
        self.differences = Differences(self, sources, patch, in_place=not differentiable)
        self._read: dict[int, Tensor] = {}

    def read_attention(self, block: Block, part: str, projected: Tensor) -> Tensor | None:
        """Give each touched head its own queries, keys or values."""
        mix = self.mixes.get(f"blocks.{block.layer}.attn")
        if mix is None:
            return None
        projection = getattr(block, part)
        n_heads = len(projection.weight)
        rows = _rows(block, part, n_heads, len(mix.rows)).to(mix.rows.device)
        heads = mix.touched.to(rows.device)[rows].nonzero().flatten()
        if not len(heads):
            return None
        if block.layer not in self._read:
            x = self.streams[2 * block.layer]
            self._read[block.layer] = block.attn_norm(mix.apply(self.differences, 2 * block.layer, x))
        new = projection(self._read[block.layer][mix.rows[rows[heads]]], heads)
        if part == "v":
            del self._read[block.layer]
        new = new.to(projected.dtype)
        if len(heads) == n_heads:
            return new.reshape(projected.shape)
        out = projected.reshape(*projected.shape[:2], n_heads, -1)
        return out.index_copy(2, heads, new).reshape(projected.shape)

    def read_mlp(self, block: Block, stage: int, x: Tensor) -> Tensor | None:
        """Give the MLP what its edges carry."""
        mix = self.mixes.get(f"blocks.{block.layer}.mlp")
        return None if mix is None else mix.apply(self.differences, stage, x)[0]

    def read_end(self, stage: int, x: Tensor) -> Tensor | None:
        """Give the final norm what its edges carry."""
        mix = self.mixes.get(END)
        return None if mix is None else mix.apply(self.differences, stage, x)[0]


def _rows(block: Block, part: str, n_heads: int, n_rows: int) -> Tensor:
    """Return the row that each head of a projection reads: q, k, v rows, or one for all three."""
    n_q, n_kv = len(block.q.weight), len(block.k.weight)
    heads = torch.arange(n_heads)
    if n_rows == n_q + 2 * n_kv:
        return heads + {"q": 0, "k": n_q, "v": n_q + n_kv}[part]
    return heads // (n_q // n_kv) if part == "q" else heads


def circuit_logits(
    graph: Any,
    prompts: PromptDataset,
    circuits: Sequence[Any],
    *,
    patch_type: str | PatchType = PatchType.TREE,
    ablation: AnyAblation = Ablation.RESAMPLE,
    batch_size: int = 32,
    progress: bool = True,
) -> Iterator[tuple[PromptBatch, int, Tensor]]:
    """Yield (batch, number of the circuit, logits `[batch, vocab]` at the last position).

    What circuits share is computed once: the ablation of each batch, and each circuit's plan. Arguments and
    errors as for `run_circuits`.
    """
    kind = PatchType.named(patch_type)
    checked = [_checked(graph, circuit) for circuit in circuits]
    check_prompts(graph, prompts)
    recorder = GraphRecorder(graph)
    learning = any(kept.requires_grad for circuit in checked for kept in circuit.kept.values())
    plans: list[dict[str, Mix] | None] = [None] * len(checked)
    ablator = Ablator(recorder, prompts, ablation, batch_size)
    with tqdm(total=len(prompts) * len(checked), unit="run", disable=not progress) as bar:
        for batch in prompts.batches(batch_size, graph.device):
            other, tokens = ("corrupt", batch.clean) if kind is PatchType.TREE else ("clean", batch.corrupt)
            patch = SourceValues(ablator.patches(batch, other))
            for i, circuit in enumerate(checked):
                mixes = plans[i]
                if mixes is None:
                    with torch.set_grad_enabled(learning):
                        mixes = plan_circuit(graph.layout, _patched(circuit, kind), graph.device)
                    plans[i] = mixes
                run = PatchedRun(graph, recorder.sources, mixes, patch, differentiable=learning)
                with torch.set_grad_enabled(learning):
                    logits = run(tokens)
                yield batch, i, logits
                bar.update(len(batch))


def run_circuits(
    graph: Any,
    prompts: PromptDataset,
    circuits: Any,
    sizes: Sequence[int] | None = None,
    *,
    patch_type: str | PatchType = PatchType.TREE,
    ablation: AnyAblation = Ablation.RESAMPLE,
    signed: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> list[Tensor]:
    """Run circuits and return their logits at the last position.

    Args:
        graph: the graph.
        prompts: prompt pairs.
        circuits: a sequence of `Circuit`s (`scores.top(k)`, or of tensors, fractional or with gradients);
            or `PruneScores`, with `sizes`.
        sizes: numbers of edges to keep, for scores.
        patch_type: `tree` or `edge` (see the module's docstring).
        ablation: an `Ablation`, its name, or values that a `GraphRecorder` recorded.
        signed: rank scores by score instead of absolute score.
        batch_size: prompts in a pass.
        progress: show a bar.

    Returns:
        For each circuit, logits `[n_prompts, vocab]` in the order of the dataset.

    Raises:
        InputError: for circuits of another graph, sizes out of range, or prompts of another length than a
            graph with positions has.
        UnknownNameError: for an unknown patch type or ablation.
    """
    if not isinstance(graph, CircuitGraph):
        raise InputError(f"Circuits run on a graph: CircuitGraph(model). Given {type(graph).__name__}.")
    if isinstance(circuits, PruneScores):
        circuits = [circuits.top(k, signed=signed) for k in checked_sizes(sizes, len(circuits))]
    elif sizes is not None:
        raise InputError("sizes go with PruneScores; circuits have their own.")
    circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    rows: list[dict[int, Tensor]] = [{} for _ in circuits]
    runs = circuit_logits(
        graph,
        prompts,
        circuits,
        patch_type=patch_type,
        ablation=ablation,
        batch_size=batch_size,
        progress=progress,
    )
    with graph.running():
        for batch, i, logits in runs:
            with torch.set_grad_enabled(logits.requires_grad):
                rows[i].update(zip(batch.idxs.tolist(), logits, strict=True))
    collected: list[Tensor] = []
    for by_prompt in rows:
        with torch.set_grad_enabled(by_prompt[0].requires_grad):
            collected.append(torch.stack([by_prompt[i] for i in range(len(prompts))]))
    return collected


def checked_sizes(sizes: Sequence[int] | None, n: int) -> list[int]:
    """Return sizes of circuits, or an error that says which are possible."""
    given = list(sizes) if sizes is not None else []
    if not given or any(int(size) != size or not 0 <= size <= n for size in given):
        raise InputError(f"sizes must be numbers of edges from 0 to {n:,}, at least one; given {given}.")
    return [int(size) for size in given]


def _patched(circuit: Circuit, kind: PatchType) -> dict[str, Tensor]:
    """Return how much of the patch each edge carries."""
    if kind is PatchType.EDGE:
        return dict(circuit.kept)
    return {
        n: 1 - kept.to(torch.promote_types(kept.dtype, torch.float32)) for n, kept in circuit.kept.items()
    }


def _checked(graph: CircuitGraph, circuit: Any) -> Circuit:
    if not isinstance(circuit, Circuit):
        raise InputError(f"Expected a Circuit, such as scores.top(100); given {type(circuit).__name__}.")
    if not circuit.layout.same_as(graph.layout):
        raise InputError(
            f"This circuit is of another graph ({circuit.layout.n_edges:,} edges) than the one given "
            f"({graph.n_edges:,} edges). Score again after pruning or changing SAEs or positions."
        )
    return circuit


def check_prompts(graph: CircuitGraph, prompts: PromptDataset) -> None:
    """Refuse prompts of another length than a graph with positions has.

    Raises:
        InputError: naming the lengths.
    """
    lengths = sorted(set(prompts.lengths))
    if graph.seq_len is not None and lengths != [graph.seq_len]:
        raise InputError(
            f"Edges of this graph are for each of {graph.seq_len} positions; the prompts have {lengths} "
            f"tokens. Choose prompts of one length (prompts.subset), or a graph without per_position."
        )
