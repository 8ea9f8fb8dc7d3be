"""Faithfulness of circuits of nodes or edges over their size (Marks et al. 2024).

`f(C) = (m(C) − m(∅)) / (m(M) − m(∅))`, with `m` the mean objective over prompts, `M` the plain model,
`∅` everything ablated, and `C` the best nodes or edges kept while the others are ablated. In circuits of
nodes, components without SAEs always stay. 1: the circuit does what the model does; 0: no better than none.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from auto_circuit.data.prompts import PromptBatch, PromptDataset
from auto_circuit.errors import InputError
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.nodes import NodeScores
from auto_circuit.graph.prune_scores import PruneScores
from auto_circuit.metrics.objectives import Objective, evaluate, logit_diff
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import AutoencoderTransformer
from auto_circuit.patching.ablations import (
    Ablation,
    Ablator,
    AnyAblation,
    SiteRecorder,
    ablation_name,
    site_patches,
)
from auto_circuit.patching.edge_patching import PatchType, circuit_logits
from auto_circuit.patching.node_patching import last_logits, run_nodes

#: Sizes of edge circuits, as shares of all edges (those of the MIB benchmark).
EDGE_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class FaithfulnessCurve:
    """How faithful circuits of growing size are.

    Attributes:
        sizes: number of nodes or edges kept.
        faithfulness: `f(C)` at each size.
        objective: `m(C)` at each size.
        full: `m(M)`, of the plain model.
        empty: `m(∅)`, with everything ablated.
        n_prompts: number of prompts.
        ablation: what is written instead.
        error_nodes: whether errors are nodes (else reconstructions stand for the activations).
        signed: whether they were ranked by score rather than by absolute score.
        unit: `nodes` or `edges`.
        patch_type: `tree` (the clean run, its complement ablated) or `edge`.
    """

    sizes: list[int]
    faithfulness: list[float]
    objective: list[float]
    full: float
    empty: float
    n_prompts: int
    ablation: str
    error_nodes: bool
    signed: bool
    unit: str = "nodes"
    patch_type: str = "tree"

    def smallest(self, faithfulness: float) -> int | None:
        """Return the smallest measured size as faithful as asked; None when none is.

        Faithfulness above 1 is an overshoot, not better than the model: .9 means from .9 to 1.1.
        """
        near = 1 - faithfulness + 1e-9
        return next(
            (k for k, f in zip(self.sizes, self.faithfulness, strict=True) if abs(1 - f) <= near), None
        )


def default_sizes(n_nodes: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, … below `n_nodes`, and `n_nodes`."""
    decades = range(math.ceil(math.log10(n_nodes)) + 1) if n_nodes > 0 else ()
    grid = [digit * 10**power for power in decades for digit in (1, 2, 5)]
    return [size for size in grid if size < n_nodes] + [n_nodes]


