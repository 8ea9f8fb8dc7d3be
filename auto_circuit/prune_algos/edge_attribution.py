"""Edge attribution: how much every edge helps, to first order, from a few passes.

An edge's score is `Σ_tokens ⟨c_s − p_s, ∂m/∂in_r⟩`, mean over prompts, with `c_s` what its source writes,
`p_s` what it would write ablated, and the gradient at its reader alone. Positive: the edge helps. Methods
differ in where the gradient is taken:

| method | gradient | passes for a batch |
|---|---|---|
| `eap` | at the clean run | 1 |
| `clean-corrupt` | mean of the clean and the corrupt run's | 2 |
| `mask` | where every edge carries `mask_value` of the patch | 1 |
| `mask-ig` | mean over mask values from 0 to 1; all scores sum to the objective's change | steps |
| `ig-inputs` | mean over stream starts between patch and clean | steps |
| `ig-activations` | of a component's edges: mean over its outputs from patch to clean | steps × components |

and one forward pass for the ablation. Where the points of a path lie is said by `ig_rule` (paths.py).

`mask-ig` needs many steps where the path bends: with `zero` ablation of a model with RMS norms and without
biases the stream only shrinks, so that all change lies at the very end; TopK and JumpReLU latents jump
without error nodes. Compare the sum of all scores with the change between `run_circuits` with all edges and
with none.

Sources: Syed et al. 2023 (EAP), Hanna et al. 2024 (EAP-IG), Miller et al. 2024 (mask gradients).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from auto_circuit.data.prompts import PromptBatch, PromptDataset
from auto_circuit.errors import InputError, unknown_name
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.edge_ends import START
from auto_circuit.graph.prune_scores import PruneScores
from auto_circuit.metrics.objectives import Objective, logit_diff
from auto_circuit.patching.ablations import Ablation, Ablator, AnyAblation, GraphRecorder
from auto_circuit.patching.edge_patching import check_prompts
from auto_circuit.patching.mixing import Differences
from auto_circuit.patching.sources import SourceValues
from auto_circuit.prune_algos.contraction import EdgeSums
from auto_circuit.prune_algos.memory import Need, chosen_batch_size
from auto_circuit.prune_algos.paths import largest_gradient, path_points, refuse_vanished
from auto_circuit.prune_algos.reader_gradients import GradientRun


@dataclass(frozen=True)
class _Point:
    """One run to differentiate.

    Attributes:
        run: the run.
        tokens: what it runs.
        weight: factor of its scores.
        current: what sources write at present; None: in the run itself.
        only: the one group whose edges it scores; None: all.
    """

    run: GradientRun
    tokens: Tensor
    weight: float = 1.0
    current: SourceValues | None = None
    only: str | None = None


@dataclass(frozen=True)
class _Path:
    """What a method makes its points of."""

    graph: CircuitGraph
    recorder: GraphRecorder
    batch: PromptBatch
    patch: SourceValues
    points: list[tuple[float, float]]
    mask_value: float

    def run(self, mask_value: float = 0.0, replace: dict[str, Callable[[Tensor], Tensor]] | None = None):
        """Make a run."""
        return GradientRun(
            self.graph, self.recorder.sources, mask_value=mask_value, patch=self.patch, replace=replace
        )

    def between(self, group: str, t: float) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return what moves a group's output from the patch (t = 0) to its own (t = 1)."""
        patched = self.patch.total(group) + self.recorder.sources[group].constant

        def move(out: Tensor) -> Tensor:
            return (patched + t * (out.detach() - patched)).expand_as(out)

        return {group: move}

    def clean(self) -> SourceValues:
        """What sources write in the clean run."""
        return SourceValues(self.recorder.record(self.batch.clean))


def _eap(path: _Path) -> Iterator[_Point]:
    yield _Point(path.run(), path.batch.clean)


def _clean_corrupt(path: _Path) -> Iterator[_Point]:
    clean = path.clean()
    for tokens in (path.batch.clean, path.batch.corrupt):
        yield _Point(path.run(), tokens, 0.5, clean)


def _mask(path: _Path) -> Iterator[_Point]:
    yield _Point(path.run(path.mask_value), path.batch.clean)


def _mask_ig(path: _Path) -> Iterator[_Point]:
    for t, weight in path.points:
        yield _Point(path.run(t), path.batch.clean, weight)


