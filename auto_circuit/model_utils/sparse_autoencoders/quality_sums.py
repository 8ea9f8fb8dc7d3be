"""Running sums behind `quality`: of activations, of losses, and the decoder's near copies.

Everything is added up in float64, batch by batch, so that results depend neither on how tokens
are put into batches nor on the dtype of the model; memory does not grow with the number of tokens.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from auto_circuit.errors import InputError
from auto_circuit.model_utils.sparse_autoencoders.latent_dictionary import LatentDictionary
from auto_circuit.model_utils.sparse_autoencoders.neuron_autoencoder import NeuronAutoencoder

#: Numbers in a working tensor, at most.
CHUNK = 2**20
#: A variance below this share of the mean square is rounding, not variance.
_ROUNDING = 1e-20


class Moments:
    """Mean and squared deviations of vectors that come in batches, without cancellation.

    Each batch is centred on its own mean, and batches are merged by the formula of Chan, Golub & LeVeque
    (1983). The one-pass formula `Σx² − n·mean²` loses every digit where the mean is large.

    Attributes:
        n: how many vectors there were.
        mean: their mean, `[…]` float64.
        squares: `Σ (x − mean)²`, `[…]` float64.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Float[Tensor, "n *shape"]) -> None:
        """Add a batch of `n` vectors."""
        n = len(values)
        if n == 0:
            return
        values = values.double()
        mean = values.mean(0)
        squares = (values - mean).square_().sum(0)
        if self.n:
            step = mean - self.mean
            squares = self.squares + squares + step.square() * (self.n * n / (self.n + n))
            mean = self.mean + step * (n / (self.n + n))
        self.n, self.mean, self.squares = self.n + n, mean, squares

    @property
    def about_mean(self) -> float:
        """`Σ ‖x − mean‖²`; 0 where it is nothing but rounding."""
        total = float(self.squares.sum())
        return total if total > _ROUNDING * self.about_zero else 0.0

    @property
    def about_zero(self) -> float:
        """`Σ ‖x‖²`."""
        return float(self.squares.sum()) + self.mean_square

    @property
    def mean_square(self) -> float:
        """`n·‖mean‖²`: the part of `Σ ‖x‖²` that the mean makes up."""
        return self.n * float(self.mean.square().sum())


