"""The folder of a run: what it refuses, and what is left after an interruption."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_circuit.errors import InputError, TrainingError
from auto_circuit.model_utils.sparse_autoencoders.training.run_folder import (
    CHECKPOINT,
    DONE,
    METRICS,
    SETTINGS,
    TrainingFolder,
)

CONFIG_AND_DATA: dict[str, Any] = {
    "config": {"l0": 3.0, "groups": (0.5, 1.0)},
    "data": {"text": {"strings": 3}},
}


def settings(**config: Any) -> dict[str, Any]:
    return CONFIG_AND_DATA | {"config": CONFIG_AND_DATA["config"] | config}


def open_folder(path: Path, resume: bool = False, **config: Any) -> TrainingFolder:
    return TrainingFolder(path, settings(**config), resume=resume)


def metrics_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / METRICS).read_text().splitlines()]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("made", [True, False])
def test_a_new_or_empty_folder_begins_a_run(resume: bool, made: bool, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    if made:
        path.mkdir(parents=True)
    folder = open_folder(path, resume)
    assert json.loads((path / SETTINGS).read_text()) == json.loads(json.dumps(CONFIG_AND_DATA))
    assert not folder.is_done and folder.load() is None and folder.checkpoint_step is None
    assert [entry.name for entry in path.iterdir()] == [SETTINGS]


def test_a_run_is_gone_on_with_only_when_asked(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    with pytest.raises(InputError, match="holds a training run already. Resume it"):
        open_folder(tmp_path)
    open_folder(tmp_path, resume=True)
    folder.finish({"step": 3})
    with pytest.raises(InputError, match="holds a finished run already"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, resume=True).is_done


def test_folders_of_other_things_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    for resume in (True, False):
        with pytest.raises(
            InputError, match=r"holds thesis.txt and no training.json, so it is no training run"
        ):
            open_folder(tmp_path, resume)
        with pytest.raises(InputError, match=r"Cannot write to .*thesis\.txt"):
            open_folder(tmp_path / "thesis.txt", resume)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    open_folder(tmp_path, l0=3.0, seed=1)
    with pytest.raises(InputError, match=r"another config: there {'l0': 3.0}, now {'l0': 4.0}\. Resume with"):
        open_folder(tmp_path, resume=True, l0=4.0, seed=1)
    with pytest.raises(InputError, match=r"there {'new': None}, now {'new': 5}"):
        open_folder(tmp_path, resume=True, seed=1, new=5)
    with pytest.raises(InputError, match=r"there {'seed': 1}, now {'seed': None}"):
        open_folder(tmp_path, resume=True)
    more = settings(seed=1) | {"model": {"name": "m"}}
    with pytest.raises(InputError, match=r"another model: there None, now {'name': 'm'}"):
        TrainingFolder(tmp_path, more, resume=True)
    less = {"config": settings(seed=1)["config"]}
    with pytest.raises(InputError, match="another data: there .*, now None"):
        TrainingFolder(tmp_path, less, resume=True)
    open_folder(tmp_path, resume=True, l0=3, seed=1)  # 3 is 3.0


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"3", b"\xff"])
def test_damaged_settings_are_named(content: bytes, tmp_path: Path) -> None:
    open_folder(tmp_path)
    (tmp_path / SETTINGS).write_bytes(content)
    with pytest.raises(InputError, match=r"training\.json"):
        open_folder(tmp_path, resume=True)


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    generator = torch.Generator().manual_seed(3)
    state = {
        "step": 7,
        "coders": {"site": {"w": torch.randn(3, 2), "n": torch.tensor(3)}},
        "buffer": {"generator": generator.get_state(), "rows": {"tail": [1, 2], "epoch": 0}},
    }
    folder.save(state)
    assert folder.checkpoint_step == 7
    other = open_folder(tmp_path, resume=True)
    assert other.checkpoint_step is None
    found = other.load()
    assert found is not None and other.checkpoint_step == 7
    assert torch.equal(found["coders"]["site"]["w"], state["coders"]["site"]["w"])
    assert torch.equal(found["buffer"]["generator"], generator.get_state())
    assert found["buffer"]["rows"] == {"tail": [1, 2], "epoch": 0} and found["step"] == 7


def _full_disk(*_args: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64")


def test_a_checkpoint_that_is_not_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(tmp_path)
    folder.save({"step": 7})
    before = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(Exception, match="pickle"):
        folder.save({"step": 8, "cannot be stored": lambda: None})
    with monkeypatch.context() as full:
        full.setattr(torch, "save", _full_disk)
        with pytest.raises(TrainingError, match="step 8.*unexpected pos.*step 7"):
            folder.save({"step": 8})
    assert folder.checkpoint_step == 7 and sorted(entry.name for entry in tmp_path.iterdir()) == before
    assert open_folder(tmp_path, resume=True).load() == {"step": 7}


def _text(path: Path) -> None:
    path.write_text("no checkpoint")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [
        _text,
        _half,
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({"steps": 3}, path),
        lambda path: torch.save([3], path),
        lambda path: torch.save({"step": "x"}, path),
    ],
)
def test_a_damaged_checkpoint_is_named_and_metrics_stay(
    damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = open_folder(tmp_path)
    folder.log({"step": 1})
    folder.save({"step": 1, "w": torch.ones(100)})
    damage(tmp_path / CHECKPOINT)
    with pytest.raises(TrainingError, match=r"Cannot read the checkpoint .*checkpoint\.pt.*Delete it"):
        open_folder(tmp_path, resume=True).load()
    assert metrics_of(tmp_path) == [{"step": 1}]


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    import pickle

    ran = tmp_path / "ran"

    class Trick:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    folder = open_folder(tmp_path / "run")
    (folder.path / CHECKPOINT).write_bytes(pickle.dumps({"step": Trick()}, protocol=2))
    with pytest.raises(TrainingError):
        folder.load()
    torch.save({"step": Trick()}, folder.path / CHECKPOINT)
    with pytest.raises(TrainingError):
        folder.load()
    assert not ran.exists()


def test_metrics_after_the_checkpoint_are_taken_off(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for step in (2, 4, 6):
        folder.log({"step": step, "blocks.0/loss": step / 3})
        if step == 4:
            folder.save({"step": 4})
    other = open_folder(tmp_path, resume=True)
    other.load()
    assert metrics_of(tmp_path) == [{"step": 2, "blocks.0/loss": 2 / 3}, {"step": 4, "blocks.0/loss": 4 / 3}]
    other.log({"step": 6})
    assert [metrics["step"] for metrics in metrics_of(tmp_path)] == [2, 4, 6]
    (tmp_path / CHECKPOINT).unlink()
    assert open_folder(tmp_path, resume=True).load() is None
    assert metrics_of(tmp_path) == []


@pytest.mark.parametrize(
    "half", [b'{"step": 3', b"\x00\x00\x00", b"\xff\xfe", b"null\n", b"[]\n", b'{"tokens": 3}\n']
)
def test_half_a_line_of_metrics_is_taken_off(half: bytes, tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.save({"step": 9})
    folder.log({"step": 1})
    with (tmp_path / METRICS).open("ab") as file:
        file.write(half)
    folder.load()
    folder.log({"step": 3})
    assert metrics_of(tmp_path) == [{"step": 1}, {"step": 3}]


def test_a_finished_run_has_its_metrics_and_no_checkpoint(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.save({"step": 4})
    folder.finish({"step": 5, "site/fvu": 0.25})
    assert folder.is_done and not (tmp_path / CHECKPOINT).exists()
    assert json.loads((tmp_path / DONE).read_text()) == {"step": 5, "site/fvu": 0.25}
    folder.finish({"step": 5})  # without a checkpoint, too
