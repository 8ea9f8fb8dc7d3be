"""Subject-verb agreement across an attractor, for any tokenizer.

"The keys near the cabinet" → " are", " were", " have" against " is", " was", " has". The noun after the
preposition, of either number, must not be agreed with. The corrupt prompt has the subject in the other
number, so that its right verbs are the clean prompt's wrong ones.
"""

import random
from typing import Any

from auto_circuit.data.prompts import PromptDataset, PromptPair
from auto_circuit.data.tasks.words import different_pairs, single_tokens
from auto_circuit.errors import PromptError

#: Singular → plural.
NOUNS: dict[str, str] = {
    singular: f"{singular}s"
    for singular in (
        "key book door car boy girl dog cat teacher farmer king letter picture ship tree friend doctor "
        "student guard cup cabinet house garden river"
    ).split()
}
PREPOSITIONS = "to near behind beside with from by of".split()
SINGULAR_VERBS = ("is", "was", "has")
PLURAL_VERBS = ("are", "were", "have")
TEMPLATE = "The {subject} {preposition} the {attractor}"


def agreement_prompts(
    model: Any, n: int = 64, seed: int = 0, *, prepend_bos: bool | None = None
) -> PromptDataset:
    """Make `n` different prompts, all of one length, half of them with a plural subject.

    Args:
        model: what tokenises.
        n: number of prompts.
        seed: of the choice of nouns, prepositions and the attractor's number.
        prepend_bos: see `PromptDataset`.

    Raises:
        PromptError: when the tokenizer lacks two nouns in both numbers, a preposition, or a verb in both
            numbers as one token each, or there are not `n` different prompts.
    """
    known = set(single_tokens([*NOUNS, *NOUNS.values()], model))
    nouns = [singular for singular, plural in NOUNS.items() if {singular, plural} <= known]
    prepositions = single_tokens(PREPOSITIONS, model)
    verbs = [
        (f" {one}", f" {many}")
        for one, many in zip(SINGULAR_VERBS, PLURAL_VERBS, strict=True)
        if len(single_tokens([one, many], model)) == 2
    ]
    if len(nouns) < 2 or not prepositions or not verbs:
        raise PromptError(
            f"Agreement needs two nouns and a verb in both numbers and a preposition that are one token "
            f"each; this tokenizer has {len(nouns)} nouns, {len(verbs)} verbs and {len(prepositions)} "
            f"prepositions of ours. Give prompts of your own as JSON."
        )
    pairs = different_pairs(
        "agreement",
        n,
        seed,
        lambda rng, made: _pair(rng, nouns, prepositions, verbs, plural=made % 2 == 1),
    )
    return PromptDataset(pairs, model, prepend_bos=prepend_bos)


def _pair(
    rng: random.Random,
    nouns: list[str],
    prepositions: list[str],
    verbs: list[tuple[str, str]],
    *,
    plural: bool,
) -> PromptPair:
    subject, attractor = rng.sample(nouns, 2)
    forms, preposition = (subject, NOUNS[subject]), rng.choice(prepositions)
    parts = {"preposition": preposition, "attractor": rng.choice((attractor, NOUNS[attractor]))}
    return PromptPair(
        clean=TEMPLATE.format(subject=forms[plural], **parts),
        corrupt=TEMPLATE.format(subject=forms[not plural], **parts),
        answers=tuple(verb[plural] for verb in verbs),
        wrong_answers=tuple(verb[not plural] for verb in verbs),
    )
