"""Indirect object identification (Wang et al. 2022), for any tokenizer.

"When Mary and John went to the store, John gave a drink to" → " Mary". The order of the two names is
either ABB or BAB (A is the answer); the corrupt prompt names a third person as the giver, which leaves
both names possible.
"""

import random
from collections.abc import Sequence
from typing import Any

from auto_circuit.data.prompts import PromptDataset, PromptPair
from auto_circuit.data.tasks.words import different_pairs, single_tokens
from auto_circuit.errors import PromptError

NAMES: Sequence[str] = (
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
    names, places, objects = (single_tokens(words, model) for words in (NAMES, PLACES, OBJECTS))
    if len(names) < 3 or not places or not objects:
        raise PromptError(
            f"IOI needs three names, a place and an object that are one token each; this tokenizer has "
            f"{len(names)} names, {len(places)} places and {len(objects)} objects of ours. Give prompts "
            f"of your own as JSON."
        )
    pairs = different_pairs(
        "IOI", n, seed, lambda rng, made: _pair(rng, names, places, objects, abb=made % 2 == 0)
    )
    return PromptDataset(pairs, model, prepend_bos=prepend_bos)


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
