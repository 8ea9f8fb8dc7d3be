"""Induction: words said before are said again in the same order, for any tokenizer.

"Words: lamp river stone apple cloud chair horse bread river stone apple" → " cloud". Eight random
words, then three of them again, which stood together; the answer is the word that followed them. The
corrupt prompt has other words in the place of those three the first time, so that nothing is repeated.
The wrong answer is another of the eight words.
"""

import random
from typing import Any

from auto_circuit.data.prompts import PromptDataset, PromptPair
from auto_circuit.data.tasks.words import different_pairs, single_tokens
from auto_circuit.errors import PromptError

WORDS = (
    "lamp river stone apple cloud chair horse bread glass train paper table window tree ship bird milk rain "
    "snow fire road wall door hand foot moon star sand gold iron wood salt sugar coffee tea rice corn meat "
    "fish soup cake song dance film"
).split()
TEMPLATE = "Words: {words}"
N_WORDS = 8
N_REPEATED = 3


def induction_prompts(
    model: Any, n: int = 64, seed: int = 0, *, prepend_bos: bool | None = None
) -> PromptDataset:
    """Make `n` different induction prompts, all of one length, from words that are one token.

    Args:
        model: what tokenises.
        n: number of prompts.
        seed: of the choice of words and of the place that is repeated.
        prepend_bos: see `PromptDataset`.

    Raises:
        PromptError: when the tokenizer has too few of the words as one token, or there are not `n`
            different prompts.
    """
    words = single_tokens(WORDS, model)
    if len(words) < N_WORDS + N_REPEATED:
        raise PromptError(
            f"Induction needs {N_WORDS + N_REPEATED} words that are one token each; this tokenizer has "
            f"{len(words)} of ours. Give prompts of your own as JSON."
        )
    pairs = different_pairs("induction", n, seed, lambda rng, _made: _pair(rng, words))
    return PromptDataset(pairs, model, prepend_bos=prepend_bos)


def _pair(rng: random.Random, words: list[str]) -> PromptPair:
    chosen = rng.sample(words, N_WORDS + N_REPEATED)
    first, others = chosen[:N_WORDS], chosen[N_WORDS:]
    start = rng.randrange(N_WORDS - N_REPEATED)
    end = start + N_REPEATED
    wrong = rng.choice(first[:start] + first[end + 1 :])
    broken = first[:start] + others + first[end:]
    repeated = first[start:end]
    return PromptPair(
        clean=TEMPLATE.format(words=" ".join(first + repeated)),
        corrupt=TEMPLATE.format(words=" ".join(broken + repeated)),
        answers=(f" {first[end]}",),
        wrong_answers=(f" {wrong}",),
    )
