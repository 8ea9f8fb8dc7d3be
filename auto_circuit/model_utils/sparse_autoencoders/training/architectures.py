"""The architectures that can be trained: which latents take part, their values, and what sparsity costs.

| name | entries that take part | latents | sparsity | published as |
|---|---|---|---|---|
| `topk` | the `l0` largest of each row | `max(p, 0)` | by construction | TopK |
| `batchtopk` | the `l0·rows` largest of the batch, where positive | `p` | by construction | JumpReLU |
| `matryoshka` | the same | `p`; its loss is a mean over nested groups | by construction | JumpReLU |
| `jumprelu` | above the threshold, and just below | `p·1[p > θ]` | `(L0/l0 − 1)²`, or `Σ tanh` | JumpReLU |
| `relu` | positive | `max(p, 0)` | `Σ z‖D‖`, its coefficient follows `l0` | ReLU |
| `gated` | gate positive | `max(p·exp(r) + m, 0)` | `Σ max(p, 0)`, the same | Gated |

In a process group, whatever concerns the whole batch (the BatchTopK threshold, the L0 in JumpReLU's
penalty) is taken over all processes, so that the gradient is that of one process with the whole batch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from auto_circuit.errors import unknown_name
from auto_circuit.model_utils.sparse_autoencoders.training.coder import Coded, Coder
from auto_circuit.model_utils.sparse_autoencoders.training.config import TrainingConfig
from auto_circuit.model_utils.sparse_autoencoders.training.processes import (
    gathered,
    mean_over,
    n_processes,
    total_over,
)
from auto_circuit.model_utils.sparse_autoencoders.training.sparse_code import (
    SomeLatents,
    pre_activations,
    where,
)

#: Rows that are looked at in one go at the end of training.
_ROWS = 2_048


class TopKCoder(Coder):
    """The `l0` largest pre-activations of each row, where positive (Gao et al. 2024)."""

    kind = "topk"

    @property
    def k(self) -> int:
        """Latents that take part in a row."""
        return min(int(self.config.l0), self.n_latents)

    def select(self, x: Tensor, pre: Tensor, *, learn: bool = True) -> Coded:
        """See `Coder.select`."""
        del learn
        code = SomeLatents.each_row(pre.topk(self.k, dim=-1, sorted=False).indices, self.n_latents)
        return Coded(code, code.encode(x, self.encode_weight, self.latent_bias, pre).relu())

    def exported(self) -> dict[str, Tensor]:
        """See `Coder.exported`."""
        return {"k": torch.tensor(self.k)}


class BatchTopKCoder(Coder):
    """The largest pre-activations of the whole batch, `l0` for each row on average (Bussmann et al. 2024).

    The threshold that published latents are cut at is the running mean of each batch's smallest one; at the
    end of training it is set so that `l0` latents are active on average, since a mean lags behind.
    """

    kind = "batchtopk"

    threshold: Tensor

    #: Entries below this share of the running threshold are not even looked at, unless too few remain.
    _LOOK_FROM = 0.8
    _FORGET = 0.05

    def __init__(self, n_latents: int, n_inputs: int, config: TrainingConfig) -> None:
        super().__init__(n_latents, n_inputs, config)
        self.register_buffer("threshold", torch.zeros(()))

    def select(self, x: Tensor, pre: Tensor, *, learn: bool = True) -> Coded:
        """See `Coder.select`."""
        processes = n_processes() if learn else 1
        wanted = max(1, round(self.config.l0 * len(pre) * processes))
        cut = self._LOOK_FROM * self.threshold
        code = SomeLatents.where(pre > cut)
        found = torch.tensor(code.n_entries, device=pre.device)
        if cut > 0 and int(total_over(found) if learn else found) < wanted:
            code = SomeLatents.where(pre > 0)
        values = pre[code.rows, code.latents]
        best = values.topk(min(wanted, len(values)), sorted=False).values
        best = gathered(best) if learn else best
        if len(best) > 0:
            smallest = best.topk(min(wanted, len(best)), sorted=False).values.min()
            chosen = (values >= smallest).nonzero().flatten()
            code = SomeLatents(code.rows[chosen], code.latents[chosen], code.shape)
            if learn:
                self.threshold.lerp_(smallest, self._FORGET if self.threshold > 0 else 1.0)
        return Coded(code, code.encode(x, self.encode_weight, self.latent_bias, pre))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """See `Coder.calibrate`."""
        wanted = max(1, round(self.config.l0 * len(x)))
        found = []
        for rows in x.split(_ROWS):
            pre = pre_activations(rows.float() * self.scale - self.bias, self.encode_weight, self.latent_bias)
            found.append(pre[pre > 0.5 * self.threshold])
        values = torch.cat(found)
        if len(values) > wanted:
            self.threshold.copy_(values.topk(wanted + 1, sorted=False).values.min())

    def rescale(self, factor: Tensor) -> None:
        """See `Coder.rescale`."""
        super().rescale(factor)
        self.threshold.mul_(factor)

    def exported(self) -> dict[str, Tensor]:
        """See `Coder.exported`."""
        return {"threshold": self.threshold.expand(self.n_latents)}


class MatryoshkaCoder(BatchTopKCoder):
    """BatchTopK whose first latents must reconstruct alone, group after group (Bussmann et al. 2025)."""

    kind = "matryoshka"

    def unexplained(self, x: Tensor, coded: Coded) -> tuple[Tensor, Tensor]:
        """Return the mean over groups of the loss of all latents up to each, and the last one's error."""
        if not isinstance(coded.code, SomeLatents):
            raise TypeError("BatchTopK codes are sparse")
        error, low, loss = x - self.bias, 0, x.new_zeros(())
        for share in self.config.groups:
            high = max(low, round(share * self.n_latents))
            code, entries = coded.code.part(low, high)
            error = error - code.decode(coded.values.index_select(0, entries), self.directions)
            loss = loss + error.square().sum()
            low = high
        return loss / (len(self.config.groups) * self._power(x)), error.detach()


