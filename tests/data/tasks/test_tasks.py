"""What every task must do, on the packaged model and on a real one."""

from typing import Any

import pytest
import torch

from auto_circuit import load_prompts, logit_diff
from auto_circuit.data.tasks import TASKS
from auto_circuit.errors import PromptError


def mean_diffs(model: Any, prompts: Any) -> tuple[float, float]:
    """Mean logit difference of answers and wrong answers after clean, and after corrupt prompts."""
    clean, corrupt = [], []
    with torch.no_grad():
        for batch in prompts.batches():
            clean.append(logit_diff(model(batch.clean)[:, -1], batch))
            corrupt.append(logit_diff(model(batch.corrupt)[:, -1], batch))
    return torch.cat(clean).mean().item(), torch.cat(corrupt).mean().item()


def check_prompts(task: str, model: Any) -> None:
    """Tokenise by hand what the dataset was made of."""

    def ids(text: str) -> list[int]:
        return model.to_tokens(text)[0].tolist()

    prompts = load_prompts(task, model, 40, seed=7)
    assert len(prompts) == len({p.clean for p in prompts.pairs}) == 40
    for p in prompts.pairs:
        clean = ids(p.clean)
        assert len(clean) == len(ids(p.corrupt)) and p.clean != p.corrupt
        assert p.answers and p.wrong_answers and not set(p.answers) & set(p.wrong_answers)
        for word in p.answers + p.wrong_answers:
            after = ids(p.clean + word)
            assert after[:-1] == clean and model.tokenizer.decode([after[-1]]).strip() == word.strip()
    assert prompts.pairs == load_prompts(task, model, 40, seed=7).pairs
    assert prompts.pairs != load_prompts(task, model, 40, seed=8).pairs


@pytest.mark.parametrize("task", TASKS)
def test_pairs_of_the_tiny_model(task: str, tiny: Any) -> None:
    check_prompts(task, tiny)


@pytest.mark.parametrize("task", TASKS)
def test_the_corrupt_prompt_takes_the_answer_away(task: str, tiny: Any) -> None:
    clean, corrupt = mean_diffs(tiny, load_prompts(task, tiny, 100, seed=3))
    assert clean > 4 and corrupt < 1, (clean, corrupt)


@pytest.mark.real_model
@pytest.mark.parametrize("task", TASKS)
def test_pairs_of_a_real_model(task: str, smollm2: Any) -> None:
    check_prompts(task, smollm2)
    clean, corrupt = mean_diffs(smollm2, load_prompts(task, smollm2, 16, seed=0))
    assert clean > 1 and corrupt < clean - 2, (clean, corrupt)


@pytest.mark.parametrize("task", TASKS)
def test_what_a_tokenizer_lacks_is_said(task: str, tiny: Any) -> None:
    class Characters:
        tokenizer = None

        def to_tokens(self, text: str, prepend_bos: Any = None) -> torch.Tensor:
            return torch.tensor([[ord(c) for c in text]])

    with pytest.raises(PromptError, match=r"this tokenizer has 0 .*of ours. Give prompts of your own"):
        TASKS[task](Characters(), 4)
    with pytest.raises(PromptError, match="n must be at least 1; given 0"):
        TASKS[task](tiny, 0)


def test_more_prompts_than_there_are(tiny: Any, monkeypatch: Any) -> None:
    from auto_circuit.data.tasks import agreement

    monkeypatch.setattr(agreement, "NOUNS", {"key": "keys", "door": "doors"})
    monkeypatch.setattr(agreement, "PREPOSITIONS", ["near"])
    # Two subjects in two numbers, before the other noun in two numbers.
    assert len(agreement.agreement_prompts(tiny, 8)) == 8
    with pytest.raises(PromptError, match="Only 8 different agreement prompts exist .* asked for 9"):
        agreement.agreement_prompts(tiny, 9)
