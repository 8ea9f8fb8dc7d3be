"""Indirect object identification (Wang et al. 2022), for any tokenizer.

"When Mary and John went to the store, John gave a drink to" → " Mary". The order of the two names is
either ABB or BAB (A is the answer); the corrupt prompt names a third person as the giver, which leaves
both names possible.
"""

import random
from collections.abc import Sequence
from typing import Any

from auto_circuit.data.prompts import PromptDataset, PromptPair
from auto_circuit.errors import PromptError

NAMES = (
    "Mary John Tom James Dan Martin Amy Paul Sarah Laura Alice Bob David Anna Mark Peter Emma Jack Kate "
    "Lucy Simon Jane Robert Michael Adam Eric Kevin Lisa Rachel Steven Susan Henry George Helen Frank Ruth "
    "William Charles Thomas Daniel Andrew Joseph Richard Elizabeth Jennifer Linda Jessica Karen Nancy Brian"
).split()
PLACES = "store park school office station hospital restaurant house garden library market beach".split()
OBJECTS = "drink book ring kiss bone basketball computer necklace snack letter gift key".split()
TEMPLATES = (
    "When {first} and {second} went to the {place}, {giver} gave a {object} to",
    "Then, {first} and {second} went to the {place}. {giver} gave a {object} to",
    "After {first} and {second} went to the {place}, {giver} gave a {object} to",
    "While {first} and {second} were working at the {place}, {giver} gave a {object} to",
    "Then, {first} and {second} had a long argument at the {place}. Afterwards {giver} said to",
    "Friends {first} and {second} found a {object} at the {place}, and {giver} gave it to",
)


def ioi_prompts(model: Any, n: int = 64, seed: int = 0, *, prepend_bos: bool | None = None) -> PromptDataset:
    """Make `n` different IOI prompts, half of them ABB and half BAB, from names that are one token.

    Args:
        model: what tokenises.
        n: number of prompts.
        seed: of the choice of names, places, objects, templates.
        prepend_bos: see `PromptDataset`.

    Raises:
        PromptError: when the tokenizer has fewer than three of the names as one token, or there are
            not `n` different prompts.
    """
    if n < 1:
        raise PromptError(f"n must be at least 1; given {n}.")
    names, places, objects = (_single(words, model) for words in (NAMES, PLACES, OBJECTS))
    if len(names) < 3 or not places or not objects:
        raise PromptError(
            f"IOI needs three names, a place and an object that are one token each; this tokenizer has "
            f"{len(names)} names, {len(places)} places and {len(objects)} objects of ours. Give prompts "
            f"of your own as JSON."
        )
    rng = random.Random(seed)
    pairs: dict[str, PromptPair] = {}
    for _attempt in range(100 * n):
        pair = _pair(rng, names, places, objects, abb=len(pairs) % 2 == 0)
        pairs.setdefault(pair.clean, pair)
        if len(pairs) == n:
            return PromptDataset(list(pairs.values()), model, prepend_bos=prepend_bos)
    raise PromptError(f"Only {len(pairs)} different IOI prompts exist for this tokenizer; asked for {n}.")


def _pair(
    rng: random.Random, names: list[str], places: list[str], objects: list[str], *, abb: bool
) -> PromptPair:
    a, b, c = rng.sample(names, 3)
    template, place, thing = rng.choice(TEMPLATES), rng.choice(places), rng.choice(objects)
    first, second = (a, b) if abb else (b, a)
    parts = {"first": first, "second": second, "place": place, "object": thing}
    return PromptPair(
        clean=template.format(giver=b, **parts),
        corrupt=template.format(giver=c, **parts),
        answers=(f" {a}",),
        wrong_answers=(f" {b}",),
    )


def _single(words: Sequence[str], model: Any) -> list[str]:
    """Return the words that are one token after a space, in any context."""

    def ids(text: str) -> list[int]:
        return model.to_tokens(text, prepend_bos=False)[0].tolist()

    stem = ids("and")
    unknown = getattr(getattr(model, "tokenizer", None), "unk_token_id", None)
    found = {word: ids(f"and {word}") for word in words}
    return [w for w, tokens in found.items() if len(tokens) == len(stem) + 1 and tokens[-1] != unknown]
