import random
import re
from typing import Any

import pytest

from auto_circuit.data.tasks import agreement, induction, ioi, successor
from auto_circuit.zoo.language import BOS, KINDS, UNK, build_tokenizer, held_out, sentence, vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(64)


def made(kind: str, n: int) -> list[str]:
    rng = random.Random(n)
    return [KINDS[kind][0](rng) for _ in range(n)]


def test_sentences_use_exactly_the_vocabulary(tokenizer: Any) -> None:
    rng = random.Random(0)
    ids = tokenizer([sentence(rng) for _ in range(6000)], add_special_tokens=False)["input_ids"]
    said = {i for row in ids for i in row}
    assert said == set(range(4, len(vocabulary()))), [vocabulary()[i] for i in said ^ set(range(4, 278))]
    assert max(map(len, ids)) < 40
    again = random.Random(0)
    assert tokenizer(sentence(again), add_special_tokens=False)["input_ids"] == ids[0]


def test_words_marks_and_one_bos(tokenizer: Any) -> None:
    assert tokenizer.tokenize("went to the store, John.") == ["went", "to", "the", "store", ",", "John", "."]
    first, *rest = tokenizer("said: A, B,")["input_ids"]
    assert first == tokenizer.bos_token_id and tokenizer.bos_token == BOS
    assert tokenizer.convert_ids_to_tokens(rest) == ["said", ":", "A", ",", "B", ","]
    assert tokenizer.tokenize("a Zebra") == ["a", UNK] and tokenizer.decode(rest[2:]) == "A, B,"
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    assert marks == {0, 1, 2, 3}


def test_pairs_of_names_held_out_never_meet() -> None:
    assert held_out("Mary", "Laura") == held_out("Laura", "Mary")
    pairs = [(a, b) for a in ioi.NAMES for b in ioi.NAMES if a < b]
    assert 0.08 < sum(held_out(*pair) for pair in pairs) / len(pairs) < 0.12
    thirds = 0
    for text in made("ioi", 3000):
        names = [word for word in re.findall(r"\w+", text) if word in ioi.NAMES]
        first, second, giver, answer = names
        assert not held_out(first, second) and answer in (first, second) and answer != giver
        thirds += giver not in (first, second)
    assert 0.1 < thirds / 3000 < 0.2


def test_every_kind_says_what_it_should() -> None:
    stretches = set()
    for text in made("induction", 300):
        words = text.removeprefix("Words: ").removesuffix(".").split()
        size = len(set(words))
        start = words.index(words[size])
        assert words[size:] == words[start:size][: len(words) - size] and len(words) - size >= 4
        assert set(words) <= set(induction.WORDS)
        stretches.add(" ".join(words[size:]))
    assert len(stretches) == 300
    for text in made("successor", 300):
        run = text.split(": ")[1].removesuffix(".").split(", ")
        kinds = (successor.CYCLES | successor.LINES).items()
        kind = next(kind for kind, words in kinds if run[0] in words)
        assert 2 <= len(run) <= 8 and run in successor.runs(kind, len(run))
    between = set()
    for text in made("agreement", 300):
        words = text.removesuffix(".").split()
        at, plural = next((i, w in agreement.PLURAL_VERBS) for i, w in enumerate(words) if w in
                          agreement.PLURAL_VERBS + agreement.SINGULAR_VERBS)  # fmt: skip
        assert words[1] in (agreement.NOUNS.values() if plural else agreement.NOUNS)
        between.add(at)
    assert between == {2, 5, 8}
