"""Dense versions of what the package computes, with plain TransformerLens hooks on the plain model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from auto_circuit import SparseAutoencoder


def parts(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients `[…, n]` and error `[…, d]` of `x`, for an SAE that does not scale its input."""
    pre = (x - sae.bias) @ sae.encode_weight.T + sae.latent_bias
    c = sae.activation(pre)
    return c, x - c @ sae.decode_weight.T - sae.bias


def inputs_of(model: Any, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    return {name: cache[name] for name in names}


def dense_run(
    model: Any,
    tokens: Tensor,
    saes: Mapping[str, SparseAutoencoder],
    rebuild: Callable[[str, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Last-position logits when each site becomes `rebuild(name, x, coefficients, error)`."""

    def hook_for(name: str) -> Callable[..., Tensor]:
        return lambda x, hook: rebuild(name, x, *parts(saes[name], x))

    return model.run_with_hooks(tokens, fwd_hooks=[(name, hook_for(name)) for name in saes])[:, -1]
