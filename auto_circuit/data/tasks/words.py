"""What the tasks share: which words a tokenizer has as one token, and `n` different prompt pairs."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from auto_circuit.data.prompts import PromptPair
from auto_circuit.errors import PromptError


def single_tokens(words: Sequence[str], model: Any) -> list[str]:
    """Return the words that are one token after a space, in any context.

    Args:
        words: the candidates.
        model: what tokenises, see `PromptDataset`.
    """

    def ids(text: str) -> list[int]:
        return model.to_tokens(text, prepend_bos=False)[0].tolist()

    stem = ids("and")
    unknown = getattr(getattr(model, "tokenizer", None), "unk_token_id", None)
    found = {word: ids(f"and {word}") for word in words}
    return [w for w, tokens in found.items() if len(tokens) == len(stem) + 1 and tokens[-1] != unknown]


def different_pairs(
    task: str, n: int, seed: int, make: Callable[[random.Random, int], PromptPair]
) -> list[PromptPair]:
    """Make `n` pairs with different clean prompts.

    Args:
        task: its name, for the message.
        n: number of pairs.
        seed: of the random choices.
        make: makes one pair from a random generator and the number of pairs there are so far.

    Raises:
        PromptError: for `n` below 1, or more than there are.
    """
    if n < 1:
        raise PromptError(f"n must be at least 1; given {n}.")
    rng = random.Random(seed)
    pairs: dict[str, PromptPair] = {}
    for _attempt in range(100 * n):
        pair = make(rng, len(pairs))
        pairs.setdefault(pair.clean, pair)
        if len(pairs) == n:
            return list(pairs.values())
    raise PromptError(f"Only {len(pairs)} different {task} prompts exist for this tokenizer; asked for {n}.")
