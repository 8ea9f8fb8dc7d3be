"""Faithfulness of node circuits over their size (Marks et al. 2024).

`f(C) = (m(C) − m(∅)) / (m(M) − m(∅))`, with `m` the mean objective over prompts, `M` the plain model,
`∅` every node of every site ablated, and `C` the best nodes kept while the other nodes are ablated.
Components without SAEs always stay. 1: the circuit does what the model does; 0: no better than no nodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from auto_circuit.data.prompts import PromptDataset
from auto_circuit.errors import InputError
from auto_circuit.graph.nodes import NodeScores, SiteMask
from auto_circuit.metrics.objectives import Objective, evaluate, logit_diff
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import AutoencoderTransformer
from auto_circuit.patching.ablations import Ablation, Ablator, SiteRecorder, site_patches
from auto_circuit.patching.node_patching import plain_logits, run_nodes


@dataclass(frozen=True)
class FaithfulnessCurve:
    """How faithful circuits of growing size are.

    Attributes:
        sizes: number of nodes kept.
        faithfulness: `f(C)` at each size.
        objective: `m(C)` at each size.
        full: `m(M)`, of the plain model.
        empty: `m(∅)`, with every node ablated.
        n_prompts: number of prompts.
        ablation: what ablated nodes write.
        error_nodes: whether errors are nodes (else reconstructions stand for the activations).
        signed: whether nodes were ranked by score rather than by absolute score.
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
    spliced: AutoencoderTransformer,
    scores: NodeScores,
    prompts: PromptDataset,
    objective: Objective = logit_diff,
    *,
    ablation: str | Ablation = Ablation.RESAMPLE,
    sizes: Sequence[int] | None = None,
    signed: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> FaithfulnessCurve:
    """Keep the k best nodes, ablate the rest, for each k.

    Args:
        spliced: the model with SAEs, with error nodes exactly when the scores have them.
        scores: what ranks nodes.
        prompts: the behaviour, best other prompts than the scores were made of.
        objective: `(logits, batch) -> [batch]`.
        ablation: what ablated nodes write.
        sizes: the values of k; None: 1, 2, 5, 10, … and all.
        signed: rank by score instead of absolute score.
        batch_size: prompts in a pass.
        progress: show a bar.

    Raises:
        InputError: for sizes out of range, scores of other SAEs, or an objective that ablating every
            node does not change.
    """
    _check_scores(spliced, scores)
    lengths = sorted(set(prompts.lengths))
    scored = next(iter(scores.sites.values())).latents.shape[0]
    if scores.per_position and lengths != [scored]:
        raise InputError(
            f"These scores are for each of {scored} positions; the prompts have {lengths} tokens. Score and "
            f"measure on prompts of one length."
        )
    n_nodes = len(scores)
    sizes = default_sizes(n_nodes) if sizes is None else sorted(set(sizes))
    if not sizes or sizes[0] < 0 or sizes[-1] > n_nodes or any(int(size) != size for size in sizes):
        raise InputError(f"sizes must be numbers of nodes from 0 to {n_nodes}; given {sizes}.")
    ranking = scores.ranking(signed=signed)
    every = [0, *sizes]
    totals = torch.zeros(len(every) + 1, dtype=torch.float64)
    with spliced.spliced(), tqdm(total=len(prompts) * len(totals), disable=not progress) as bar:
        ablator = Ablator(SiteRecorder(spliced), prompts, ablation, batch_size)
        masks = [_masks(scores, ranking, size) for size in every]
        for batch in prompts.batches(batch_size, spliced.device):
            patches = site_patches(ablator.patches(batch))
            plain = plain_logits(spliced, batch)
            batch = batch.with_reference(plain)
            totals[-1] += evaluate(objective, plain, batch).double().sum().cpu()
            bar.update(len(batch))
            for i, mask in enumerate(masks):
                logits = run_nodes(spliced, batch, mask, patches)
                totals[i] += evaluate(objective, logits, batch).double().sum().cpu()
                bar.update(len(batch))
    empty, *values, full = (totals / len(prompts)).tolist()
    if not all(math.isfinite(value) for value in (empty, *values, full)):
        raise InputError(
            "The objective is not finite on these prompts: the model or an SAE gives NaN or infinity. Check "
            "their weights, and try float32."
        )
    if math.isclose(full, empty, rel_tol=1e-6, abs_tol=1e-9):
        raise InputError(
            f"Ablating every node leaves the objective at {full:.6g}, so faithfulness is not defined. "
            f"Choose sites, an ablation or prompts that matter to the objective."
        )
    return FaithfulnessCurve(
        sizes=list(sizes),
        faithfulness=[(value - empty) / (full - empty) for value in values],
        objective=values,
        full=full,
        empty=empty,
        n_prompts=len(prompts),
        ablation=ablator.name,
        error_nodes=spliced.error_nodes,
        signed=signed,
    )


def _masks(scores: NodeScores, ranking: torch.Tensor, size: int) -> dict[str, SiteMask]:
    return scores.masks(ranking[:size])


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
