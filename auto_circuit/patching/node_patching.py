"""Running a spliced model with some nodes kept and the rest ablated, exactly.

With error nodes, a site that keeps latents `m` (1 kept, 0 ablated) and its error, or not, puts out

- error kept:    `x + Σ (1 − mᵢ)(c′ᵢ − cᵢ)Dᵢ`
- error ablated: `x′ + Σ mᵢ(cᵢ − c′ᵢ)Dᵢ`

where `x, c` are of the current run and `x′, c′` the patch. Everything kept is `x` itself and everything
ablated is `x′` itself, bit for bit. Without error nodes: the reconstruction `+ Σ (1 − mᵢ)(c′ᵢ − cᵢ)Dᵢ`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from auto_circuit.data.prompts import PromptBatch
from auto_circuit.graph.nodes import SiteMask
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import AutoencoderTransformer
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.patching.ablations import SitePatch

Edit = Callable[[Tensor, Tensor], Tensor]


def keep_only(sae: SparseAutoencoder, mask: SiteMask, patch: SitePatch) -> Edit | None:
    """Return the edit that keeps the nodes in `mask` and ablates the site's others; None: nothing to do.

    Args:
        sae: the site's SAE; whether it has error nodes is read when the edit runs.
        mask: which nodes are kept.
        patch: what the others become.
    """
    latents = mask.latents.to(sae.bias.device)
    error = None if mask.error is None else mask.error.to(sae.bias.device)
    if bool(latents.all()) and (error is None or bool(error.all())):
        return None

    def edit(x: Tensor, out: Tensor) -> Tensor:
        own = x.to(sae.bias.dtype)
        if not sae.error_nodes or error is None:
            change = ~latents * (patch.coefficients - sae.coefficients(own))
            return out + sae.write(change).to(out.dtype)
        if not error.any() and not latents.any():
            return patch.x.to(x.dtype).expand_as(x)
        difference = patch.coefficients - sae.coefficients(own)
        kept = x + sae.write(~latents * difference).to(x.dtype) if error.any() else x
        if error.all():
            return kept
        ablated = (patch.x - sae.write(latents * difference)).to(x.dtype).expand_as(x)
        return torch.where(error.unsqueeze(-1), kept, ablated)

    return edit


def last_logits(spliced: AutoencoderTransformer, tokens: Tensor, edits: Mapping[str, Edit | None]) -> Tensor:
    """Run `tokens [batch, seq]` with edits at some sites; return the last position's logits."""
    with spliced.edits({name: edit for name, edit in edits.items() if edit is not None}):
        return spliced.model(tokens)[:, -1]


def plain_logits(spliced: AutoencoderTransformer, batch: PromptBatch) -> Tensor:
    """Return the plain model's last-position logits on the clean prompts, `[batch, vocab]`."""
    with torch.no_grad(), spliced.with_error_nodes(True):
        return last_logits(spliced, batch.clean, {})


def run_nodes(
    spliced: AutoencoderTransformer,
    batch: PromptBatch,
    masks: Mapping[str, SiteMask],
    patches: Mapping[str, SitePatch],
) -> Tensor:
    """Run the clean prompts with only the nodes in `masks`; return the last position's logits.

    Args:
        spliced: the model with SAEs.
        batch: prompts.
        masks: site → kept nodes; a site that is not named keeps all.
        patches: site → what ablated nodes become.

    Returns:
        Logits `[batch, vocab]`.
    """
    edits = {name: keep_only(spliced.saes[name], mask, patches[name]) for name, mask in masks.items()}
    with torch.no_grad():
        return last_logits(spliced, batch.clean, edits)