class JumpReLUCoder(Coder):
    """Latents above a threshold of their own that is learned (Rajamanoharan et al. 2024b).

    Neither the jump nor the count of active latents has a useful gradient, so both are estimated by the
    entries within `bandwidth / 2` of the threshold θ (a rectangle kernel K of that width):

    - `∂z/∂θ = −(θ/bandwidth)·K`, `∂1[p > θ]/∂θ = −(1/bandwidth)·K`.

    `penalty="quadratic"`: `(L0/l0 − 1)²`. `penalty="tanh"` (Conerly et al. 2025): `Σ tanh(4z)`, where the
    estimates also reach the pre-activations with the opposite sign; its coefficient follows `l0`.
    """

    kind = "jumprelu"

    bandwidth: Tensor

    #: Width of the kernel, as a share of the first threshold.
    _BAND = 0.25
    _TANH = 4.0

    def __init__(self, n_latents: int, n_inputs: int, config: TrainingConfig) -> None:
        super().__init__(n_latents, n_inputs, config)
        self.threshold = nn.Parameter(torch.zeros(n_latents))
        self.register_buffer("bandwidth", torch.ones(()))
        self.controlled = config.penalty == "tanh"
        self.coefficient.fill_(1e-3 if self.controlled else 1.0)

    def sparsify(self, pre: Tensor, l0: float) -> None:
        """Start every threshold where `l0` latents of a row are active."""
        self.threshold.fill_(_quantile(pre, l0))
        self.bandwidth.copy_((self._BAND * self.threshold.mean()).clamp(min=1e-3))

    def select(self, x: Tensor, pre: Tensor, *, learn: bool = True) -> Coded:
        """See `Coder.select`."""
        band = float(self.bandwidth)
        code = where(pre > self.threshold.detach() - band / 2)
        p = code.encode(x, self.encode_weight, self.latent_bias, pre)
        threshold = code.take(self.threshold)
        to_input = self.config.penalty == "tanh"
        values = _Jump.apply(p, threshold, band, to_input)
        rows = code.shape[0]
        if to_input:
            return Coded(code, values, torch.tanh(self._TANH * values).sum() / rows)
        l0 = _Step.apply(p, threshold, band).sum() / rows
        # The slope of (L0/l0 − 1)² at the L0 of all processes.
        off = (mean_over(l0) if learn else l0.detach()) / self.config.l0 - 1
        return Coded(code, values, 2 * off * l0 / self.config.l0 - (2 * off * (off + 1) - off**2))

    def after_step(self, l0: float, fired: Tensor, n_rows: int) -> None:
        """Also keep thresholds at least 0."""
        super().after_step(l0, fired, n_rows)
        with torch.no_grad():
            self.threshold.clamp_(min=0.0)

    def rescale(self, factor: Tensor) -> None:
        """See `Coder.rescale`."""
        super().rescale(factor)
        self.threshold.mul_(factor)
        self.bandwidth.mul_(factor)

    def exported(self) -> dict[str, Tensor]:
        """See `Coder.exported`."""
        return {"threshold": self.threshold}


class ReLUCoder(Coder):
    """Positive pre-activations, with an L1 penalty weighted by directions' norms (Conerly et al. 2024)."""

    kind = "relu"
    learning_rate = 5e-3
    unit_directions = False
    controlled = True

    #: How many times the wanted L0 are active at first.
    _DENSER = 2.0

    def sparsify(self, pre: Tensor, l0: float) -> None:
        """Start with a bias that leaves twice `l0` latents of a row active."""
        self.latent_bias.sub_(_quantile(pre, self._DENSER * l0))
        self.coefficient.copy_(1.0 / self.variance)

    def select(self, x: Tensor, pre: Tensor, *, learn: bool = True) -> Coded:
        """See `Coder.select`."""
        del learn
        code = where(pre > 0)
        values = code.encode(x, self.encode_weight, self.latent_bias, pre).relu()
        norms = code.take(self.directions.norm(dim=-1))
        return Coded(code, values, (values * norms).sum() / code.shape[0])


