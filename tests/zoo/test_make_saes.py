"""The packaged SAEs are what their card says, and the script that makes them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import auto_circuit as ac
from auto_circuit.errors import TrainingError
from auto_circuit.zoo import TINY
from auto_circuit.zoo.make_saes import MOST_FVU, MOST_L0, RECIPE, SITES, Sentences, make_saes


@pytest.fixture(scope="module")
def tiny() -> Any:
    return ac.load_model("tiny")


def test_the_shipped_saes_reach_what_is_required(tiny: Any) -> None:
    saes = ac.load_saes("tiny")
    assert set(saes) == set(SITES) and len(saes) == 9
    sentences = Sentences(tiny.tokenizer, seed=77)  # a seed that no card names
    tokens = iter(lambda: sentences.next_batch(0), None)
    measured = ac.sae_quality(tiny, saes, tokens, n_tokens=6_000, losses=False, progress=False)
    for site, quality in measured.items():
        assert quality.fvu is not None and quality.fvu <= MOST_FVU, site
        assert quality.l0 <= MOST_L0, site
        assert f"| {site} |" in (TINY / "saes" / "README.md").read_text()


def test_model_and_saes_are_small() -> None:
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) <= 6e6


def test_without_error_nodes_the_tiny_model_still_does_its_tasks(tiny: Any) -> None:
    spliced = ac.sae_model(tiny, ac.load_saes("tiny"), error_nodes=False)
    for task in ("ioi", "induction", "successor", "agreement"):
        prompts = ac.load_prompts(task, tiny, 32, seed=5)
        right = 0
        for batch in prompts.batches():
            with torch.no_grad():
                best = spliced(batch.clean)[:, -1].argmax(-1, keepdim=True)
            right += int((batch.answers == best).any(-1).sum())
        assert right >= 0.8 * 32, task


def test_sentences_go_on_where_they_were(tiny: Any) -> None:
    one, other = Sentences(tiny.tokenizer, 3), Sentences(tiny.tokenizer, 3)
    for _ in range(3):
        one.next_batch(0)
    other.restore(one.state())
    assert torch.equal(one.next_batch(0), other.next_batch(0))


def test_saes_that_miss_what_is_required_are_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("auto_circuit.zoo.make_saes.N_TEST", 300)
    (tmp_path / "model").symlink_to(TINY / "model")
    short = replace(RECIPE, n_tokens=4_096, n_latents=64, buffer_tokens=2_048, l0=4)
    with pytest.raises(TrainingError, match="Required are FVU"):
        make_saes(tmp_path, short, progress=False)
    assert not (tmp_path / "saes").exists()
