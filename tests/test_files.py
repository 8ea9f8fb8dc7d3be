from pathlib import Path

import pytest
import torch

from auto_circuit.errors import nearest, unknown_name
from auto_circuit.files import replacing, replacing_folder, write_json, write_tensors


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert path.read_text() == '{\n  "a": 1\n}\n' and list(path.parent.iterdir()) == [path]
    write_tensors(path, {"t": torch.ones(2, 3).T})
    assert list(path.parent.iterdir()) == [path] and path.stat().st_mode & 0o444 == 0o444


def test_nearest_names() -> None:
    assert nearest("blocks.1.hook_mlp_ot", ["blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post"])[0].endswith(
        "mlp_out"
    )
    assert nearest("zzz", ["a", "b"]) == ["a", "b"]
    assert "Nearest: ioi" in str(unknown_name("task", "ioo", ["ioi"])) and "none at all" in str(
        unknown_name("x", "y", [])
    )


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "model"
    with replacing_folder(folder) as new:
        (new / "a").touch(0o600)
        assert not folder.exists()
    assert (folder / "a").stat().st_mode & 0o444 == 0o444
    with pytest.raises(ZeroDivisionError), replacing_folder(folder) as new:
        (new / "b").touch()
        _ = 1 / 0
    real = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: real(self, to if self.name != "new" else tmp_path / "no" / "way")
    )
    with pytest.raises(OSError, match="no"), replacing_folder(folder) as new:
        (new / "c").touch()
    monkeypatch.undo()
    assert [path.name for path in folder.parent.rglob("*")] == ["model", "a"]
    with replacing_folder(folder) as new:
        (new / "d").touch()
    assert [path.name for path in folder.parent.rglob("*")] == ["model", "d"]
