"""What the README shows works as it stands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from auto_circuit.cli import parser

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.real_model
def test_the_examples_run_as_printed(
    smollm2: Any, fixtures: Path, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    import auto_circuit

    code, edges = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(auto_circuit, "load_model", lambda name: smollm2, raising=False)
    short = code.replace("n=32", "n=4").replace("path/to/saes", str(fixtures / "smollm2_saes"))
    names: dict[str, Any] = {}
    exec(compile(short, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "blocks.14.hook_resid_post/error" in printed and "10245: 1.0" in printed
    names["saes"].pop("blocks.14.hook_resid_post")
    exec(compile(edges, "README.md", "exec"), names)
    assert "blocks.23.attn/head.3->end" in capsys.readouterr().out
    assert names["curve"].faithfulness[-1] == 1 and (tmp_path / "scores.json").is_file()
    assert names["logits"][0].shape == (4, smollm2.cfg.d_vocab)


def test_the_commands_are_commands() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("auto-circuit ")]
    assert len(commands) == 3
    for command in commands:
        parser().parse_args(command)
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
