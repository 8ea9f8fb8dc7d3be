import random
from typing import Any

import pytest
import torch

from auto_circuit.errors import InputError
from auto_circuit.zoo.language import build_tokenizer, sentence
from auto_circuit.zoo.train_model import HELD_OUT, Recipe, Tokenises, measure, sentence_batches, train


def test_measuring_a_model_that_always_says_is() -> None:
    tokenizer = build_tokenizer(64)
    always = tokenizer.convert_tokens_to_ids("is")

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, len(tokenizer))
        logits[..., always] = 3.0
        return logits

    measured = measure(logits_of, Tokenises(tokenizer), 40, 5)
    found = {task: (m.accuracy, m.n_prompts) for task, m in measured.items()}
    assert found.pop(HELD_OUT) == (0, pytest.approx(20, abs=12))
    assert found == {"agreement": (0.5, 40), "induction": (0, 40), "ioi": (0, 40), "successor": (0, 40)}
    # One of three right verbs in half of the prompts, one of three wrong ones in the other half.
    assert measured["agreement"].clean == pytest.approx(0, abs=1e-6)


def test_rows_hold_whole_sentences() -> None:
    recipe, tokenizer = Recipe(batch_size=8), build_tokenizer(64)
    rng = random.Random(recipe.seed)
    batch = next(sentence_batches(recipe, tokenizer))
    assert batch.shape == (8, 64)
    for row in batch.tolist():
        end = row.index(tokenizer.eos_token_id)
        assert row[0] == tokenizer.bos_token_id and set(row[end + 1 :]) <= {tokenizer.pad_token_id}
        said = row[1:end]
        while said:
            ids = tokenizer(sentence(rng), add_special_tokens=False)["input_ids"]
            assert said[: len(ids)] == ids
            said = said[len(ids) :]


def test_the_same_recipe_gives_the_same_weights() -> None:
    def weights(**changes: Any) -> torch.Tensor:
        settings: dict[str, Any] = dict(max_steps=2, n_cooldown=1, batch_size=4, d_model=16, n_layers=1)
        before = torch.random.get_rng_state()
        model, steps = train(Recipe(**settings | changes), progress=False)
        assert steps == 3 and not model.training and torch.equal(before, torch.random.get_rng_state())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = weights()
    assert torch.equal(first, weights()) and not torch.equal(first, weights(seed=1))
    assert not torch.equal(first, weights(n_warmup=1))


def test_learned_tasks_begin_the_cool_down(monkeypatch: Any) -> None:
    from auto_circuit.zoo import train_model

    monkeypatch.setattr(train_model, "WANTED", 0.0)
    recipe = Recipe(max_steps=50, n_cooldown=2, check_every=3, batch_size=2, d_model=16, n_layers=1)
    assert train(recipe, progress=False)[1] == 5


def test_wrong_recipes() -> None:
    with pytest.raises(InputError, match=r"above 0.*\['n_warmup'\]"):
        Recipe(n_warmup=0)
