import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, make_prompts
from transformer_lens.hook_points import HookPoint

from auto_circuit import NodeScores, PruneScores, SparseAutoencoder, load_saes, read_prompts, save_saes
from auto_circuit.cli import main

RUN = ["config.json", "prompts.json", "scores.safetensors", "circuit.json", "metrics.json", "report.html"]


@pytest.fixture(scope="module")
def given(model_root: Path, tmp_path_factory: Any) -> dict[str, str]:
    """A model folder, a folder of SAEs and a file of prompts."""
    root = tmp_path_factory.mktemp("cli")
    build_model("llama", model_root)
    torch.manual_seed(0)
    sites = ("blocks.0.hook_mlp_out", "blocks.2.hook_resid_post")
    save_saes({site: SparseAutoencoder(HookPoint(), 16, 24) for site in sites}, root / "saes")
    make_prompts(6, lengths=(6,)).save(root / "prompts.json")
    return {
        "model": str(model_root / "llama"),
        "saes": str(root / "saes"),
        "task": str(root / "prompts.json"),
    }


def find(given: dict[str, str], *extra: str) -> list[str]:
    return ["find", "--model", given["model"], "--saes", given["saes"], "--task", given["task"], *extra]


def test_help_answers_in_under_half_a_second_and_loads_nothing_heavy() -> None:
    times = []
    for verb in ([], ["find"], ["hooks"]):
        start = time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-m", "auto_circuit.cli", *verb, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        times.append(time.perf_counter() - start)
        assert "usage: auto-circuit" in out.stdout
    code = "import sys, auto_circuit, auto_circuit.cli; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
    assert min(times) < 0.5


