"""Objectives: how well one prompt's last-position logits do what the behaviour asks.

An objective is any callable `(logits [batch, vocab], batch) -> [batch]`, larger is better; `batch` is a
`PromptBatch`. The same objective serves for attribution and for evaluation.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from auto_circuit.data.prompts import PromptBatch
from auto_circuit.errors import InputError

Objective = Callable[[Tensor, PromptBatch], Tensor]


def evaluate(
    objective: Objective, logits: Float[Tensor, "batch vocab"], batch: PromptBatch
) -> Float[Tensor, " batch"]:
    """Return an objective's value for each prompt.

    Raises:
        InputError: when the objective returns anything but one number for each prompt.
    """
    values = objective(logits, batch)
    if not isinstance(values, Tensor) or values.shape != (len(batch),):
        given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"An objective returns one number for each prompt, here a tensor [{len(batch)}]; "
            f"{getattr(objective, '__name__', 'this one')} returned {given}. Do not average over the batch."
        )
    return values


def logit_diff(logits: Float[Tensor, "batch vocab"], batch: PromptBatch) -> Float[Tensor, " batch"]:
    """Mean logit of the answers minus mean logit of the wrong answers (none: 0), in nats."""
    return _mean_at(logits, batch.answers) - _mean_at(logits, batch.wrong_answers)


def answer_log_prob(logits: Float[Tensor, "batch vocab"], batch: PromptBatch) -> Float[Tensor, " batch"]:
    """Log of the total probability of the answers, in nats."""
    log_probs = logits.log_softmax(-1).gather(-1, batch.answers.clamp(min=0))
    return log_probs.masked_fill(batch.answers < 0, -torch.inf).logsumexp(-1)


def prob_diff(logits: Float[Tensor, "batch vocab"], batch: PromptBatch) -> Float[Tensor, " batch"]:
    """Mean probability of the answers minus mean probability of the wrong answers (none: 0)."""
    probs = logits.softmax(-1)
    return _mean_at(probs, batch.answers) - _mean_at(probs, batch.wrong_answers)


def _mean_at(values: Float[Tensor, "batch vocab"], idxs: Int[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
    """Mean of `values` at the ids given, −1 left out."""
    there = (idxs >= 0).to(values.dtype)
    picked = values.gather(-1, idxs.clamp(min=0)) * there
    return picked.sum(-1) / there.sum(-1).clamp(min=1)


OBJECTIVES: dict[str, Objective] = {
    "logit_diff": logit_diff,
    "answer_log_prob": answer_log_prob,
    "prob_diff": prob_diff,
}