def faithfulness_curve(
    model: Any,
    scores: Any,
    prompts: PromptDataset,
    objective: Objective = logit_diff,
    *,
    ablation: AnyAblation = Ablation.RESAMPLE,
    patch_type: str | PatchType = PatchType.TREE,
    sizes: Sequence[int] | None = None,
    signed: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> FaithfulnessCurve:
    """Keep the k best nodes or edges, ablate the rest, for each k.

    Args:
        model: for `NodeScores` the model with SAEs, with error nodes exactly when the scores have them; for
            `PruneScores` the graph.
        scores: what ranks nodes or edges.
        prompts: the behaviour, best other prompts than the scores were made of.
        objective: `(logits, batch) -> [batch]`.
        ablation: what ablated nodes or edges write.
        patch_type: `tree` or `edge`, for edges; `edge` goes with `resample` alone.
        sizes: the values of k; None: for nodes 1, 2, 5, 10, … and all; for edges the shares of `EDGE_SHARES`.
        signed: rank by score instead of absolute score.
        batch_size: prompts in a pass.
        progress: show a bar.

    Raises:
        InputError: for sizes out of range, scores of other SAEs or another graph, or an objective that
            ablating everything does not change.
    """
    of_edges = isinstance(scores, PruneScores)
    unit = "edges" if of_edges else "nodes"
    _check_asked(model, scores, ablation, patch_type)
    _check_lengths(scores, prompts)
    sizes = _curve_sizes(sizes, len(scores), unit)
    every = [0, *sizes]
    options = {"ablation": ablation, "batch_size": batch_size, "progress": progress}
    if of_edges:
        circuits = [scores.top(size, signed=signed) for size in every]
        runs = circuit_logits(model, prompts, circuits, patch_type=patch_type, **options)
        context, plain = model.running(), model.plain_logits
    else:
        _check_scores(model, scores)
        runs = _node_runs(model, scores, prompts, every, signed, **options)
        context, plain = model.spliced(), partial(_plain, model)
    totals = torch.zeros(len(every) + 1, dtype=torch.float64)
    references: dict[int, Tensor] = {}
    with context:
        for batch, i, logits in runs:
            first = int(batch.idxs[0])
            new = first not in references
            if new:
                references = {first: plain(batch.clean)}
            batch = batch.with_reference(references[first])
            if new:
                totals[-1] += evaluate(objective, references[first], batch).double().sum().cpu()
            totals[i] += evaluate(objective, logits, batch).double().sum().cpu()
    empty, *values, full = (totals / len(prompts)).tolist()
    _check_values(empty, values, full, unit)
    return FaithfulnessCurve(
        sizes=list(sizes),
        faithfulness=[(value - empty) / (full - empty) for value in values],
        objective=values,
        full=full,
        empty=empty,
        n_prompts=len(prompts),
        ablation=ablation_name(ablation),
        error_nodes=model.error_nodes,
        signed=signed,
        unit=unit,
        patch_type=str(PatchType.named(patch_type)) if of_edges else str(PatchType.TREE),
    )


def _check_asked(model: Any, scores: Any, ablation: AnyAblation, patch_type: str | PatchType) -> None:
    """Refuse scores that do not go with the model, and ablations that do not go with the patch type."""
    of_edges = isinstance(scores, PruneScores)
    fits = isinstance(model, CircuitGraph if of_edges else AutoencoderTransformer)
    if not isinstance(scores, PruneScores | NodeScores) or not fits:
        raise InputError(
            f"NodeScores go with the model that sae_model returned, PruneScores with their CircuitGraph; "
            f"given {type(scores).__name__} with {type(model).__name__}."
        )
    of_corrupt = of_edges and PatchType.named(patch_type) is PatchType.EDGE
    if of_corrupt and ablation_name(ablation) != Ablation.RESAMPLE:
        raise InputError(
            "With patch_type 'edge' circuits carry the ablation of the clean prompts: only 'resample' "
            "gives the model itself when all edges are kept; use patch_type 'tree' for other ablations."
        )


def _curve_sizes(sizes: Sequence[int] | None, n: int, unit: str) -> list[int]:
    """Return the sizes of a curve, in order."""
    shares = sorted({max(1, round(share * n)) for share in EDGE_SHARES})
    standard = shares if unit == "edges" else default_sizes(n)
    asked = standard if sizes is None else sorted(set(sizes))
    if not asked or asked[0] < 0 or asked[-1] > n or any(int(size) != size for size in asked):
        raise InputError(f"sizes must be numbers of {unit} from 0 to {n}; given {asked}.")
    return asked


def _plain(spliced: AutoencoderTransformer, tokens: Tensor) -> Tensor:
    """Return the plain model's logits at the last position."""
    with torch.no_grad(), spliced.with_error_nodes(True):
        return last_logits(spliced, tokens, {})


def _node_runs(
    spliced: AutoencoderTransformer,
    scores: NodeScores,
    prompts: PromptDataset,
    sizes: Sequence[int],
    signed: bool,
    *,
    ablation: AnyAblation,
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[PromptBatch, int, Tensor]]:
    """Yield (batch, number of the size, logits) with the best nodes kept."""
    ranking = scores.ranking(signed=signed)
    masks = [scores.masks(ranking[:size]) for size in sizes]
    ablator = Ablator(SiteRecorder(spliced), prompts, ablation, batch_size)
    with tqdm(total=len(prompts) * len(masks), unit="run", disable=not progress) as bar:
        for batch in prompts.batches(batch_size, spliced.device):
            patches = site_patches(ablator.patches(batch))
            for i, mask in enumerate(masks):
                yield batch, i, run_nodes(spliced, batch, mask, patches)
                bar.update(len(batch))


def _check_lengths(scores: Any, prompts: PromptDataset) -> None:
    """Refuse prompts of other lengths than node scores per position have (`circuit_logits` checks edges)."""
    if isinstance(scores, PruneScores) or not scores.per_position:
        return
    lengths = sorted(set(prompts.lengths))
    scored = next(iter(scores.sites.values())).latents.shape[0]
    if lengths != [scored]:
        raise InputError(
            f"These scores are for each of {scored} positions; the prompts have {lengths} tokens. Score and "
            f"measure on prompts of one length."
        )


def _check_values(empty: float, values: Sequence[float], full: float, unit: str) -> None:
    if not all(math.isfinite(value) for value in (empty, *values, full)):
        raise InputError(
            "The objective is not finite on these prompts: the model or an SAE gives NaN or infinity. Check "
            "their weights, and try float32."
        )
    if math.isclose(full, empty, rel_tol=1e-6, abs_tol=1e-9):
        raise InputError(
            f"Ablating all {unit} leaves the objective at {full:.6g}, so faithfulness is not defined. "
            f"Choose sites, an ablation or prompts that matter to the objective."
        )


def _check_scores(spliced: AutoencoderTransformer, scores: NodeScores) -> None:
    """Refuse scores that are not of the nodes that this spliced model has."""
    has = {name: sae.latent_ids.cpu() for name, sae in spliced.saes.items()}
    same = set(has) == set(scores.sites) and all(
        scored.latents.shape[-1] == has[name].shape[-1]
        and torch.equal(scored.latent_ids, has[name].expand_as(scored.latent_ids))
        and (scored.error is not None) == spliced.error_nodes
        for name, scored in scores.sites.items()
    )
    if not same:
        ours = {name: ids.shape[-1] for name, ids in has.items()}
        theirs = {name: scored.latents.shape[-1] for name, scored in scores.sites.items()}
        raise InputError(
            f"These scores are of other nodes than this model has. Model: {ours}, error nodes "
            f"{spliced.error_nodes}; scores: {theirs}, error nodes "
            f"{all(scored.error is not None for scored in scores.sites.values())}. Score again after "
            f"pruning or changing SAEs."
        )
