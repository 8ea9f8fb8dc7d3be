from data.tasks.test_ioi import Letters

from auto_circuit.data.tasks.induction import induction_prompts


def test_only_the_clean_prompt_repeats() -> None:
    starts = set()
    for p in induction_prompts(Letters(), 200, seed=1).pairs:
        clean, corrupt = (text.removeprefix("Words: ").split() for text in (p.clean, p.corrupt))
        (answer,), (wrong,) = p.answers, p.wrong_answers
        assert len(clean) == len(corrupt) == 11 and max(map(len, clean)) <= 5
        assert len(set(clean[:8])) == 8 and len(set(corrupt)) == 11
        start = clean.index(clean[8])
        assert clean[start : start + 3] == clean[8:] == corrupt[8:]
        assert f" {clean[start + 3]}" == answer != wrong and answer.strip() in corrupt
        assert wrong.strip() in clean and wrong.strip() not in clean[8:]
        starts.add(start)
    assert starts == {0, 1, 2, 3, 4}
