"""What turns an encoder's pre-activations into latents: one small class for each kind.

| class | formula, for a pre-activation `p` | tensors |
|---|---|---|
| `ReLU` | `max(p, 0)` | none |
| `TopK` | the `k` largest `p` of each token where positive, else 0 | `k` |
| `JumpReLU` | `p` where `p > threshold` and `p > 0`, else 0 | `threshold` |
| `Gated` | `max(p·exp(r_mag) + mag_bias, 0)` where `p + gate_bias > 0` | `gate_bias, r_mag, mag_bias` |

BatchTopK and Matryoshka SAEs are published as JumpReLU. Sources: Gao et al. 2024 (TopK),
Rajamanoharan et al. 2024a and b (Gated, JumpReLU).

TopK latents *compete*: whether one is active depends on the others. All other kinds are
independent, so dropping some latents leaves the rest as they were.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from auto_circuit.errors import CheckpointError, InputError
from auto_circuit.model_utils.sparse_autoencoders.latent_index import take_latents


class LatentActivation(nn.Module):
    """Base of the kinds: an elementwise (or, for TopK, per-token) map with a few tensors."""

    kind: ClassVar[str] = ""
    tensors: ClassVar[tuple[str, ...]] = ()
    competes: ClassVar[bool] = False

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "LatentActivation":
        """Build the activation from its own tensors, named as in `tensors`."""
        return cls(**{name: tensors[name] for name in cls.tensors})

    @property
    def width(self) -> int | None:
        """The number of latents that the tensors are for; None when any number will do."""
        return None

    def forward(self, pre: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        """Map pre-activations to latents."""
        raise NotImplementedError

    def pruned(self, idxs: Int[Tensor, "*seq k"]) -> "LatentActivation":
        """Return the activation of the latents `idxs [k]` or `[seq, k]` alone."""
        del idxs
        return self


class ReLU(LatentActivation):
    """`max(p, 0)`."""

    kind = "relu"

    def forward(self, pre: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        """Map pre-activations to latents, in their place: a second tensor as large costs a tenth more."""
        return torch.relu_(pre)


class TopK(LatentActivation):
    """The `k` largest pre-activations of each token, where positive (Gao et al. 2024)."""

    kind = "topk"
    tensors = ("k",)
    competes = True

    def __init__(self, k: int | Tensor) -> None:
        super().__init__()
        if int(k) < 1:
            raise InputError(f"TopK needs k ≥ 1 active latents per token; given k = {int(k)}.")
        self.register_buffer("k", torch.tensor(int(k)))
        self.size = int(k)  # the same number, kept so that no forward has to read a tensor
        self.register_load_state_dict_post_hook(_read_size)

    def forward(self, pre: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        """Map pre-activations to latents."""
        values, idxs = pre.topk(min(self.size, pre.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, idxs, torch.relu(values))


def _read_size(module: nn.Module, _incompatible: object) -> None:
    """Keep `TopK.size` equal to its tensor after a state dict was loaded."""
    if isinstance(module, TopK):
        module.size = int(module.get_buffer("k"))


class _PerLatent(LatentActivation):
    """An activation whose tensors are `[(seq,) n_latents]` each."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        if len(set(shapes.values())) != 1:
            raise InputError(f"{type(self).__name__}: its tensors must share one shape: {shapes}.")
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))

    @property
    def width(self) -> int:
        """The number of latents that the tensors are for."""
        return self.get_parameter(self.tensors[0]).shape[-1]

    def pruned(self, idxs: Int[Tensor, "*seq k"]) -> "LatentActivation":
        """Return the activation of the latents `idxs [k]` or `[seq, k]` alone."""
        old = {name: self.get_parameter(name).detach() for name in self.tensors}
        return self.from_tensors(
            {name: take_latents(value, idxs, value.ndim == 2) for name, value in old.items()}
        )


class JumpReLU(_PerLatent):
    """`p` where it exceeds a threshold of its own (Rajamanoharan et al. 2024b)."""

    kind = "jumprelu"
    tensors = ("threshold",)

    def __init__(self, threshold: Float[Tensor, "*seq n_latents"]) -> None:
        super().__init__(threshold=threshold)

    def forward(self, pre: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        """Map pre-activations to latents. The threshold gets no gradient here."""
        return torch.relu(pre) * (pre > self.get_parameter("threshold"))


class Gated(_PerLatent):
    """A gate that decides and a rescaled copy that measures (Rajamanoharan et al. 2024a).

    Its tensors are `[(seq,) n_latents]` each.
    """

    kind = "gated"
    tensors = ("gate_bias", "r_mag", "mag_bias")

    def __init__(
        self,
        gate_bias: Tensor,
        r_mag: Tensor,
        mag_bias: Tensor,
    ) -> None:
        super().__init__(gate_bias=gate_bias, r_mag=r_mag, mag_bias=mag_bias)

    def forward(self, pre: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        """Map pre-activations to latents."""
        gate_bias, r_mag, mag_bias = (self.get_parameter(name) for name in self.tensors)
        return torch.relu(pre * r_mag.exp() + mag_bias) * (pre + gate_bias > 0)


ACTIVATIONS: dict[str, type[LatentActivation]] = {cls.kind: cls for cls in (ReLU, TopK, JumpReLU, Gated)}


def activation_from_tensors(tensors: Mapping[str, Tensor]) -> LatentActivation:
    """Build the activation whose tensor names are exactly those given (none: ReLU).

    Raises:
        CheckpointError: when no kind has these tensors.
    """
    for cls in ACTIVATIONS.values():
        if set(cls.tensors) == set(tensors):
            return cls.from_tensors(tensors)
    kinds = {kind: list(cls.tensors) for kind, cls in ACTIVATIONS.items()}
    raise CheckpointError(
        f"No latent activation has the tensors {sorted(tensors)}. Known kinds and theirs: {kinds}."
    )
