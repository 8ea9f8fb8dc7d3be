"""The packaged tiny model as it is shipped."""

import json
from importlib.resources import files
from typing import Any

import pytest
import torch

from auto_circuit import load_model, load_prompts
from auto_circuit.data.tasks import TASKS
from auto_circuit.zoo import TINY
from auto_circuit.zoo.language import held_out, vocabulary

FRESH = 77_777


def accuracy(model: Any, prompts: Any) -> float:
    right = 0
    for batch in prompts.batches(64):
        with torch.no_grad():
            best = model(batch.clean)[:, -1].argmax(-1).tolist()
        said = [f" {model.tokenizer.decode([i])}" for i in best]
        right += sum(word in prompts.pairs[i].answers for i, word in zip(batch.idxs, said, strict=True))
    return right / len(prompts)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_learned(task: str, tiny: Any) -> None:
    assert accuracy(tiny, load_prompts(task, tiny, 400, seed=FRESH)) >= 0.99


def test_names_it_never_saw_together(tiny: Any) -> None:
    prompts = load_prompts("ioi", tiny, 1500, seed=FRESH)
    pairs = [(p.answers[0].strip(), p.wrong_answers[0].strip()) for p in prompts.pairs]
    unseen = prompts.subset([i for i, pair in enumerate(pairs) if held_out(*pair)])
    assert len(unseen) > 100 and accuracy(tiny, unseen) >= 0.98


def test_bos_once_or_not_at_all(tiny: Any) -> None:
    bos = tiny.tokenizer.bos_token_id
    for text in ("When Mary and John went to the store, John", "Words: lamp"):
        tokens, without = tiny.to_tokens(text)[0], tiny.to_tokens(text, prepend_bos=False)[0]
        assert (tokens == bos).sum() == 1 and tokens[0] == bos
        assert torch.equal(tokens[1:], without) and torch.equal(
            tiny.to_tokens(text, prepend_bos=True)[0], tokens
        )
        assert tiny.tokenizer.unk_token_id not in tokens
    assert tiny.tokenizer.convert_ids_to_tokens(range(tiny.cfg.d_vocab)) == vocabulary()


def test_what_is_shipped() -> None:
    shipped = files("auto_circuit") / "zoo" / "tiny"
    names = {entry.name for entry in (shipped / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert (TINY / "model" / "model.safetensors").stat().st_size <= 2_000_000
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 6_000_000
    settings = json.loads((TINY / "model" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "| ioi, held-out pairs | " in (TINY / "README.md").read_text(encoding="utf-8")


def test_the_name_has_no_case(tiny: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    again = load_model("Tiny")
    tokens = again.to_tokens("The keys near the cabinet")
    assert not again.training and torch.equal(again(tokens), tiny(tokens))
