"""The folder of a training run: its settings, its metrics, its checkpoint, its SAEs.

| file | what |
|---|---|
| `training.json` | config, sites, data and model: what a resumed run must agree with |
| `metrics.jsonl` | one JSON object a line, in steps |
| `checkpoint.pt` | everything that the next step depends on; replaced whole, deleted at the end |
| `SITE/cfg.json`, `SITE/sae_weights.safetensors` | the SAEs, SAELens' layout, when training is done |
| `trained.json` | written last: the final metrics |
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from auto_circuit.errors import InputError, TrainingError, listed
from auto_circuit.files import replacing, write_json, write_text

SETTINGS, METRICS, CHECKPOINT, DONE = "training.json", "metrics.jsonl", "checkpoint.pt", "trained.json"


class TrainingFolder:
    """The folder of one training run.

    Args:
        path: where; made if need be.
        settings: what the run depends on, for JSON.
        resume: go on with the run that is there, where there is one.

    Raises:
        InputError: when it cannot be written, holds other things, holds a run and `resume` is false, or
            holds a run with other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        self._settings = json.loads(json.dumps(settings))
        self._checkpoint_step: int | None = None
        _delete_halves(self.path)
        inside = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        if inside and not (self.path / SETTINGS).is_file():
            raise InputError(
                f"{self.path} holds {listed(inside, 4)} and no {SETTINGS}, so it is no training run. Give a "
                f"new or empty folder."
            )
        if inside and not resume:
            state = "a finished run" if self.is_done else "a training run"
            raise InputError(f"{self.path} holds {state} already. Resume it, or give another folder.")
        if inside:
            self._check_same()
            return
        try:
            write_json(self.path / SETTINGS, self._settings)
        except OSError as error:
            raise InputError(f"Cannot write to {self.path}: {error}. Give another folder.") from error

    @property
    def is_done(self) -> bool:
        """Whether the run is finished: its SAEs are there."""
        return (self.path / DONE).is_file()

    def _check_same(self) -> None:
        try:
            before = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"Cannot read {self.path / SETTINGS}: {error}.") from error
        if not isinstance(before, dict):
            raise InputError(
                f"{self.path / SETTINGS} has no settings of a training run. Give another folder."
            )
        for name in {**before, **self._settings}:
            old, new = before.get(name), self._settings.get(name)
            if old == new:
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
                old, new = {key: old.get(key) for key in keys}, {key: new.get(key) for key in keys}
            raise InputError(
                f"{self.path} was trained with another {name}: there {old}, now {new}. Resume with the same, "
                f"or give another folder."
            )

    @property
    def checkpoint_step(self) -> int | None:
        """The step of the last checkpoint that this run wrote or read, or None."""
        return self._checkpoint_step

    def last_good(self) -> str:
        """Say which checkpoint there is."""
        step = self._checkpoint_step
        if step is None:
            return "No checkpoint was saved before."
        return f"The last good checkpoint, of step {step}, is in {self.path}."

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        try:
            with replacing(self.path / CHECKPOINT) as temporary:
                torch.save(dict(state), temporary)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter on a full disk
            raise TrainingError(
                f"Cannot write the checkpoint of step {state['step']} to {self.path}: "
                f"{str(error).splitlines()[0]} Is the disk full? {self.last_good()}"
            ) from error
        self._checkpoint_step = state["step"]

    def load(self) -> dict[str, Any] | None:
        """Return the checkpoint, or None, and take what came after it off the metrics.

        Raises:
            TrainingError: when it is damaged.
        """
        path = self.path / CHECKPOINT
        if not path.is_file():
            self._cut_metrics(-1)
            return None
        try:
            with zipfile.ZipFile(path) as parts:  # torch writes checksums, and does not look at them
                damaged = parts.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} does not have the checksum it was written with.")
            state = torch.load(path, map_location="cpu", weights_only=True)
            step = int(state["step"])
        except Exception as error:  # whatever a damaged file makes the readers raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise TrainingError(
                f"Cannot read the checkpoint {path}: {first}. Delete it to start again."
            ) from error
        self._cut_metrics(step)
        self._checkpoint_step = step
        return state

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def _cut_metrics(self, step: int) -> None:
        """Keep whole lines up to a step."""
        path = self.path / METRICS
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, TypeError, KeyError):  # half a line
                break
            kept.append(line + "\n")
        write_text(path, "".join(kept))

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Say that the SAEs are there, and delete the checkpoint."""
        write_json(self.path / DONE, dict(metrics))
        (self.path / CHECKPOINT).unlink(missing_ok=True)


def _delete_halves(folder: Path) -> None:
    """Delete the temporary files that a killed run left beside those it was about to replace."""
    for name in (SETTINGS, METRICS, CHECKPOINT, DONE):
        for half in folder.glob(f".{name}.*") if folder.is_dir() else ():
            half.unlink(missing_ok=True)
