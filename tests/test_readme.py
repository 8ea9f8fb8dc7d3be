"""What the README shows works as it stands."""

import gzip
import re
import shlex
from pathlib import Path
from typing import Any

import auto_circuit
from auto_circuit.cli import parser

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_examples_run_as_printed(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    code, edges, train = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code.replace("n=32", "n=8"), "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "blocks.2.hook_resid_post/" in printed and f"{len(names['scores'])}: 1.0" in printed
    exec(compile(edges, "README.md", "exec"), names)
    assert "->end" in capsys.readouterr().out
    assert names["curve"].faithfulness[-1] == 1 and (tmp_path / "scores.json").is_file()
    assert names["logits"][0].shape == (8, names["model"].cfg.d_vocab)
    with gzip.open("prose.txt.gz", "wt", encoding="utf-8") as file:
        file.write(
            "Then Mary and John found a ring near the park. The keys to the old house are lost.\n" * 200
        )
    short = train.replace("l0=32, n_tokens=2_000_000", "l0=8, n_tokens=4_096, buffer_tokens=2_048")
    assert short != train
    exec(compile(short.replace("n_tokens=20_000", "n_tokens=500"), "README.md", "exec"), names)
    assert all(quality.fvu < 1 for quality in names["quality"].values())
    assert set(auto_circuit.load_saes("runs/saes")) == set(names["quality"])


def test_the_commands_are_commands() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("auto-circuit ")]
    assert len(commands) == 6
    for command in commands:
        parser().parse_args(command)
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