class GatedCoder(Coder):
    """A gate that decides, and a rescaled copy that measures (Rajamanoharan et al. 2024a).

    The L1 penalty acts on the gate's pre-activations, which reconstruct too, through frozen directions.
    """

    kind = "gated"
    learning_rate = 5e-3
    controlled = True

    _DENSER = 2.0

    def __init__(self, n_latents: int, n_inputs: int, config: TrainingConfig) -> None:
        super().__init__(n_latents, n_inputs, config)
        self.r_mag = nn.Parameter(torch.zeros(n_latents))
        self.mag_bias = nn.Parameter(torch.zeros(n_latents))

    def sparsify(self, pre: Tensor, l0: float) -> None:
        """Start with a gate bias that leaves twice `l0` latents of a row active, and undo it in the copy."""
        cut = _quantile(pre, self._DENSER * l0)
        self.latent_bias.sub_(cut)
        self.mag_bias.add_(cut)
        self.coefficient.copy_(1.0 / self.variance)

    def select(self, x: Tensor, pre: Tensor, *, learn: bool = True) -> Coded:
        """See `Coder.select`."""
        del learn
        code = where(pre > 0)
        gate = code.encode(x, self.encode_weight, self.latent_bias, pre).relu()
        inside = (gate > 0).to(gate.dtype)
        values = inside * (gate * code.take(self.r_mag).exp() + code.take(self.mag_bias)).relu()
        left = x.detach() - code.decode(gate, self.directions.detach())
        more = left.square().sum() / (self.variance * len(x))
        return Coded(code, values, gate.sum() / code.shape[0], more)

    def rescale(self, factor: Tensor) -> None:
        """See `Coder.rescale`."""
        super().rescale(factor)
        self.mag_bias.mul_(factor)

    def exported(self) -> dict[str, Tensor]:
        """See `Coder.exported`."""
        mag_bias = self.mag_bias + self.latent_bias * self.r_mag.exp()
        return {"gate_bias": self.latent_bias, "r_mag": self.r_mag, "mag_bias": mag_bias}

    def published_bias(self) -> Tensor:
        """Return zeros: gate and copy have biases of their own, as SAELens' layout has them."""
        return torch.zeros_like(self.latent_bias)


#: Every architecture by name.
ARCHITECTURES: dict[str, type[Coder]] = {
    coder.kind: coder
    for coder in (TopKCoder, BatchTopKCoder, MatryoshkaCoder, JumpReLUCoder, ReLUCoder, GatedCoder)
}


def make_coder(n_inputs: int, config: TrainingConfig) -> Coder:
    """Return an unstarted coder of the config's architecture for a site of width `n_inputs`.

    Raises:
        UnknownNameError: for an architecture that does not exist.
        InputError: for an `l0` above the number of latents.
    """
    if config.architecture not in ARCHITECTURES:
        raise unknown_name("architecture", config.architecture, ARCHITECTURES)
    return ARCHITECTURES[config.architecture](config.latents_of(n_inputs), n_inputs, config)


def _quantile(pre: Tensor, l0: float) -> Tensor:
    """Return the value above which `l0` entries of a row lie on average; at least 0."""
    k = min(max(1, round(l0 * len(pre))), pre.numel())
    return pre.flatten().kthvalue(pre.numel() - k + 1).values.clamp(min=0.0)


class _Jump(torch.autograd.Function):
    """`p·1[p > θ]`; see `JumpReLUCoder`."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, threshold: Tensor, band: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.band, ctx.to_input = band, to_input
        return torch.where(p > threshold, p, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        p, threshold = ctx.saved_tensors
        jump = torch.where((p - threshold).abs() < ctx.band / 2, grad * threshold / ctx.band, 0.0)
        direct = torch.where(p > threshold, grad, 0.0)
        of_threshold = -(jump.sum(0) if jump.ndim > threshold.ndim else jump)
        return (direct + jump if ctx.to_input else direct), of_threshold, None, None


class _Step(torch.autograd.Function):
    """`1[p > θ]`; see `JumpReLUCoder`."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, threshold: Tensor, band: float) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.band = band
        return (p > threshold).to(p.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        p, threshold = ctx.saved_tensors
        near = torch.where((p - threshold).abs() < ctx.band / 2, grad / ctx.band, 0.0)
        return None, -(near.sum(0) if near.ndim > threshold.ndim else near), None
