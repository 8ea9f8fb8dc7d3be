"""Node attribution: how much every latent and every error of every site helps, in two passes.

For a node with value `v` in the clean run and `v′` when ablated, the score is, summed over tokens,

    attribution:           (v − v′)·∂m/∂v                      at the clean run
    integrated gradients:  (v − v′)·mean over α of ∂m/∂v       one site at a time, all of its nodes at
                                                               v′ + α(v − v′), α by `ig_rule` (paths.py)

mean over prompts; positive means that the node helps. With `g` the gradient at the site's output, a
latent's derivative is `⟨g, Dᵢ⟩` and the error's is `g`, so no gradient runs through an encoder or a
decoder and one backward pass serves all nodes of all sites. With error nodes a site's output is its
input, so `g` passes later sites as if they were not there (the pass-through of Marks et al. 2024).

Cost: attribution one clean forward and backward, and one corrupt forward for resampling; integrated
gradients `sites × steps` forwards and backwards. Scores of sites in series describe the same information
twice: never add them.

Sources: Nanda 2023 (attribution patching), Marks et al. 2024 (sparse feature circuits),
Sundararajan et al. 2017 (integrated gradients).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from auto_circuit.data.prompts import PromptBatch, PromptDataset
from auto_circuit.errors import InputError, unknown_name
from auto_circuit.graph.nodes import Node, NodeScores, SiteMask, SiteScores
from auto_circuit.metrics.objectives import Objective, evaluate, logit_diff
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import AutoencoderTransformer
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.patching.ablations import (
    Ablation,
    Ablator,
    SitePatch,
    SiteRecorder,
    site_inputs,
    site_patches,
)
from auto_circuit.patching.node_patching import last_logits, plain_logits, run_nodes
from auto_circuit.prune_algos.paths import largest_gradient, path_points, refuse_vanished
from auto_circuit.prune_algos.reader_gradients import gradients_of, own_view


def node_attribution(
    spliced: AutoencoderTransformer,
    prompts: PromptDataset,
    objective: Objective = logit_diff,
    *,
    ablation: str | Ablation = Ablation.RESAMPLE,
    per_position: bool = False,
    ig_steps: int | None = None,
    ig_rule: str = "midpoint",
    batch_size: int = 32,
    progress: bool = True,
) -> NodeScores:
    """Score every latent and every error of every site (formula: the module's docstring).

    Args:
        spliced: the model with SAEs; without error nodes, latents alone are scored, in the model that
            the reconstructions make.
        prompts: the behaviour.
        objective: `(logits, batch) -> [batch]`, larger is better.
        ablation: what an ablated node writes.
        per_position: a score for each node at each token position; prompts of one length only. SAEs
            pruned per position need it.
        ig_steps: number of points for integrated gradients; None: plain attribution.
        ig_rule: where the points lie.
        batch_size: prompts in a pass.
        progress: show a bar.

    Raises:
        InputError: for prompts of several lengths per position, fewer than one step, an objective that is
            not one number for each prompt or whose gradient vanishes at the clean run (plain attribution),
            or scores that are not finite.
        UnknownNameError: for an unknown ablation or rule.
    """
    points = path_points(1 if ig_steps is None else ig_steps, ig_rule, "ig_steps")
    if any(sae.seq_len is not None for sae in spliced.saes.values()) and not per_position:
        raise InputError("SAEs pruned per position have other latents at each: set per_position=True.")
    if per_position and len(set(prompts.lengths)) > 1:
        raise InputError(
            f"per_position needs prompts of one length; these have {sorted(set(prompts.lengths))} tokens. "
            f"Choose prompts of one length, for example with prompts.subset."
        )
    rounds = 1 if ig_steps is None else len(points) * len(spliced.saes)
    with (
        torch.inference_mode(False),
        spliced.spliced(),
        tqdm(total=len(prompts) * rounds, unit="prompt", disable=not progress) as bar,
    ):
        totals = {
            name: _Total(sae, spliced.error_nodes, per_position, prompts)
            for name, sae in spliced.saes.items()
        }
        ablator = Ablator(SiteRecorder(spliced), prompts, ablation, batch_size)
        largest = 0.0
        for batch in prompts.batches(batch_size, spliced.device):
            patches = site_patches(ablator.patches(batch))
            if ig_steps is None:
                found, size = _gradients(spliced, batch, objective)
                largest = max(largest, size)
                for name, (x, gradient) in found.items():
                    totals[name].add(x, gradient, patches[name])
                bar.update(len(batch))
                continue
            inputs = site_inputs(spliced, batch.clean)
            batch = batch.with_reference(partial(plain_logits, spliced, batch))
            for name in spliced.saes:
                gradient = _path_gradient(spliced, batch, objective, name, patches[name], points)
                totals[name].add(inputs[name], gradient, patches[name])
                bar.update(len(batch) * len(points))
    if ig_steps is None:
        refuse_vanished(objective, largest, "plain attribution")
    scores = NodeScores({name: total.scores() for name, total in totals.items()})
    for name, site in scores.sites.items():
        if not (site.latents.isfinite().all() and (site.error is None or site.error.isfinite().all())):
            raise InputError(
                f"Scores at {name} are not finite: the model, the SAE or the objective gives NaN or infinity "
                f"on these prompts. Check its weights, and try float32."
            )
    return scores


def exact_node_effects(
    spliced: AutoencoderTransformer,
    prompts: PromptDataset,
    nodes: Sequence[Node],
    objective: Objective = logit_diff,
    *,
    ablation: str | Ablation = Ablation.RESAMPLE,
    batch_size: int = 32,
    progress: bool = True,
) -> list[float]:
    """Return what ablating each node alone costs: `objective(clean) − objective(node ablated)`.

    The exact check of attribution, at one forward pass for each node and batch.

    Args:
        spliced: the model with SAEs.
        prompts: the behaviour.
        nodes: which nodes, such as `scores.top(20)`.
        objective: `(logits, batch) -> [batch]`.
        ablation: what the node writes instead.
        batch_size: prompts in a pass.
        progress: show a bar.

    Raises:
        UnknownNameError: for a site without an SAE, or an unknown ablation.
        InputError: for a node that this model does not have (any more).
    """
    for node in nodes:
        _check_node(node, spliced, prompts)
    effects = [0.0] * len(nodes)
    with spliced.spliced(), tqdm(total=len(nodes) * len(prompts), disable=not progress) as bar:
        ablator = Ablator(SiteRecorder(spliced), prompts, ablation, batch_size)
        for batch in prompts.batches(batch_size, spliced.device):
            patches = site_patches(ablator.patches(batch))
            plain = plain_logits(spliced, batch)
            batch = batch.with_reference(plain)
            unpatched = plain if spliced.error_nodes else run_nodes(spliced, batch, {}, patches)
            clean = evaluate(objective, unpatched, batch)
            for i, node in enumerate(nodes):
                mask = {node.site: _all_but(node, spliced, batch.clean.shape[1])}
                ablated = evaluate(objective, run_nodes(spliced, batch, mask, patches), batch)
                effects[i] += float((clean - ablated).double().sum()) / len(prompts)
                bar.update(len(batch))
    return effects


def _check_node(node: Node, spliced: AutoencoderTransformer, prompts: PromptDataset) -> None:
    """Refuse a node that this spliced model does not have, also one of before a pruning."""
    if node.site not in spliced.saes:
        raise unknown_name("site with an SAE", node.site, spliced.saes)
    sae = spliced.saes[node.site]
    length = sae.seq_len or min(prompts.lengths)
    fits = node.position is None or 0 <= node.position < length
    if node.latent is None:
        fits = fits and spliced.error_nodes
    else:
        fits = (
            fits and 0 <= node.latent < sae.n_latents and (sae.seq_len is None or node.position is not None)
        )
        if fits:
            ids = sae.latent_ids if sae.latent_ids.ndim == 1 else sae.latent_ids[node.position]
            fits = int(ids[node.latent]) == node.latent_id
    if not fits:
        raise InputError(
            f"{node.name} (index {node.latent}) is no node of this model: {node.site} has {sae.n_latents} "
            f"latents{', an error' if spliced.error_nodes else ', no error node'} and prompts of at least "
            f"{length} tokens. Take nodes from scores made after pruning or changing SAEs."
        )


def _all_but(node: Node, spliced: AutoencoderTransformer, seq_len: int) -> SiteMask:
    """Return the mask that keeps every node of a site but one."""
    sae = spliced.saes[node.site]
    by_position = [] if node.position is None else [seq_len]
    latents = torch.ones(*by_position, sae.n_latents, dtype=torch.bool)
    error = torch.ones(by_position, dtype=torch.bool)
    where = () if node.position is None else (node.position,)
    if node.latent is None:
        error[where] = False
    else:
        latents[(*where, node.latent)] = False
    return SiteMask(latents, error)


def _gradients(
    spliced: AutoencoderTransformer, batch: PromptBatch, objective: Objective
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Return every site's input and the gradient at its output, from one clean pass.

    The number beside them is the largest gradient at the logits, summed over the vocabulary.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def tap(name: str, x: Tensor, out: Tensor) -> Tensor:
        inputs[name] = x.detach().to(spliced.saes[name].bias.dtype)
        outputs[name] = own_view(out)
        return outputs[name]

    with torch.enable_grad():
        logits = last_logits(spliced, batch.clean, {name: partial(tap, name) for name in spliced.saes})
        # With error nodes and nothing patched these logits are the plain model's.
        reference = logits.detach() if spliced.error_nodes else partial(plain_logits, spliced, batch)
        batch = batch.with_reference(reference)
        *gradients, at_logits = gradients_of(objective, logits, batch, list(outputs.values()))
    largest = largest_gradient(objective, at_logits)
    by_site = zip(outputs, gradients, strict=True)
    return {name: (inputs[name], g.to(inputs[name].dtype)) for name, g in by_site}, largest


def _path_gradient(
    spliced: AutoencoderTransformer,
    batch: PromptBatch,
    objective: Objective,
    name: str,
    patch: SitePatch,
    points: Sequence[tuple[float, float]],
) -> Tensor:
    """Return the gradient at one site's output, averaged while all its nodes go from patch to clean."""
    sae = spliced.saes[name]
    gradients: list[Tensor] = []
    leaf: list[Tensor] = []

    def edit(alpha: float, x: Tensor, out: Tensor) -> Tensor:
        with torch.no_grad():
            if sae.error_nodes:
                start = patch.x.to(out.dtype)
            else:
                now = sae.coefficients(x.to(sae.bias.dtype))
                start = out + sae.write(patch.coefficients - now).to(out.dtype)
            point = start + alpha * (out - start)
        leaf[:] = [point.detach().requires_grad_()]
        return leaf[0]

    for alpha, weight in points:
        with torch.enable_grad():
            logits = last_logits(spliced, batch.clean, {name: partial(edit, alpha)})
            gradient = gradients_of(objective, logits, batch, leaf)[0]
        gradients.append(weight * gradient.to(sae.bias.dtype))
    return torch.stack(gradients).sum(0)


class _Total:
    """Adds up one site's scores over batches, in float64."""

    def __init__(
        self, sae: SparseAutoencoder, error_nodes: bool, per_position: bool, prompts: PromptDataset
    ) -> None:
        self.sae = sae
        self.error_nodes = error_nodes
        self.n_prompts = len(prompts)
        shape = [prompts.lengths[0]] if per_position else []
        self.dims = (0,) if per_position else (0, 1)
        self.latents = torch.zeros(*shape, sae.n_latents, dtype=torch.float64)
        self.error = torch.zeros(shape, dtype=torch.float64)
        self.ids = sae.latent_ids.cpu().expand(*shape, -1)

    @torch.no_grad()
    def add(self, x: Tensor, gradient: Tensor, patch: SitePatch) -> None:
        """Add a batch: `x, gradient [batch, seq, n_inputs]`."""
        change = self.sae.coefficients(x) - patch.coefficients
        derivative = self.sae.read(gradient).float()
        latents = (change.float() * derivative).sum(self.dims, dtype=torch.float64).cpu()
        # Σ over latents of the scores is ⟨g, write(change)⟩; the rest of the input's change is the error's.
        whole = (gradient.float() * (x - patch.x).float()).sum(-1).sum(self.dims, dtype=torch.float64).cpu()
        self.latents += latents
        self.error += whole - latents.sum(-1)

    def scores(self) -> SiteScores:
        """Return the mean over prompts."""
        error = (self.error / self.n_prompts).float() if self.error_nodes else None
        return SiteScores((self.latents / self.n_prompts).float(), error, self.ids)
