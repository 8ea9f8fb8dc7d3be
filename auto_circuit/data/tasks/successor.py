"""Successor: the next of a run of weekdays, months, number words or letters, for any tokenizer.

"Then Mary said: Monday, Tuesday, Wednesday, Thursday," → " Friday". The corrupt prompt is another run
of the same kind, in which the answer does not occur; what follows that run is the wrong answer.
"""

import random
from collections.abc import Sequence
from typing import Any

from auto_circuit.data.prompts import PromptDataset, PromptPair
from auto_circuit.data.tasks.ioi import NAMES
from auto_circuit.data.tasks.words import different_pairs, single_tokens
from auto_circuit.errors import PromptError

#: Runs that begin again after their last word.
CYCLES: dict[str, Sequence[str]] = {
    "weekdays": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "months": (
        "January February March April May June July August September October November December"
    ).split(),
}
#: Runs that end with their last word.
LINES: dict[str, Sequence[str]] = {
    "numbers": (
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty"
    ).split(),
    "letters": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z".split(),
}
TEMPLATE = "Then {name} said: {run},"
N_SHOWN = 4


def successor_prompts(
    model: Any, n: int = 64, seed: int = 0, *, prepend_bos: bool | None = None
) -> PromptDataset:
    """Make `n` different prompts, all of one length, from the kinds of run whose words are one token.

    Args:
        model: what tokenises.
        n: number of prompts.
        seed: of the choice of names, kinds of run and their starts.
        prepend_bos: see `PromptDataset`.

    Raises:
        PromptError: when the tokenizer has no name, or no kind of run, as single tokens, or there are
            not `n` different prompts.
    """
    kinds = [kind for kind, run in (CYCLES | LINES).items() if len(single_tokens(run, model)) == len(run)]
    names = single_tokens(NAMES, model)
    if not kinds or not names:
        raise PromptError(
            f"Successor needs a name, and weekdays, months, number words or letters that are one token "
            f"each; this tokenizer has {len(names)} names and {len(kinds)} such runs of ours. Give prompts "
            f"of your own as JSON."
        )
    pairs = different_pairs("successor", n, seed, lambda rng, _made: _pair(rng, kinds, names))
    return PromptDataset(pairs, model, prepend_bos=prepend_bos)


def _pair(rng: random.Random, kinds: list[str], names: list[str]) -> PromptPair:
    name, kind = rng.choice(names), rng.choice(kinds)
    *shown, answer = rng.choice(runs(kind, N_SHOWN + 1))
    others = [run for run in runs(kind, N_SHOWN + 1) if answer not in run]
    *other_shown, wrong = rng.choice(others)
    return PromptPair(
        clean=TEMPLATE.format(name=name, run=", ".join(shown)),
        corrupt=TEMPLATE.format(name=name, run=", ".join(other_shown)),
        answers=(f" {answer}",),
        wrong_answers=(f" {wrong}",),
    )


def runs(kind: str, length: int) -> list[list[str]]:
    """Return every run of `length` words of a kind, a key of `CYCLES` or `LINES`."""
    if kind in CYCLES:
        words = CYCLES[kind]
        return [[words[(start + i) % len(words)] for i in range(length)] for start in range(len(words))]
    words = LINES[kind]
    return [list(words[start : start + length]) for start in range(len(words) - length + 1)]
