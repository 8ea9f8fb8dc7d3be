import pytest
from data.tasks.test_ioi import Letters

from auto_circuit.data.tasks.successor import runs, successor_prompts
from auto_circuit.zoo.language import build_tokenizer
from auto_circuit.zoo.train_model import Tokenises

AFTER = {
    "weekdays": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday",
    "months": "January February March April May June July August September October November December January",
    "numbers": (
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty"
    ),
    "letters": " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}


def test_answers_go_on_and_the_corrupt_run_lacks_them() -> None:
    orders = [order.split() for order in AFTER.values()]
    after = {word: following for order in orders for word, following in zip(order, order[1:], strict=False)}
    firsts = set()
    for p in successor_prompts(Tokenises(build_tokenizer(64)), 300, seed=2).pairs:
        clean, corrupt = (text.split(": ")[1].rstrip(",").split(", ") for text in (p.clean, p.corrupt))
        (answer,), (wrong,) = p.answers, p.wrong_answers
        for run, follows in ((clean, answer), (corrupt, wrong)):
            assert len(run) == 4 and [after[w] for w in run] == [*run[1:], follows.strip()]
        assert answer.strip() not in corrupt and p.clean.split(":")[0] == p.corrupt.split(":")[0]
        assert any(clean[0] in order and corrupt[0] in order for order in orders)
        firsts.add(clean[0])
    assert all(firsts & set(order) for order in orders)


def test_kinds_with_a_word_of_two_tokens_are_left_out() -> None:
    pairs = successor_prompts(Letters(), 200).pairs
    assert {p.clean.split(": ")[1][0] for p in pairs} == set("ABCDEFGHIJKLMNOPQRSTUV")
    assert all(len(p.answers[0].strip()) == 1 for p in pairs)


@pytest.mark.parametrize(
    ("kind", "number"), [("weekdays", 7), ("months", 12), ("numbers", 16), ("letters", 22)]
)
def test_runs(kind: str, number: int) -> None:
    found = runs(kind, 5)
    assert len(found) == len({tuple(run) for run in found}) == number
    assert all(len(set(run)) == 5 for run in found)
