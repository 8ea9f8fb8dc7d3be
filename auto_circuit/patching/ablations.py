"""What an ablated node writes instead: of the corrupt prompt, nothing, or a mean.

A site's nodes are its coefficients `c` and its error `e`, with `x = Σ cᵢDᵢ + b + e`. A patch is what the
coefficients become and what the input of the SAE would then be, from which the patched error follows:
`e = x − Σ cᵢDᵢ − b`. The bias is a constant and is never ablated.

| ablation | coefficients | input |
|---|---|---|
| `resample` | of the corrupt prompt | of the corrupt prompt |
| `zero` | 0 | the constant bias |
| `mean` | mean over the corrupt prompts of the same length, per position | the same mean |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from auto_circuit.data.prompts import PromptBatch, PromptDataset
from auto_circuit.errors import unknown_name
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import AutoencoderTransformer
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder


class Ablation(StrEnum):
    """What ablated nodes write (see the module's docstring)."""

    RESAMPLE = "resample"
    ZERO = "zero"
    MEAN = "mean"

    @classmethod
    def named(cls, name: "str | Ablation") -> "Ablation":
        """Return the ablation called `name`, or an error that lists them."""
        if name not in set(cls):
            raise unknown_name("ablation", str(name), set(cls))
        return cls(name)


@dataclass(frozen=True)
class SitePatch:
    """What a site's nodes become when ablated.

    Attributes:
        coefficients: `[batch or 1, seq or 1, n_latents]`.
        x: the SAE's input made of them, `[batch or 1, seq or 1, n_inputs]`.
    """

    coefficients: Float[Tensor, "batch seq n_latents"]
    x: Float[Tensor, "batch seq n_inputs"]


def site_inputs(
    spliced: AutoencoderTransformer, tokens: Int[Tensor, "batch seq"]
) -> dict[str, Float[Tensor, "batch seq n_inputs"]]:
    """Run `tokens` without gradients and return every SAE's input, in the SAE's dtype."""
    inputs: dict[str, Tensor] = {}

    def recorder(name: str, sae: SparseAutoencoder):
        def record(x: Tensor, out: Tensor) -> Tensor:
            inputs[name] = x.detach().to(sae.bias.dtype)
            return out

        return record

    edits = {name: recorder(name, sae) for name, sae in spliced.saes.items()}
    with torch.no_grad(), spliced.edits(edits):
        spliced.model(tokens, **spliced.only_needed_layers())
    return inputs


class Ablator:
    """Makes the patches of each batch.

    Args:
        spliced: the model with SAEs.
        prompts: the dataset that means are taken over.
        ablation: which one.
        batch_size: for the pass that takes the means.
    """

    def __init__(
        self,
        spliced: AutoencoderTransformer,
        prompts: PromptDataset,
        ablation: str | Ablation,
        batch_size: int = 32,
    ) -> None:
        self.spliced = spliced
        self.ablation = Ablation.named(ablation)
        self._means: dict[int, dict[str, SitePatch]] = {}
        if self.ablation is Ablation.MEAN:
            self._means = self._take_means(prompts, batch_size)

    @torch.no_grad()
    def patches(self, batch: PromptBatch) -> Mapping[str, SitePatch]:
        """Return every site's patch for a batch."""
        if self.ablation is Ablation.MEAN:
            return self._means[batch.clean.shape[1]]
        if self.ablation is Ablation.ZERO:
            return {name: _zero(sae) for name, sae in self.spliced.saes.items()}
        return self._patches_of(site_inputs(self.spliced, batch.corrupt))

    def _patches_of(self, inputs: Mapping[str, Tensor]) -> dict[str, SitePatch]:
        return {name: SitePatch(self.spliced.saes[name].coefficients(x), x) for name, x in inputs.items()}

    @torch.no_grad()
    def _take_means(self, prompts: PromptDataset, batch_size: int) -> dict[int, dict[str, SitePatch]]:
        sums: dict[int, dict[str, SitePatch]] = {}
        counts: dict[int, int] = {}
        for batch in prompts.batches(batch_size, self.spliced.device):
            length = batch.clean.shape[1]
            patches = self._patches_of(site_inputs(self.spliced, batch.corrupt))
            before = sums.get(length)
            counts[length] = counts.get(length, 0) + len(batch)
            sums[length] = {
                name: SitePatch(
                    _add(patch.coefficients, before[name].coefficients if before else None),
                    _add(patch.x, before[name].x if before else None),
                )
                for name, patch in patches.items()
            }
        return {
            length: {
                name: SitePatch(patch.coefficients / counts[length], patch.x / counts[length])
                for name, patch in by_site.items()
            }
            for length, by_site in sums.items()
        }


def _add(value: Tensor, total: Tensor | None) -> Tensor:
    summed = value.sum(0, keepdim=True, dtype=torch.promote_types(value.dtype, torch.float32))
    return summed if total is None else total + summed


def _zero(sae: SparseAutoencoder) -> SitePatch:
    bias = sae.constant_bias.detach()
    shape = (1, sae.seq_len or 1)
    return SitePatch(bias.new_zeros(*shape, sae.n_latents), bias.expand(*shape, -1))
