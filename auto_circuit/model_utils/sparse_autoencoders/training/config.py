"""`TrainingConfig`: everything that decides what a training run computes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from auto_circuit.errors import InputError, unknown_name

ARCHITECTURE_NAMES = ("topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated")
LOSSES = ("local", "end_to_end", "local_then_end_to_end")
PENALTIES = ("quadratic", "tanh")
BIASES = ("geometric_median", "mean")

_COUNTS = "n_tokens expansion batch_size tokens_per_pass buffer_tokens".split()

#: A setting; `TrainingConfig` checks its type itself, with a sentence.
Checked = Any


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train SAEs. The defaults are meant to be used as they are; `l0` and `n_tokens` are the choices.

    Attributes:
        architecture: `topk` (Gao et al. 2024), `batchtopk` (Bussmann et al. 2024), `matryoshka` (BatchTopK,
            Bussmann et al. 2025), `jumprelu` (Rajamanoharan et al. 2024b), `relu` (L1 weighted by decoder
            norms; Conerly et al. 2024), `gated` (Rajamanoharan et al. 2024a). BatchTopK and Matryoshka are
            published as JumpReLU with their running threshold.
        l0: wanted mean number of active latents per token.
        n_tokens: activations of each site to train on.
        n_latents: latents of each SAE; None: `expansion` times the width of its site.
        expansion: see `n_latents`.
        loss: `local` (reconstruction), `end_to_end` (KL divergence of the spliced model's output from the
            plain model's, and reconstruction of the residual stream downstream; Braun et al. 2024), or
            `local_then_end_to_end` (the last `end_to_end_share` of the tokens end to end).
        end_to_end_share: see `loss`.
        downstream: weight of the downstream reconstruction beside the KL divergence.
        batch_size: activations in a step.
        learning_rate: of Adam at its highest; None: the architecture's own.
        warmup_share, decay_share: shares of the steps over which the rate rises from 0 and falls to 0.
        penalty: JumpReLU's: `quadratic` (squared relative distance to `l0`), or `tanh` (Conerly et al. 2025),
            whose coefficient then follows `l0`.
        groups: Matryoshka's nested shares of the latents, rising to 1.
        bias: where the decoder bias starts.
        dead_after_tokens: a latent that was silent for so many counts as dead; None: `n_tokens / 50`,
            at least 10,000.
        aux_share: weight of the loss that revives dead latents; 0: none.
        aux_latents: dead latents that take part in it for each activation; None: twice `l0`.
        seed: of initial values and of the order of the data.
        context_length: tokens of a text context, BOS included; None: 128, or what the model reads if less.
        tokens_per_pass: tokens of one forward pass of the model.
        buffer_tokens: activations of each site that are mixed at a time.
    """

    architecture: Checked = "batchtopk"
    l0: Checked = 32.0
    n_tokens: Checked = 2_000_000
    n_latents: Checked = None
    expansion: Checked = 8
    loss: Checked = "local"
    end_to_end_share: Checked = 0.1
    downstream: Checked = 1.0
    batch_size: Checked = 2_048
    learning_rate: Checked = None
    warmup_share: Checked = 0.02
    decay_share: Checked = 0.3
    penalty: Checked = "quadratic"
    groups: Checked = (0.125, 0.25, 0.5, 1.0)
    bias: Checked = "geometric_median"
    dead_after_tokens: Checked = None
    aux_share: Checked = 1 / 32
    aux_latents: Checked = None
    seed: Checked = 0
    context_length: Checked = None
    tokens_per_pass: Checked = 4_096
    buffer_tokens: Checked = 65_536

    def __post_init__(self) -> None:
        for name, valid in (
            ("architecture", ARCHITECTURE_NAMES),
            ("loss", LOSSES),
            ("penalty", PENALTIES),
            ("bias", BIASES),
        ):
            if getattr(self, name) not in valid:
                raise unknown_name(f"{name} of a training run", str(getattr(self, name)), valid)
        if isinstance(self.groups, Sequence):
            object.__setattr__(self, "groups", tuple(self.groups))
        if _is_number(self.l0):
            object.__setattr__(self, "l0", float(self.l0))
        for name, (fine, expected) in self._ranges().items():
            if not fine:
                raise InputError(f"TrainingConfig.{name} must be {expected}; given {getattr(self, name)!r}.")

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        """Return whether each number is fine, and what it must be."""
        whole = "a whole number of at least 1"
        checks = {name: (_is_whole(getattr(self, name), 1), whole) for name in _COUNTS}
        for name in ("n_latents", "aux_latents", "dead_after_tokens"):
            value = getattr(self, name)
            checks[name] = (value is None or _is_whole(value, 1), f"{whole}, or None")
        length = self.context_length
        fine = length is None or _is_whole(length, 2)
        checks["context_length"] = (fine, "a whole number of at least 2, or None")
        checks["l0"] = (_is_number(self.l0) and self.l0 > 0, "a number above 0")
        for name in ("end_to_end_share", "warmup_share", "decay_share"):
            value = getattr(self, name)
            checks[name] = (_is_number(value) and 0 <= value <= 1, "a share from 0 to 1")
        for name in ("downstream", "aux_share"):
            value = getattr(self, name)
            checks[name] = (_is_number(value) and value >= 0, "a number of at least 0")
        rate = self.learning_rate
        checks["learning_rate"] = (
            rate is None or (_is_number(rate) and rate > 0),
            "a number above 0, or None",
        )
        shares = self.groups if isinstance(self.groups, tuple) else ()
        rising = all(_is_number(share) for share in shares) and list(shares) == sorted(set(shares))
        checks["groups"] = (
            bool(shares) and rising and shares[0] > 0 and shares[-1] == 1,
            "shares of the latents above 0, rising to 1",
        )
        checks["seed"] = (_is_whole(self.seed, 0) and self.seed < 2**63, "a whole number from 0 to 2**63 - 1")
        if self.architecture == "topk":
            fine = _is_number(self.l0) and self.l0 >= 1 and self.l0 == int(self.l0)
            checks["l0"] = (fine, "a whole number for topk")
        return checks

    def latents_of(self, width: int) -> int:
        """Return the number of latents of an SAE for a site of `width`.

        Raises:
            InputError: when `l0` of them cannot be active.
        """
        n_latents = self.n_latents if self.n_latents is not None else self.expansion * width
        if self.l0 > n_latents:
            raise InputError(
                f"l0 = {self.l0:g} latents per token cannot be active among {n_latents}. Give a lower l0, "
                f"or more n_latents."
            )
        return n_latents

    @property
    def dead_after(self) -> int:
        """Activations for which a latent must be silent to count as dead."""
        return max(self.n_tokens // 50, 10_000) if self.dead_after_tokens is None else self.dead_after_tokens

    @property
    def n_steps(self) -> int:
        """Number of optimiser steps."""
        return max(1, -(-self.n_tokens // self.batch_size))

    def rate_at(self, step: int) -> float:
        """Return the share of the highest learning rate that step `step` (from 0) takes."""
        n = self.n_steps
        warm, decay = self.warmup_share * n, self.decay_share * n
        rise = min(1.0, (step + 1) / warm) if warm >= 1 else 1.0
        fall = min(1.0, (n - step) / decay) if decay >= 1 else 1.0
        return min(rise, fall)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"groups": list(self.groups)}


def _is_whole(value: Any, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