def _ig_inputs(path: _Path) -> Iterator[_Point]:
    clean = path.clean()
    for t, weight in path.points:
        yield _Point(path.run(replace=path.between(START, t)), path.batch.clean, weight, clean)


def _ig_activations(path: _Path) -> Iterator[_Point]:
    clean = path.clean()
    for group in path.graph.layout.groups:
        for t, weight in path.points:
            run = path.run(replace=path.between(group.name, t))
            yield _Point(run, path.batch.clean, weight, clean, group.name)


METHODS: dict[str, Callable[[_Path], Iterator[_Point]]] = {
    "eap": _eap,
    "clean-corrupt": _clean_corrupt,
    "mask": _mask,
    "mask-ig": _mask_ig,
    "ig-inputs": _ig_inputs,
    "ig-activations": _ig_activations,
}


def edge_attribution(
    graph: Any,
    prompts: Any,
    objective: Objective = logit_diff,
    *,
    method: Any = "eap",
    steps: int = 5,
    mask_value: float = 0.5,
    ig_rule: str = "midpoint",
    ablation: AnyAblation = Ablation.RESAMPLE,
    batch_size: int | None = None,
    memory_limit: float | None = None,
    progress: bool = True,
) -> PruneScores:
    """Score every edge (formula and methods: the module's docstring).

    Args:
        graph: the graph.
        prompts: the behaviour.
        objective: `(logits, batch) -> [batch]`, larger is better.
        method: a key of `METHODS`.
        steps: points of a path, for `mask-ig`, `ig-inputs`, `ig-activations`.
        mask_value: for `mask`: 0 is `eap`, 1 where every edge is ablated.
        ig_rule: where the points of a path lie.
        ablation: what an ablated edge carries.
        batch_size: prompts in a pass; None: as many as memory allows, up to 32.
        memory_limit: GiB that may be used; None: four fifths of what is free.
        progress: show a bar.

    Raises:
        InputError: for prompts of another length than a graph with positions has, an objective whose
            gradient vanishes where it is taken, scores that are not finite, options out of range, or a
            graph that does not fit into memory (naming the size and what would make it fit).
        UnknownNameError: for an unknown method or ablation.
    """
    if not isinstance(graph, CircuitGraph):
        raise InputError(f"Edges need a graph: CircuitGraph(model). Given {type(graph).__name__}.")
    if not isinstance(prompts, PromptDataset) or not callable(objective):
        raise InputError(
            f"edge_attribution takes (graph, prompts, objective): a PromptDataset and a callable; given "
            f"{type(prompts).__name__} and {type(objective).__name__}."
        )
    if not isinstance(method, str) or method not in METHODS:
        raise unknown_name("attribution method", str(method), METHODS)
    points = path_points(steps, ig_rule)
    if not 0 <= mask_value <= 1:
        raise InputError(f"mask_value is between 0 (the clean run) and 1 (all ablated); given {mask_value}.")
    check_prompts(graph, prompts)
    need = Need.of(graph, max(prompts.lengths), limit=memory_limit)
    batch_size = chosen_batch_size(need, batch_size, len(prompts))
    with torch.inference_mode(False), graph.running():
        recorder = GraphRecorder(graph)
        sums = EdgeSums(graph, recorder.sources, need.tokens_at_once(batch_size))
        ablator = Ablator(recorder, prompts, ablation, batch_size)
        largest = 0.0
        with tqdm(total=len(prompts), unit="prompt", disable=not progress) as bar:
            for batch in prompts.batches(batch_size, graph.device):
                patch = SourceValues(ablator.patches(batch))
                if method != "eap" or not graph.error_nodes:
                    batch = batch.with_reference(partial(graph.plain_logits, batch.clean))
                path = _Path(graph, recorder, batch, patch, points, mask_value)
                for point in METHODS[method](path):
                    gradients = point.run.gradients(point.tokens, batch, objective)
                    largest = largest_gradient(objective, gradients.logits, largest)
                    with torch.no_grad():
                        differences = Differences(point.current or point.run, recorder.sources, patch)
                        sums.add(gradients, differences, -point.weight, point.only)
                bar.update(len(batch))
        sums.flush()
    refuse_vanished(objective, largest, method)
    for scores in sums.sums.values():
        scores /= len(prompts)
    return PruneScores(graph.layout, sums.sums, copy=False)
