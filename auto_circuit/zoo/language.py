"""The language of the tiny model: sentences from a seed, their vocabulary, and the tokenizer.

A sentence is of one of five kinds, the first four of which can only be continued by computing on what
was said before:

- indirect object identification in the templates of the task `ioi`; some name a third person as giver,
  after whom either name may follow; some pairs of names never occur together (`held_out`);
- induction: random words, of which a stretch is repeated;
- successor: runs of weekdays, months, number words or letters, of any start and 2 to 8 words;
- agreement of a verb with its subject, with none, one or two nouns of either number between;
- fillers, which give the words other neighbours.

Words and templates are the tasks' own, so that a task's prompts are beginnings of sentences. The
tokenizer has one token for each word and punctuation mark, and puts `<bos>` first.
"""

import random
import re
from collections.abc import Callable
from typing import Any

from auto_circuit.data.tasks import agreement, induction, ioi, successor

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
ADJECTIVES = "old new big small red green good bad near far lost clean".split()
FILLERS = (
    "{name} saw the {adjective} {noun} at the {place}.",
    "The {place} was {adjective}, and {name} was there.",
    "Then {name} and {other} found a {noun} near the {place}.",
    "{name} has a {adjective} {noun}, and {other} has a {object}.",
    "After a long day, {name} went to the {place} with {other}.",
    "The {noun} of {name} is {adjective}.",
)
_RUN_OPENINGS = (successor.TEMPLATE.removesuffix(" {run},"), "{name} said:", "Afterwards {name} said:")


def sentence(rng: random.Random) -> str:
    """Make one sentence, of a kind drawn by weight."""
    kind = rng.choices(list(KINDS), weights=[weight for _make, weight in KINDS.values()])[0]
    return KINDS[kind][0](rng)


def held_out(first: str, second: str) -> bool:
    """Whether two names, in either order, never occur together in the sentences of the kind `ioi`."""
    return (ioi.NAMES.index(first) + ioi.NAMES.index(second)) % 10 == 0


def _ioi(rng: random.Random) -> str:
    first, second, third = rng.sample(ioi.NAMES, 3)
    while held_out(first, second):
        first, second, third = rng.sample(ioi.NAMES, 3)
    answer, giver = rng.sample((first, second), 2)
    if rng.random() < 0.15:
        giver = third
    template, place, thing = rng.choice(ioi.TEMPLATES), rng.choice(ioi.PLACES), rng.choice(ioi.OBJECTS)
    said = template.format(first=first, second=second, giver=giver, place=place, object=thing)
    return f"{said} {answer}."


def _induction(rng: random.Random) -> str:
    words = rng.sample(induction.WORDS, rng.randint(6, 10))
    n_repeated = rng.randint(induction.N_REPEATED + 1, len(words))
    start = rng.randint(0, len(words) - n_repeated)
    return induction.TEMPLATE.format(words=" ".join(words + words[start : start + n_repeated])) + "."


def _successor(rng: random.Random) -> str:
    kinds = successor.CYCLES | successor.LINES
    kind = rng.choice(list(kinds))
    run = rng.choice(successor.runs(kind, min(rng.randint(2, 8), len(kinds[kind]))))
    return f"{rng.choice(_RUN_OPENINGS).format(name=rng.choice(ioi.NAMES))} {', '.join(run)}."


def _agreement(rng: random.Random) -> str:
    singular = rng.choice(list(agreement.NOUNS))
    plural = rng.random() < 0.5
    said = f"The {agreement.NOUNS[singular] if plural else singular}"
    for _phrase in range(rng.choices((0, 1, 2), weights=(2, 7, 1))[0]):
        noun = rng.choice([word for pair in agreement.NOUNS.items() for word in pair])
        said += f" {rng.choice(agreement.PREPOSITIONS)} the {noun}"
    verb = rng.choice(agreement.PLURAL_VERBS if plural else agreement.SINGULAR_VERBS)
    thing = f"a {rng.choice(ioi.OBJECTS)}" if verb in ("has", "have") else rng.choice(ADJECTIVES)
    return f"{said} {verb} {thing}."


def _filler(rng: random.Random) -> str:
    name, other = rng.sample(ioi.NAMES, 2)
    return rng.choice(FILLERS).format(
        name=name,
        other=other,
        noun=rng.choice(list(agreement.NOUNS)),
        adjective=rng.choice(ADJECTIVES),
        place=rng.choice(ioi.PLACES),
        object=rng.choice(ioi.OBJECTS),
    )


#: Kind of sentence → what makes one from a random generator, and how often it is drawn.
KINDS: dict[str, tuple[Callable[[random.Random], str], int]] = {
    "ioi": (_ioi, 7),
    "induction": (_induction, 6),
    "successor": (_successor, 2),
    "agreement": (_agreement, 3),
    "filler": (_filler, 2),
}


def vocabulary() -> list[str]:
    """Return every token, special ones first, then words and punctuation marks in sorted order."""
    runs = [word for run in (successor.CYCLES | successor.LINES).values() for word in run]
    texts = [*ioi.TEMPLATES, *FILLERS, *_RUN_OPENINGS, induction.TEMPLATE, successor.TEMPLATE, "."]
    frames = [re.sub(r"\{\w+\}", " ", text) for text in [*texts, agreement.TEMPLATE]]
    words = {token for frame in frames for token in re.findall(r"\w+|[^\w\s]", frame)}
    words |= {*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS, *induction.WORDS, *runs, *ADJECTIVES}
    words |= {*agreement.NOUNS, *agreement.NOUNS.values(), *agreement.PREPOSITIONS}
    words |= {*agreement.SINGULAR_VERBS, *agreement.PLURAL_VERBS}
    return [BOS, EOS, PAD, UNK, *sorted(words)]


def build_tokenizer(n_ctx: int) -> Any:
    """Build the tokenizer as a `PreTrainedTokenizerFast`: words and marks, `<bos>` first.

    Args:
        n_ctx: number of tokens that the model reads.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary())}
    raw = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    # Joins words by spaces, and takes away those before marks.
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=n_ctx,
        padding_side="right",
    )
