"""What `sae_quality` returns: one `SiteQuality` for each site. Formulas: the docstring of `quality`."""

from dataclasses import asdict, dataclass

from jaxtyping import Float, Int
from torch import Tensor

#: A rise in loss, or a KL, below this many nats is rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class RunLoss:
    """The model with something else in the place of one site's activation.

    Attributes:
        loss: mean next-token cross-entropy over the predictions that count, in nats.
        rise_error: standard error of `loss` − the plain model's, in nats, predictions taken as independent;
            None with one prediction.
        kl: mean over counted positions of `KL(plain ‖ this run)`, in nats.
    """

    loss: float
    rise_error: float | None
    kl: float


@dataclass(frozen=True)
class SiteLosses:
    """What the model loses when one site's activation is replaced, the other sites being plain.

    Attributes:
        n_predictions: how many predictions count.
        plain: the plain model's mean next-token cross-entropy, in nats.
        spliced: with the SAE's reconstruction in the place of the activation.
        zero: with zeros.
        mean: with the mean activation of the counted tokens.
    """

    n_predictions: int
    plain: float
    spliced: RunLoss
    zero: RunLoss
    mean: RunLoss

    @property
    def recovered_zero(self) -> float | None:
        """Share of the loss that zeros cost and the SAE does not; 1 is best. None: see `notes`."""
        return self._recovered(self.zero)

    @property
    def recovered_mean(self) -> float | None:
        """Share of the loss that the mean costs and the SAE does not; 1 is best. None: see `notes`."""
        return self._recovered(self.mean)

    @property
    def kl_recovered_zero(self) -> float | None:
        """`1 − KL(plain ‖ spliced) / KL(plain ‖ zero)`; None where zeros change nothing."""
        return self._kl_recovered(self.zero)

    @property
    def kl_recovered_mean(self) -> float | None:
        """`1 − KL(plain ‖ spliced) / KL(plain ‖ mean)`; None where the mean changes nothing."""
        return self._kl_recovered(self.mean)

    @property
    def notes(self) -> list[str]:
        """Why a loss recovered is None: one sentence each, none when all are given."""
        return [
            f"Loss recovered against {name} ablation is not defined: the ablation changes the loss by "
            f"{run.loss - self.plain:+.2g} nats, no rise of more than two standard errors "
            f"({'unknown' if run.rise_error is None else f'{run.rise_error:.2g}'}) on "
            f"{self.n_predictions} predictions. Give more tokens, or compare KL."
            for name, run in (("zero", self.zero), ("mean", self.mean))
            if self._recovered(run) is None
        ]

    def _recovered(self, ablated: RunLoss) -> float | None:
        rise = ablated.loss - self.plain
        if ablated.rise_error is None or rise <= max(2 * ablated.rise_error, _ROUNDING):
            return None
        return (ablated.loss - self.spliced.loss) / rise

    def _kl_recovered(self, ablated: RunLoss) -> float | None:
        return None if ablated.kl <= _ROUNDING else 1 - self.spliced.kl / ablated.kl


@dataclass(frozen=True, eq=False)
class SiteQuality:
    """How good one SAE is on some tokens.

    Attributes:
        n_tokens: how many tokens (positions) count.
        l0: mean number of active latents of a token; a latent is active where it is not zero.
        fvu: fraction of variance unexplained, `Σ‖x − x̂‖² / Σ‖x − x̄‖²`; 0 is best, above 1 is worse than the
            mean activation. None where all activations are equal.
        residual_bias: share of `Σ‖x − x̂‖²` that the mean of `x − x̂` makes up: what a better decoder bias
            alone would mend. None where the reconstruction is exact.
        norm: mean `‖x‖`.
        norm_ratio: mean of `‖x̂‖/‖x‖` over tokens with `x ≠ 0`; below 1: shrinkage. None without such.
        cosine: mean cosine of `x̂` with `x` over the same tokens.
        frequency: share of the tokens on which each latent is active, `[n_latents]` float64.
        latent_ids: their published ids, `[n_latents]`.
        dense_above: the frequency above which a latent is called dense.
        duplicates_above: the cosine above which two decoder directions are called near copies.
        n_duplicates: unordered pairs of latents with a larger cosine.
        largest_cosine: the largest cosine of a pair; None with one latent.
        losses: what the model loses; None when it was not measured.
    """

    n_tokens: int
    l0: float
    fvu: float | None
    residual_bias: float | None
    norm: float
    norm_ratio: float | None
    cosine: float | None
    frequency: Float[Tensor, " n_latents"]
    latent_ids: Int[Tensor, " n_latents"]
    dense_above: float
    duplicates_above: float
    n_duplicates: int
    largest_cosine: float | None
    losses: SiteLosses | None

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return len(self.latent_ids)

    @property
    def explained_variance(self) -> float | None:
        """`1 − FVU`; None where that is."""
        return None if self.fvu is None else 1 - self.fvu

    @property
    def dead_ids(self) -> Int[Tensor, " n_dead"]:
        """Published ids of the latents that were active on no counted token."""
        return self.latent_ids[self.frequency == 0]

    @property
    def dense_ids(self) -> Int[Tensor, " n_dense"]:
        """Published ids of the latents that were active on more than `dense_above` of the tokens."""
        return self.latent_ids[self.frequency > self.dense_above]

    @property
    def dead_share(self) -> float:
        """Dead latents over all."""
        return len(self.dead_ids) / self.n_latents

    @property
    def dense_share(self) -> float:
        """Dense latents over all."""
        return len(self.dense_ids) / self.n_latents

    @property
    def notes(self) -> list[str]:
        """Why something is None: one sentence each."""
        own = [] if self.fvu is not None else ["FVU is not defined: all counted activations are equal."]
        return own + (self.losses.notes if self.losses is not None else [])

    def as_row(self) -> dict[str, int | float | None]:
        """Return every number under one flat name each, for JSON and tables: no tensors, no NaN.

        Losses are `loss_plain`, and `loss_`, `rise_`, `rise_error_`, `kl_` with `spliced`, `zero` and `mean`;
        then `loss_recovered_` and `kl_recovered_` with `zero` and `mean`. None of these when not measured.
        """
        row = {key: value for key, value in vars(self).items() if isinstance(value, int | float | None)}
        row.pop("losses", None)
        row |= {
            "n_latents": self.n_latents,
            "explained_variance": self.explained_variance,
            "n_dead": len(self.dead_ids),
            "dead_share": self.dead_share,
            "n_dense": len(self.dense_ids),
            "dense_share": self.dense_share,
        }
        if self.losses is None:
            return row
        row |= {"n_predictions": self.losses.n_predictions, "loss_plain": self.losses.plain}
        for name in ("spliced", "zero", "mean"):
            run = getattr(self.losses, name)
            row |= {f"{key}_{name}": value for key, value in asdict(run).items()}
            row[f"rise_{name}"] = run.loss - self.losses.plain
        for name in ("zero", "mean"):
            row[f"loss_recovered_{name}"] = getattr(self.losses, f"recovered_{name}")
            row[f"kl_recovered_{name}"] = getattr(self.losses, f"kl_recovered_{name}")
        return row
