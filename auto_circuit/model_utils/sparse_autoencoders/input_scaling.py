"""How an SAE scales each token before encoding, and what undoes it after decoding.

An SAE with a scaling reads `x̂ = (x − shift) / divisor` and writes `r·scale + shift`, where `r` is
its reconstruction of `x̂`. A latent's coefficient is then latent·scale, and the bias part
`bias·scale + shift` differs from token to token, so it counts to the error node.

Dataset-wide scalings need no class: they are folded into the weights when loading.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from auto_circuit.errors import CheckpointError


class Scaled(NamedTuple):
    """A scaled input and what undoes the scaling.

    Attributes:
        x: the input as the encoder reads it, `[…, n_inputs]`.
        scale: factor from reconstruction to output, `[…, 1]`.
        shift: offset of the output, `[…, 1]`.
    """

    x: Tensor
    scale: Tensor
    shift: Tensor


class InputScaling(nn.Module):
    """Base of the scalings: one number each, kept in the state dict so that it says its kind."""

    kind: ClassVar[str] = ""
    setting: ClassVar[str] = ""

    def __init__(self, value: float | Tensor) -> None:
        super().__init__()
        self.register_buffer(self.setting, torch.tensor(float(value)))

    def forward(self, x: Float[Tensor, "*batch n_inputs"]) -> Scaled:
        """Scale each token of `x`."""
        raise NotImplementedError


class LayerNormScaling(InputScaling):
    """Each token centred and divided by its unbiased standard deviation plus `eps`.

    As OpenAI's TopK SAEs and SAELens' `layer_norm`; the output is multiplied by the standard
    deviation alone.
    """

    kind = "layer_norm"
    setting = "eps"

    def forward(self, x: Float[Tensor, "*batch n_inputs"]) -> Scaled:
        """Scale each token of `x`."""
        shift = x.mean(-1, keepdim=True)
        centred = x - shift
        scale = centred.std(-1, keepdim=True)
        return Scaled(centred / (scale + self.get_buffer("eps")), scale, shift)


class ConstantNormScaling(InputScaling):
    """Each token brought to the norm `norm` (SAELens' `constant_norm_rescale`: √n_inputs)."""

    kind = "constant_norm"
    setting = "norm"

    def forward(self, x: Float[Tensor, "*batch n_inputs"]) -> Scaled:
        """Scale each token of `x`."""
        norm = x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)  # a zero token stays zero
        scale = norm / self.get_buffer("norm")
        return Scaled(x / scale, scale, torch.zeros_like(scale))


SCALINGS: dict[str, type[InputScaling]] = {cls.kind: cls for cls in (LayerNormScaling, ConstantNormScaling)}


def scaling_from_tensors(tensors: Mapping[str, Tensor]) -> InputScaling | None:
    """Build the scaling whose setting is the one tensor given; none given: no scaling.

    Raises:
        CheckpointError: when no scaling has that setting.
    """
    if not tensors:
        return None
    for cls in SCALINGS.values():
        if set(tensors) == {cls.setting}:
            return cls(tensors[cls.setting])
    known = {cls.kind: cls.setting for cls in SCALINGS.values()}
    raise CheckpointError(
        f"No input scaling has the settings {sorted(tensors)}. Known scalings and theirs: {known}."
    )
