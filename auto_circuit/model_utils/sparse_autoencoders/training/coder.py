"""`Coder`: an SAE while it is trained, and what every architecture shares.

A coder reads activations scaled so that their mean norm is `√n_inputs`. With encoder rows `E`, directions
`D` (unit rows, unless the architecture leaves their norms free) and biases `b`, `c`:

1. pre-activations `p = (x − b)·Eᵀ + c`; the architecture says which entries take part, and their values `z`;
2. reconstruction `x̂ = Σ z·D + b`; its loss is the fraction of variance unexplained (FVU) of the batch,
   against the variance of the first activations seen, so that no coefficient depends on the data's scale;
3. the architecture's sparsity penalty, and
4. the auxiliary loss of Gao et al. 2024: latents that have not fired for `dead_after_tokens` try to
   explain what is left over, the most active ones of each row, which revives them.

All kinds are homogeneous, `f(s·x) = s·f(x)` with biases and thresholds scaled, so the scaling is folded into
biases and thresholds alone on export; directions stay unit rows, coefficients get the activation's units.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.model_utils.sparse_autoencoders.training.config import TrainingConfig
from auto_circuit.model_utils.sparse_autoencoders.training.processes import mean_over
from auto_circuit.model_utils.sparse_autoencoders.training.sparse_code import (
    Latents,
    SomeLatents,
    pre_activations,
)

#: Rows that data-dependent initial values are computed from.
_SAMPLE = 4_096
#: How fast the sparsity coefficient follows the logarithm of measured over wanted L0, a step.
_CONTROL_RATE = 0.02


class Coded(NamedTuple):
    """What an architecture makes of a batch.

    Attributes:
        code: which entries take part.
        values: their latents, with gradients.
        penalty: the sparsity penalty without its coefficient (a number), or None.
        more: further loss of this architecture (a number), or None.
    """

    code: Latents
    values: Tensor
    penalty: Tensor | None = None
    more: Tensor | None = None


class Losses(NamedTuple):
    """What a batch costs; each is a number, `fired` a flag for each latent.

    Attributes:
        total: what is minimised.
        fvu: `Σ‖x − x̂‖²` over the batch's size times the variance of the first activations seen.
        l0: mean number of active latents of a row.
        fired: which latents were active, `[n_latents]`.
    """

    total: Tensor
    fvu: Tensor
    l0: Tensor
    fired: Tensor


class Coder(nn.Module):
    """An SAE while it is trained: base of the architectures.

    Args:
        n_latents: number of latents.
        n_inputs: width of the activation.
        config: how to train.

    Attributes:
        kind: the architecture's name.
        learning_rate: what it takes unless the config says otherwise, for 2,048 latents.
        unit_directions: whether directions are kept at norm 1.
        controlled: whether the coefficient of the penalty follows the wanted L0.
    """

    kind: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 4e-3
    unit_directions: ClassVar[bool] = True
    controlled: bool = False

    scale: Tensor
    variance: Tensor
    coefficient: Tensor
    unfired_for: Tensor

    def __init__(self, n_latents: int, n_inputs: int, config: TrainingConfig) -> None:
        super().__init__()
        self.config = config
        self.n_latents, self.n_inputs = n_latents, n_inputs
        self.bias = nn.Parameter(torch.zeros(n_inputs))
        self.latent_bias = nn.Parameter(torch.zeros(n_latents))
        self.encode_weight = nn.Parameter(torch.zeros(n_latents, n_inputs))
        self.directions = nn.Parameter(torch.zeros(n_latents, n_inputs))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("coefficient", torch.tensor(self.first_coefficient))
        self.register_buffer("unfired_for", torch.zeros(n_latents, dtype=torch.long))

    # ---- what an architecture defines -----------------------------------------------------------

    #: Where the coefficient of the sparsity penalty starts.
    first_coefficient: ClassVar[float] = 0.0

    def select(
        self, x: Float[Tensor, "batch d"], pre: Float[Tensor, "batch n"], *, learn: bool = True
    ) -> Coded:
        """Choose the entries that take part and compute their latents.

        Args:
            x: the batch, `bias` taken off; gradients reach it.
            pre: its pre-activations, without gradients.
            learn: also note what later batches need (thresholds); False for looking only.
        """
        raise NotImplementedError

    def sparsify(self, pre: Float[Tensor, "batch n"], l0: float) -> None:
        """Set biases or thresholds so that about `l0` latents are active, from first pre-activations."""

    def exported(self) -> dict[str, Tensor]:
        """Return what the architecture's activation adds to the state dict, in the units of training."""
        return {}

    @property
    def rate(self) -> float:
        """The highest learning rate: the config's, or the architecture's, less for more latents."""
        if self.config.learning_rate is not None:
            return self.config.learning_rate
        return self.learning_rate * (2_048 / self.n_latents) ** 0.5

    def published_bias(self) -> Tensor:
        """Return the bias of the latents as published, in the units of training."""
        return self.latent_bias

    # ---- starting -------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, x: Float[Tensor, "rows d"], generator: torch.Generator) -> None:
        """Set initial values from first activations in their own units, `[rows, n_inputs]`.

        Directions are random units and encoder rows the same (tied); the encoder is then scaled so that
        the first reconstruction is the best multiple of itself.
        """
        x = x.float()
        mean_norm = x.norm(dim=-1).mean()
        if not mean_norm > 0:
            mean_norm = torch.ones_like(mean_norm) * self.n_inputs**0.5
        self.scale.copy_(self.n_inputs**0.5 / mean_norm)
        x = x[torch.randperm(len(x), generator=generator)[:_SAMPLE].to(x.device)] * self.scale
        centre = x.mean(0)
        self.variance.copy_((x - centre).square().sum(-1).mean().clamp(min=1e-12))
        self.bias.copy_(geometric_median(x) if self.config.bias == "geometric_median" else centre)
        rows = torch.randn(self.n_latents, self.n_inputs, generator=generator)
        self.directions.copy_(F.normalize(rows, dim=-1))
        self.encode_weight.copy_(self.directions)
        centred = x - self.bias
        self.sparsify(pre_activations(centred, self.encode_weight, self.latent_bias), self.config.l0)
        written = self.reconstruct(x)[0] - self.bias
        factor = ((centred * written).sum() / written.square().sum().clamp(min=1e-12)).clamp(0.05, 20.0)
        self.rescale(factor)

    def rescale(self, factor: Tensor) -> None:
        """Multiply every latent by `factor`, thresholds included."""
        self.encode_weight.mul_(factor)
        self.latent_bias.mul_(factor)

    # ---- a batch --------------------------------------------------------------------------------

    def forward(self, x: Float[Tensor, "batch d"]) -> Losses:
        """Return what a batch of activations, in their own units, costs."""
        x = x.float() * self.scale
        centred = x - self.bias
        pre = pre_activations(centred.detach(), self.encode_weight, self.latent_bias)
        coded = self.select(centred, pre)
        fvu, error = self.unexplained(x, coded)
        total = fvu + self.sparsity_loss(coded) + self.revival(centred, pre, error)
        return Losses(total, error.square().sum() / self._power(x), self.l0(coded), self.fired(coded))

    def reconstruct(
        self, x: Float[Tensor, "batch d"], *, learn: bool = False
    ) -> tuple[Tensor, Coded, Tensor]:
        """Return the reconstruction of scaled activations, the code, and pre-activations."""
        centred = x - self.bias
        pre = pre_activations(centred.detach(), self.encode_weight, self.latent_bias)
        coded = self.select(centred, pre, learn=learn)
        return coded.code.decode(coded.values, self.directions) + self.bias, coded, pre

    def unexplained(self, x: Tensor, coded: Coded) -> tuple[Tensor, Tensor]:
        """Return the reconstruction's loss, and the error `x − x̂` without gradients."""
        error = x - coded.code.decode(coded.values, self.directions) - self.bias
        return error.square().sum() / self._power(x), error.detach()

    def _power(self, x: Tensor) -> Tensor:
        return self.variance * len(x)

    def sparsity_loss(self, coded: Coded) -> Tensor:
        """Return the penalty times its coefficient, and what else the architecture's loss has."""
        loss = self.variance.new_zeros(())
        if coded.penalty is not None:
            loss = loss + self.coefficient * coded.penalty
        return loss if coded.more is None else loss + coded.more

    def revival(self, centred: Tensor, pre: Tensor, error: Tensor) -> Tensor:
        """Return the auxiliary loss: dead latents explain the error as well as they can.

        Their pre-activations stand for them, negative ones too, since a latent that is negative everywhere
        would otherwise have no gradient to come back by.
        """
        dead = (self.unfired_for > self.config.dead_after).nonzero().flatten()
        k = min(self.config.aux_latents or round(2 * self.config.l0), self.n_latents)
        if len(dead) == 0 or self.config.aux_share == 0:
            return pre.new_zeros(())
        which = pre[:, dead].topk(min(k, len(dead)), dim=-1, sorted=False).indices
        code = SomeLatents.each_row(dead[which], self.n_latents)
        values = code.encode(centred.detach(), self.encode_weight, self.latent_bias, pre)
        left = (error - code.decode(values, self.directions)).square().sum()
        power = mean_over(error.square().sum()).clamp(min=1e-12)
        return self.config.aux_share * min(len(dead) / k, 1.0) * left / power

    def l0(self, coded: Coded) -> Tensor:
        """Return the mean number of active latents of a row."""
        return (coded.values.detach() > 0).sum() / coded.code.shape[0]

    def fired(self, coded: Coded) -> Bool[Tensor, " n"]:
        """Return which latents were active."""
        return coded.code.fired(coded.values.detach())

    # ---- after a step ---------------------------------------------------------------------------

    @torch.no_grad()
    def after_step(self, l0: float, fired: Bool[Tensor, " n"], n_rows: int) -> None:
        """Keep constraints, and note what fired.

        Args:
            l0: of the batch, over all processes.
            fired: which latents were active, in any process.
            n_rows: rows of the batch, over all processes.
        """
        if self.unit_directions:
            self.directions.div_(self.directions.norm(dim=-1, keepdim=True).clamp(min=1e-12))
        self.unfired_for.add_(n_rows).masked_fill_(fired, 0)
        if self.controlled:
            distance = torch.tensor(max(l0, 1e-3) / self.config.l0).log().clamp(-2.0, 2.0)
            self.coefficient.mul_((_CONTROL_RATE * distance).exp())

    @property
    def dead(self) -> Bool[Tensor, " n"]:
        """Which latents have not fired for `dead_after_tokens`."""
        return self.unfired_for > self.config.dead_after

    def calibrate(self, x: Float[Tensor, "rows d"]) -> None:
        """Set what the published SAE needs and training only follows, from activations in their own units."""

    # ---- the result -----------------------------------------------------------------------------

    @torch.no_grad()
    def to_sae(self) -> SparseAutoencoder:
        """Return the SAE as published: scaling folded, directions of norm 1."""
        norms = self.directions.norm(dim=-1).clamp(min=1e-12)
        if self.unit_directions:
            norms = torch.ones_like(norms)
        in_units = norms / self.scale
        state: dict[str, Any] = {
            "bias": self.bias / self.scale,
            "latent_bias": self.published_bias() * in_units,
            "encode_weight": self.encode_weight * norms[:, None],
            "decode_weight": (self.directions / norms[:, None]).T,
        }
        state |= {f"activation.{name}": tensor for name, tensor in self.exported().items()}
        for name in ("threshold", "mag_bias", "gate_bias"):
            if f"activation.{name}" in state:
                state[f"activation.{name}"] = state[f"activation.{name}"] * in_units
        state = {name: tensor.detach().clone().cpu() for name, tensor in state.items()}
        return SparseAutoencoder.from_state_dict(HookPoint(), state)


@torch.no_grad()
def geometric_median(x: Float[Tensor, "rows d"], steps: int = 50) -> Float[Tensor, " d"]:
    """Return the point with the least summed distance to the rows (Weiszfeld's iteration)."""
    centre = x.mean(0)
    for _ in range(steps):
        weights = 1 / (x - centre).norm(dim=-1, keepdim=True).clamp(min=1e-6)
        new = (x * weights).sum(0) / weights.sum()
        if (new - centre).norm() <= 1e-6 * new.norm().clamp(min=1e-12):
            return new
        centre = new
    return centre