class SiteSums:
    """What the counted tokens add up to at one site.

    Args:
        name: the site, for messages.

    Attributes:
        inputs: moments of the activation `x`.
        residuals: moments of `x − x̂`.
        n_active: tokens on which each latent was active, `[n_latents]`.
        norm: `Σ ‖x‖`.
        norm_ratio: `Σ ‖x̂‖/‖x‖` where `x` is not zero.
        cosine: `Σ cos(x, x̂)` where `x` is not zero; 0 for a zero `x̂`.
        n_nonzero: tokens with another `x` than zero.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs = Moments()
        self.residuals = Moments()
        self.n_active = torch.zeros((), dtype=torch.long)
        self.norm = self.norm_ratio = self.cosine = 0.0
        self.n_nonzero = 0

    def add(
        self, x: Float[Tensor, "n d"], reconstruction: Float[Tensor, "n d"], active: Bool[Tensor, "n k"]
    ) -> None:
        """Add `n` tokens: activations, reconstructions, and which latents are active.

        Raises:
            InputError: for activations or reconstructions that are NaN or infinite, naming the site.
        """
        self._check(x, "activations", "the weights of the model, its dtype, and the tokens")
        self._check(reconstruction, "reconstructions", "the weights of the SAE, and its dtype")
        x, reconstruction = x.double(), reconstruction.double()
        self.inputs.add(x)
        self.residuals.add(x - reconstruction)
        self.n_active = self.n_active.to(x.device) + active.sum(0)
        norm, written = x.norm(dim=-1), reconstruction.norm(dim=-1)
        there = norm > 0
        aligned = (x * reconstruction).sum(-1) / (norm * written).clamp(min=torch.finfo(x.dtype).tiny)
        self.norm += float(norm.sum())
        self.norm_ratio += float((written / norm)[there].sum())
        self.cosine += float(aligned[there].sum())
        self.n_nonzero += int(there.sum())

    def _check(self, values: Tensor, what: str, check: str) -> None:
        wrong = int((~values.isfinite()).any(-1).sum())
        if wrong:
            raise InputError(
                f"{self.name}: {what} of {wrong} of {len(values)} tokens in a batch are NaN or infinite. "
                f"Check {check}."
            )


class ReferenceLogits:
    """The plain model's logits of one batch, and how other logits differ from them.

    Log-probabilities are taken in float64: rounding in their normaliser is of first order in KL, where
    rounding in logits is of second.

    Args:
        logits: of the plain model, `[rows, seq, vocab]`; kept as they are, not copied.
        tokens: the batch, `[rows, seq]`.
        counted: positions that count.
        predicted: positions that count and whose next token counts as a target; never a row's last.

    Attributes:
        losses: cross-entropy of each prediction in nats, `[n_predictions]` float64.
    """

    def __init__(
        self,
        logits: Float[Tensor, "rows seq vocab"],
        tokens: Int[Tensor, "rows seq"],
        counted: Bool[Tensor, "rows seq"],
        predicted: Bool[Tensor, "rows seq"],
    ) -> None:
        self._logits = logits.flatten(0, 1)
        self._targets = tokens.roll(-1, 1).flatten()
        at = counted.flatten().nonzero().squeeze(-1)
        self._is_predicted = predicted.flatten()[at]
        self._chunks = at.split(max(1, CHUNK // logits.shape[-1]))
        losses = [self._loss(chunk, _log_probs(self._logits, chunk)) for chunk in self._chunks]
        self.losses = torch.cat(losses)[self._is_predicted]

    def compare(self, logits: Float[Tensor, "rows seq vocab"]) -> tuple[Tensor, float]:
        """Compare the logits of another run of the same batch.

        Returns:
            The cross-entropy of each prediction in nats, `[n_predictions]` float64, and the sum over
            counted positions of `KL(plain ‖ other)` in nats.
        """
        others = logits.flatten(0, 1)
        losses, kls = [], []
        for chunk in self._chunks:
            plain, other = _log_probs(self._logits, chunk), _log_probs(others, chunk)
            losses.append(self._loss(chunk, other))
            kls.append((plain - other).mul_(plain.exp_()).sum())
        return torch.cat(losses)[self._is_predicted], float(torch.stack(kls).sum())

    def _loss(self, chunk: Tensor, log_probs: Tensor) -> Tensor:
        return -log_probs.gather(-1, self._targets[chunk, None]).squeeze(-1)


def _log_probs(logits: Tensor, at: Tensor) -> Tensor:
    return logits[at].double().log_softmax(-1)


def near_copies(sae: LatentDictionary, above: float) -> tuple[int, float | None]:
    """Count pairs of latents with almost the same direction, in chunks: never all pairs at once.

    Args:
        sae: whose directions are the same at every position.
        above: a pair with a larger cosine counts.

    Returns:
        The number of unordered pairs with a larger cosine, and the largest cosine of a pair (None with
        one latent). A direction of zeros has cosine 0 with all others.
    """
    if sae.n_latents < 2:
        return 0, None
    if isinstance(sae, NeuronAutoencoder):  # one-hot rows, which need not be made
        return 0, 0.0
    rows = sae.directions.detach()
    unit = torch.nn.functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
    count, largest = 0, -1.0
    size = max(1, 4 * CHUNK // len(unit))
    for start in range(0, len(unit) - 1, size):
        cosines = unit[start : start + size] @ unit[start:].T
        own = cosines[:, : len(cosines)]  # a latent with itself, and pairs in their other order
        own.masked_fill_(torch.ones_like(own, dtype=torch.bool).tril_(), -torch.inf)
        count += int((cosines > above).sum())
        largest = max(largest, float(cosines.max()))
    return count, min(largest, 1.0)
