import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WordTokens, make_prompts

from auto_circuit import PromptDataset, PromptPair, load_prompts, read_prompts
from auto_circuit.errors import PromptError, UnknownNameError


def pair(**changes: Any) -> PromptPair:
    return PromptPair(
        **(dict(clean="w3 w4", corrupt="w3 w5", answers=(" w6",), wrong_answers=(" w7", " w8")) | changes)
    )


def test_batches_hold_one_length_and_drop_nothing() -> None:
    prompts = make_prompts(11, lengths=(6, 4, 9))
    for batch_size in (1, 2, 3, 100):
        batches = list(prompts.batches(batch_size))
        assert sorted(i for b in batches for i in b.idxs.tolist()) == list(range(11))
        assert all(len(b) <= batch_size and b.clean.shape == b.corrupt.shape for b in batches)
        for batch in batches:
            for i, row in zip(batch.idxs.tolist(), batch.clean.tolist(), strict=True):
                words = prompts.pairs[i].clean.split()
                assert row == [0, *[int(w[1:]) for w in words]]
    with pytest.raises(PromptError, match="batch_size"):
        next(prompts.batches(0))


def test_answers_are_filled_where_a_prompt_has_fewer() -> None:
    data = PromptDataset([pair(), pair(answers=(" w9", " w10"), wrong_answers=())], WordTokens())
    batch = next(data.batches())
    assert batch.answers.tolist() == [[6, -1], [9, 10]] and batch.wrong_answers.tolist() == [[7, 8], [-1, -1]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(corrupt="w3 w4 w5"), r"Prompt 1 \('w3 w4'\): clean has 3 tokens, corrupt .* has 4"),
        (dict(clean=" "), "must both have text"),
        (dict(answers=()), "at least one answer"),
        (dict(answers=(" w6 w7",)), "the answer ' w6 w7' must be one token"),
        (dict(answers=("6",)), "merges with the end of the prompt"),
        (dict(wrong_answers=(" w6",)), "among the answers and the wrong answers"),
        (dict(clean="w3 \ud800"), "characters that are no text"),
    ],
)
def test_a_wrong_prompt_is_named(changes: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        PromptDataset([pair(clean="w9 w9"), pair(**changes)], WordTokens())


def test_json_there_and_back(tmp_path: Path) -> None:
    data = PromptDataset(
        [pair(), pair(clean="w9 w9")], WordTokens(), seq_labels=["a", "b"], word_idxs={"x": 1}
    )
    data.save(tmp_path / "prompts.json")
    content = json.loads((tmp_path / "prompts.json").read_text())
    assert set(content) == {"prompts", "seq_labels", "word_idxs"}
    assert content["prompts"][0] == {
        "clean": "w3 w4", "corrupt": "w3 w5", "answers": [" w6"], "wrong_answers": [" w7", " w8"]
    }  # fmt: skip
    again = read_prompts(tmp_path / "prompts.json", WordTokens())
    assert again.pairs == data.pairs and again.seq_labels == ["a", "b"] and again.word_idxs == {"x": 1}
    assert len(load_prompts(tmp_path / "prompts.json", WordTokens(), n=1)) == 1
    assert len(load_prompts(str(tmp_path / "prompts.json"), WordTokens())) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Cannot read"),
        ("[]", "no list of prompts"),
        ('{"prompts": []}', "empty list"),
        ('{"prompts": [{"clean": "w1"}]}', r"prompt 0: needs clean, corrupt.*given \['clean'\]"),
        (
            '{"prompts": [{"clean": 1, "corrupt": "w", "answers": [], "wrong_answers": []}]}',
            "must be strings",
        ),
        (
            '{"prompts": [{"clean": "w", "corrupt": "w", "answers": "w", "wrong_answers": []}]}',
            "lists of strings",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(PromptError, match=words):
        read_prompts(path, WordTokens())
    with pytest.raises(PromptError, match="none was given"):
        PromptDataset([], WordTokens())
    with pytest.raises(PromptError, match="Cannot read"):
        load_prompts(tmp_path / "none.json", WordTokens())
    with pytest.raises(UnknownNameError, match="Nearest: ioi"):
        load_prompts("iol", WordTokens())


def test_duplicate_answers_count_once() -> None:
    data = PromptDataset([pair(answers=(" w6", " w6"))], WordTokens())
    assert next(data.batches()).answers.tolist() == [[6]]


def test_what_the_model_cannot_read(shared_model: Any, tmp_path: Path) -> None:
    model = shared_model("gpt2")
    long = " ".join(["w3"] * 40)
    with pytest.raises(PromptError, match="32 tokens or more"):
        PromptDataset([pair(clean=long, corrupt=long)], model)
    with pytest.raises(PromptError, match="no tokenizer"):
        PromptDataset([pair()], shared_model("native_attn_only"))
    for extra, words in (
        ({"seq_labels": 5}, "list of strings"),
        ({"word_idxs": [1]}, "map words to positions"),
    ):
        data = {"prompts": [{"clean": "w", "corrupt": "w", "answers": [], "wrong_answers": []}], **extra}
        (tmp_path / "p.json").write_text(json.dumps(data))
        with pytest.raises(PromptError, match=words):
            read_prompts(tmp_path / "p.json", WordTokens())


def test_split() -> None:
    prompts = make_prompts(10)
    train, test = prompts.split(0.3, seed=4)
    assert len(test) == 3 and len(train) == 7
    assert {p.clean for p in train.pairs} | {p.clean for p in test.pairs} == {p.clean for p in prompts.pairs}
    assert [p.clean for p in prompts.split(0.3, seed=4)[1].pairs] == [p.clean for p in test.pairs]
    with pytest.raises(PromptError, match="one side"):
        prompts.split(0.01)
    assert torch.equal(next(train.batches(1)).clean[0, :1], torch.tensor([0]))