def test_hooks(given: dict[str, str], capsys: Any) -> None:
    assert main(["hooks", "--model", given["model"]]) == 0
    out = capsys.readouterr().out
    assert "blocks.2.mlp.hook_post" in out and "[batch, seq, 40]" in out
    assert main(["hooks", "--model", given["model"], "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 21 and rows[0]["shape"] == ["batch", "seq", 24]


def test_find_writes_a_folder_that_is_enough_to_go_on_from(
    given: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "runs" / "one"
    assert main(find(given, "--out", str(out), "--prompts", "4")) == 0
    printed = capsys.readouterr().out
    assert "blocks.0.hook_mlp_out" in printed and "faithfulness" in printed and "latent " in printed
    assert sorted(path.name for path in out.iterdir()) == sorted(RUN)
    config = json.loads((out / "config.json").read_text())
    assert config["arguments"]["prompts"] == 4 and config["versions"]["torch"] == torch.__version__
    assert len(config["saes"]["blocks.0.hook_mlp_out"]["fingerprint"]) == 16
    scores = NodeScores.load(out / "scores.safetensors")
    assert len(scores) == 34
    circuit = json.loads((out / "circuit.json").read_text())
    metrics = json.loads((out / "metrics.json").read_text())["faithfulness_curve"]
    near = [k for k, f in zip(metrics["sizes"], metrics["faithfulness"], strict=True) if 0.9 <= f <= 1.1]
    assert len(circuit["nodes"]) == circuit["size"] == near[0] and metrics["n_prompts"] == 4
    assert 0.9 <= circuit["faithfulness"] <= 1.1 and circuit["reached"]
    names = [node["name"] for node in circuit["nodes"]]
    assert names == [node.name for node in scores.top(len(names))]
    from conftest import WordTokens

    assert len(read_prompts(out / "prompts.json", WordTokens())) == 4
    assert "<script" not in (out / "report.html").read_text()


@pytest.mark.parametrize(
    "extra",
    [
        ["--no-error-nodes", "--ablation", "zero"],
        ["--per-position", "--ig-steps", "2", "--signed", "--ablation", "mean"],
        ["--max-latents", "3", "--sites", "blocks.0.hook_mlp_out", "--objective", "answer_log_prob"],
    ],
)
def test_options(given: dict[str, str], extra: list[str], capsys: Any) -> None:
    assert main(find(given, "--json", "--prompts", "3", "--top", "2", *extra)) == 0
    found = json.loads(capsys.readouterr().out)
    curve = found["faithfulness_curve"]
    assert curve["error_nodes"] != ("--no-error-nodes" in extra) and curve["n_prompts"] == 3
    assert curve["sizes"][-1] == (4 if "--sites" in extra else 34 * 7 if "--per-position" in extra else 32)


def test_neurons(given: dict[str, str], capsys: Any) -> None:
    arguments = ["find", "--model", given["model"], "--neurons", "1,2", "--task", given["task"]]
    assert main([*arguments, "--prompts", "2"]) == 0
    assert "blocks.1.mlp.hook_post" in capsys.readouterr().out
    assert main([*arguments[:-3], "1,x", *arguments[-2:]]) == 2
    assert "separated by commas" in capsys.readouterr().err
    assert main([*arguments, "--sites", "blocks.1.mlp.hook_post"]) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "/no/such/folder"}, "there is no such folder"),
        ({"saes": "/no/such/folder"}, "is no folder"),
        ({"task": "ioo"}, "Nearest: ioi"),
        ({"task": "none.json"}, "Cannot read prompts"),
        ({"model": "{model}", "--device": "cuda:7"}, "Cannot compute on device 'cuda:7'"),
        ({"--out": "{task}"}, "is a file"),
        ({"--out": "{saes}"}, "no results folder"),
        ({"--out": "/proc/none"}, "Cannot write results"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    given: dict[str, str], change: dict[str, str], words: str, capsys: Any
) -> None:
    change = {key: value.format(**given) for key, value in change.items()}
    extra = [part for key, value in change.items() if key.startswith("--") for part in (key, value)]
    assert main([*find(given | change), *extra]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err


def test_the_same_under_every_hash_seed(given: dict[str, str]) -> None:
    command = [sys.executable, "-m", "auto_circuit.cli", *find(given, "--json", "--prompts", "3")]
    outputs = {
        subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "7")
    }
    assert len(outputs) == 1 and "faithfulness_curve" in outputs.pop()


def test_numbers_must_be_numbers(given: dict[str, str], capsys: Any) -> None:
    for flag in ("--prompts", "--top", "--batch-size", "--max-latents", "--ig-steps"):
        for value in ("0", "-3", "x"):
            with pytest.raises(SystemExit) as caught:
                main([*find(given), flag, value])
            assert caught.value.code == 2 and "at least 1" in capsys.readouterr().err


def test_a_call_that_fails_keeps_the_earlier_run(given: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(find(given, "--out", str(out), "--prompts", "2")) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(find(given | {"task": "ioo"}, "--out", str(out))) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main(find(given, "--out", str(out), "--prompts", "2", "--max-latents", "2")) == 0
    pruning = json.loads((out / "metrics.json").read_text())["pruning"]
    assert pruning["sites"]["blocks.0.hook_mlp_out"]["n_kept"] == 2 and pruning["kl"] > 0


def test_an_interrupted_run_keeps_what_it_had(
    given: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    from auto_circuit.metrics import faithfulness

    out = tmp_path / "run"
    assert main(find(given, "--out", str(out), "--prompts", "2")) == 0
    monkeypatch.setattr(faithfulness, "run_nodes", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(find(given, "--out", str(out), "--prompts", "3")) == 130
    kept = sorted(path.name for path in out.iterdir())
    assert kept == [
        "config.json",
        "prompts.json",
        "report.html",
        "scores.safetensors",
    ]  # nothing of the old run
    assert "not measured" in (out / "report.html").read_text()
    assert len(load_saes(given["saes"])) == 2


def test_find_edges_writes_scores_that_are_read_without_the_model(
    given: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "edges"
    assert main([*find(given), "--level", "edge", "--out", str(out), "--top", "2"]) == 0
    said = capsys.readouterr().out
    assert "Left out: blocks.2.hook_resid_post" in said and "edges kept" in said
    assert sorted(path.name for path in out.iterdir()) == sorted([*RUN, "scores.json"])
    scores = PruneScores.load(out / "scores.safetensors")
    circuit = json.loads((out / "circuit.json").read_text())
    metrics = json.loads((out / "metrics.json").read_text())["faithfulness_curve"]
    assert metrics["unit"] == "edges" and metrics["sizes"][-1] == len(scores)
    assert circuit["size"] == len(circuit["edges"])
    best = scores.edges(1)[0]
    assert circuit["edges"][0]["name"] == best.name and best.source in said
    assert best.name.split("->")[0] in (out / "report.html").read_text()
    assert json.loads((out / "config.json").read_text())["arguments"]["left_out"] == [
        "blocks.2.hook_resid_post"
    ]


def test_find_edges_of_a_plain_model_by_other_methods_and_positions(
    given: dict[str, str], capsys: Any
) -> None:
    plain = ["find", "--model", given["model"], "--task", given["task"], "--level", "edge", "--json"]
    options = ["--method", "mask-ig", "--ig-steps", "2", "--patch-type", "edge", "--per-position"]
    assert main([*plain, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["faithfulness_curve"]["patch_type"] == "edge" and found["edges"][0]["position"] is not None
    assert main([*plain, "--ablation", "mean_both"]) == 0
    assert json.loads(capsys.readouterr().out)["faithfulness_curve"]["ablation"] == "mean_both"


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--level", "edge", "--sites", "blocks.2.hook_resid_post"], "cuts it"),
        (["--level", "edge", "--ig-steps", "3"], "--ig-steps with --method eap"),
        (["--method", "mask-ig"], "--method means nothing with --level node"),
        (["--patch-type", "edge"], "--patch-type means nothing"),
        (["--level", "edge", "--patch-type", "edge", "--ablation", "zero"], "goes with --ablation resample"),
        (["--level", "edge", "--memory-limit", "0.000001"], "memory_limit"),
    ],
)
def test_options_of_edges_that_do_not_fit_say_why(
    given: dict[str, str], capsys: Any, extra: list[str], sentence: str
) -> None:
    assert main([*find(given), *extra]) == 2
    assert sentence in capsys.readouterr().err


def test_nodes_need_saes(given: dict[str, str], capsys: Any) -> None:
    assert main(["find", "--model", given["model"], "--task", given["task"]]) == 2
    assert "--saes DIR or --neurons" in capsys.readouterr().err


def test_the_choices_are_those_of_the_library() -> None:
    from auto_circuit.cli import find as verb
    from auto_circuit.metrics.objectives import OBJECTIVES
    from auto_circuit.patching.ablations import Ablation
    from auto_circuit.prune_algos.edge_attribution import METHODS

    assert tuple(Ablation) == verb.ABLATIONS and tuple(METHODS) == verb.METHODS
    assert tuple(OBJECTIVES) == verb.OBJECTIVE_NAMES


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: Any) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = torch.randint(3, 57, (120, 40), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("\n".join(" ".join(f"w{i}" for i in row) for row in words))
    return str(path)


def train(given: dict[str, str], text_file: str, out: Path, *extra: str) -> list[str]:
    sizes = ["--tokens", "640", "--batch-size", "64", "--latents", "40", "--l0", "4", "--context", "16"]
    return ["train", "--model", given["model"], "--text", text_file, "--out", str(out), *sizes, *extra]


def test_train_then_measure_then_find(
    given: dict[str, str], text_file: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    # A family of sites, and prompts beside the text.
    both = ["--sites", "hook_mlp_out,blocks.1.attn.hook_z", "--task", given["task"], "--task-share", "0.3"]
    assert main(train(given, text_file, out, *both)) == 0
    shown = capsys.readouterr().out
    assert all(f"blocks.{layer}.hook_mlp_out" in shown for layer in range(3)) and "FVU" in shown
    assert main(train(given, text_file, out, *both)) == 2
    assert "Resume it" in capsys.readouterr().err
    assert main(train(given, text_file, out, *both, "--resume", "--json")) == 0
    rows = json.loads(capsys.readouterr().out)["sites"]
    assert len(rows) == 4 and all(row["latents"] == 40 and 0 < row["fvu"] < 2 for row in rows.values())
    measure = ["saes", "eval", "--model", given["model"], "--saes", str(out), "--context", "16"]
    assert main([*measure, "--text", text_file, "--tokens", "200", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert set(measured) == set(rows) and all(row["kl_spliced"] > 0 for row in measured.values())
    assert main([*measure, "--task", given["task"], "--tokens", "20", "--no-losses"]) == 0
    assert "FVU" in capsys.readouterr().out
    found = ["find", "--model", given["model"], "--saes", str(out), "--task", given["task"], "--json"]
    assert main(found) == 0
    assert json.loads(capsys.readouterr().out)["faithfulness_curve"]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--sites", "blocks.0.hook_mlp_ou"], "blocks.0.hook_mlp_out"),
        (["--sites", "hook_mlp_out", "--l0", "-3"], "l0 must be a number above 0"),
        (["--sites", "hook_mlp_out", "--task", "ioj"], "ioi"),
        (["--sites", ","], "No sites were given"),
        (["--sites", "hook_mlp_out", "--text", "/nowhere/at/all.txt"], "no text file or folder"),
        (["--sites", "hook_mlp_out", "--context", "33"], "at most 32"),
    ],
)
def test_train_refuses_with_a_sentence(
    extra: list[str], says: str, given: dict[str, str], text_file: str, tmp_path: Path, capsys: Any
) -> None:
    assert main(train(given, text_file, tmp_path / "run", *extra)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_train_flags_are_those_of_the_library() -> None:
    from auto_circuit.cli import train as verb
    from auto_circuit.model_utils.sparse_autoencoders.training import config

    assert config.ARCHITECTURE_NAMES == verb.ARCHITECTURES
    assert config.LOSSES == verb.LOSSES and config.PENALTIES == verb.PENALTIES
    defaults = config.TrainingConfig()
    for _, field, _, _ in verb._NUMBERS:
        value = getattr(defaults, field)
        shown = verb._default(field)
        assert shown == "not given" if value is None else float(shown) == value, field
