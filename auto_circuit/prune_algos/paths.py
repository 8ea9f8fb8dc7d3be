"""Paths from ablated to clean that gradients are averaged over, and objectives without a gradient to average.

Points of a path lie by `ig_rule`:

- `midpoint`: at (k + ½)/steps, averaged: the best sum for the same number of steps;
- `left`: at k/steps for k = 0 … steps − 1, averaged (EAP-IG's own, Hanna et al. 2024);
- `sum`: at k/steps for k = 0 … steps, added up (AutoCircuit's: steps + 1 terms, not divided).
"""

import math

from torch import Tensor

from auto_circuit.errors import InputError, unknown_name
from auto_circuit.metrics.objectives import Objective

#: An objective whose gradient at the logits is nowhere larger than this (sum over the vocabulary) vanishes.
VANISHED = 1e-6

IG_RULES = ("midpoint", "left", "sum")


def path_points(steps: int, rule: str, name: str = "steps") -> list[tuple[float, float]]:
    """Return the points of a path and their weights (rules: the module's docstring).

    Args:
        steps: how many.
        rule: one of `IG_RULES`.
        name: what the caller's argument is called.

    Raises:
        InputError: for fewer than one step.
        UnknownNameError: for an unknown rule.
    """
    if rule not in IG_RULES:
        raise unknown_name("ig_rule", rule, IG_RULES)
    if int(steps) != steps or steps < 1:
        raise InputError(f"{name} must be a whole number of at least 1; given {steps}.")
    if rule == "sum":
        return [(k / steps, 1.0) for k in range(steps + 1)]
    shift = 0.5 if rule == "midpoint" else 0.0
    return [((k + shift) / steps, 1 / steps) for k in range(steps)]


def largest_gradient(objective: Objective, gradient: Tensor, largest: float = 0.0) -> float:
    """Return the larger of `largest` and a gradient at the logits `[batch, vocab]`, summed over the latter.

    Raises:
        InputError: where it is not finite.
    """
    size = float(gradient.abs().sum(-1).max())
    if not math.isfinite(size):
        name = getattr(objective, "__name__", "the objective")
        raise InputError(
            f"The gradient of {name} is not finite: the model, an SAE or the objective gives NaN or infinity "
            f"on these prompts. Check the weights, and try float32."
        )
    return max(largest, size)


def refuse_vanished(objective: Objective, largest: float, method: str) -> None:
    """Refuse an objective whose gradient at the logits was nowhere larger than rounding.

    Raises:
        InputError: naming the methods that do not take it at the clean run.
    """
    if largest > VANISHED:
        return
    name = getattr(objective, "__name__", "this objective")
    raise InputError(
        f"The gradient of {name} vanishes where {method} takes it ({largest:.1e} at the logits), so every "
        f"score would be rounding error (the KL divergence to the clean run has its minimum there; an "
        f"objective that is only small can be scaled). For edges use method 'mask-ig', "
        f"'ig-inputs' or 'clean-corrupt', or 'mask' at a mask_value above 0; for nodes give ig_steps."
    )
