"""The errors of the package: one root, a few kinds, and the sentence that helps.

Every message says what was given, what was expected, the nearest valid values and what to do.
All kinds derive from `AutoCircuitError`, and from the builtin that fits, so that
`except ValueError` keeps working.
"""

import difflib
from collections.abc import Iterable, Sequence


class AutoCircuitError(Exception):
    """Root of every error that this package raises on purpose."""


class InputError(AutoCircuitError, ValueError):
    """A value or a shape given by the user does not fit."""


class UnknownNameError(AutoCircuitError, LookupError):
    """A name (site, task, format, model) does not exist; the message lists the nearest ones."""


class SpliceError(AutoCircuitError, RuntimeError):
    """SAEs cannot be put into, or kept in, this model."""


class CheckpointError(AutoCircuitError, ValueError):
    """An SAE checkpoint is incomplete, inconsistent or not understood."""


class TrainingError(AutoCircuitError, RuntimeError):
    """Training cannot go on, or did not reach what was asked; the message says what is kept."""


class PromptError(AutoCircuitError, ValueError):
    """A prompt or a prompt file cannot be used; the message names the prompt."""


class ModelLoadError(AutoCircuitError, RuntimeError):
    """A model cannot be loaded; the message says which command or folder is missing."""


def nearest(given: str, valid: Iterable[str], n: int = 4) -> list[str]:
    """Return the up to `n` names of `valid` most like `given`, best first.

    When nothing is alike, the first `n` names in sorted order.
    """
    names = sorted(set(valid))
    return difflib.get_close_matches(given, names, n=n, cutoff=0.5) or names[:n]


def listed(names: Sequence[str], at_most: int = 8) -> str:
    """Join names for a message, saying how many were left out."""
    shown = ", ".join(str(name) for name in names[:at_most])
    more = len(names) - at_most
    return f"{shown} and {more} more" if more > 0 else shown


def unknown_name(kind: str, given: str, valid: Iterable[str], hint: str = "") -> UnknownNameError:
    """Build the error for a `kind` of thing called `given` that is not among `valid`."""
    close = nearest(given, valid)
    tail = f" {hint}" if hint else ""
    if not close:
        return UnknownNameError(f"No {kind} is called {given!r}; there is none at all here.{tail}")
    return UnknownNameError(f"No {kind} is called {given!r}. Nearest: {listed(close)}.{tail}")
