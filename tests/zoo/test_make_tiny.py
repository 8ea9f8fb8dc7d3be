from pathlib import Path
from typing import Any

import pytest

from auto_circuit import load_model
from auto_circuit.errors import TrainingError
from auto_circuit.zoo import make_tiny
from auto_circuit.zoo.train_model import Recipe, train

SHORT = Recipe(max_steps=2, n_cooldown=1, batch_size=4)


def test_an_untrained_model_is_not_written(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(make_tiny, "N_TEST", 20)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with pytest.raises(
        TrainingError, match=r"After 3 steps .* 99% on ioi 0.0%, induction.*Nothing was written"
    ):
        make_tiny.make_model(tmp_path, SHORT, progress=False)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "old"]
    asked = []
    monkeypatch.setattr(
        make_tiny, "train", lambda recipe, progress: asked.append(recipe) or train(SHORT, progress=False)
    )
    assert make_tiny.main(["--out", str(tmp_path / "new"), "--seed", "3", "--steps", "7"]) == 2
    assert asked == [Recipe(seed=3, max_steps=7)]
    assert "does not reach 99%" in capsys.readouterr().err and not list((tmp_path / "new").iterdir())


def test_what_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(make_tiny, "N_TEST", 20)
    monkeypatch.setattr(make_tiny, "REQUIRED", 0.0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    measured = make_tiny.make_model(tmp_path, SHORT, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "model"]
    assert not (tmp_path / "model" / "old").exists()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for task, m in measured.items():
        assert f"| {task} | {m.accuracy:.1%} | {m.clean:.2f} | {m.corrupt:.2f} | {m.n_prompts} |" in card
    assert "3 steps" in card and "| d_model | 64 |" in card
    model = load_model(tmp_path / "model")
    assert (len(model.blocks), model.cfg.d_model, model.cfg.n_ctx) == (4, 64, 64)
    assert model.to_tokens("store, John").shape == (1, 4)
