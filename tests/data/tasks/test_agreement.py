from data.tasks.test_ioi import Letters

from auto_circuit.data.tasks.agreement import agreement_prompts


def test_verbs_agree_with_the_subject_not_the_attractor() -> None:
    numbers = []
    for p in agreement_prompts(Letters(), 200, seed=5).pairs:
        clean, corrupt = p.clean.split(), p.corrupt.split()
        assert len(clean) == 5 and [a == b for a, b in zip(clean, corrupt, strict=True)] == [1, 0, 1, 1, 1]
        plural = clean[1].endswith("s")
        assert (clean[1] == f"{corrupt[1]}s") if plural else (corrupt[1] == f"{clean[1]}s")
        forms = ((" is", " was", " has"), (" are", " were", " have"))
        assert (p.answers, p.wrong_answers) == (forms[plural], forms[not plural])
        assert clean[4].removesuffix("s") != clean[1].removesuffix("s") and max(map(len, clean)) <= 6
        numbers.append((plural, clean[4].endswith("s")))
    assert sum(plural for plural, _ in numbers) == 100
    assert min(numbers.count((a, b)) for a in (True, False) for b in (True, False)) > 25
