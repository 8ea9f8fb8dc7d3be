"""Whole training runs: what they leave, resuming bit for bit, killing, several processes."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, build_model, make_prompts

from auto_circuit import load_saes, sae_model, sae_quality, token_batches
from auto_circuit.errors import CheckpointError, InputError, TrainingError
from auto_circuit.model_utils.sparse_autoencoders.training.activation_cache import CachedActivations
from auto_circuit.model_utils.sparse_autoencoders.training.config import TrainingConfig
from auto_circuit.model_utils.sparse_autoencoders.training.trainer import train_saes

SITES = ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]
HERE = Path(__file__).resolve()


def text(n: int = 30) -> list[str]:
    words = torch.randint(3, VOCAB - 3, (n, 60), generator=torch.Generator().manual_seed(0)).tolist()
    return [" ".join(f"w{i}" for i in row) for row in words]


def config(**settings: Any) -> TrainingConfig:
    defaults: dict[str, Any] = dict(n_tokens=1_920, batch_size=64, n_latents=40, l0=4, context_length=16)
    defaults |= dict(tokens_per_pass=96, buffer_tokens=256, dead_after_tokens=200)
    return TrainingConfig(**(defaults | settings))


def states(saes: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{site}/{name}": t for site, sae in saes.items() for name, t in sae.state_dict().items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    x, y = states(a), states(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
    def callback(metrics: dict[str, Any]) -> None:
        if metrics["step"] >= step:
            raise Stop

    return callback


def train(
    model: Any, source: Any = None, cfg: TrainingConfig | None = None, **options: Any
) -> dict[str, Any]:
    options = {"progress": False, "log_every": 1, **options}
    return train_saes(model, SITES, source or text(), cfg or config(), **options)


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "gated"])
def test_a_stopped_run_resumes_bit_for_bit(
    architecture: str, shared_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = shared_model("llama")
    source = [(text(), 3), (make_prompts(8, lengths=(5, 7)), 1)]
    cfg = config(architecture=architecture, loss="local_then_end_to_end", end_to_end_share=0.3)
    whole = train(model, source, cfg, out=tmp_path / "whole")
    for number, step in enumerate((1, 11, 24, 29)):  # three local steps, and end-to-end ones after step 21
        with pytest.raises(Stop):
            train(
                model, source, cfg, out=tmp_path / "parts", resume=number > 0,
                checkpoint_seconds=0.0 if number != 1 else 1e9, callbacks=[stop_at(step)],
            )  # fmt: skip
    parts = train(model, source, cfg, out=tmp_path / "parts", resume=True)
    assert same(whole, parts)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 30
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()
    assert same(parts, train(model, source, cfg, out=tmp_path / "parts", resume=True))  # loaded
    assert same(parts, load_saes(tmp_path / "parts"))


def test_what_a_run_leaves(shared_model: Callable[..., Any], tmp_path: Path) -> None:
    model = shared_model("gpt2")
    train(model)  # whatever a first run sets up
    seen: list[dict[str, Any]] = []
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    saes = train(model, out=tmp_path / "run", callbacks=[seen.append], log_every=7)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert [m["step"] for m in seen] == [7, 14, 21, 28, 30] and seen[-1]["tokens"] == 1_920
    assert {f"{site}/{name}" for site in SITES for name in ("loss", "fvu", "l0", "dead")} < set(seen[0])
    assert [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ] == seen
    cfg = json.loads((tmp_path / "run" / SITES[0] / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu" and cfg["metadata"]["training_architecture"] == "batchtopk"
    assert cfg["metadata"]["hook_name"] == SITES[0] and cfg["d_sae"] == 40
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    tokens = torch.randint(3, VOCAB, (2, 7))
    with sae_model(model, saes) as spliced:  # they fit
        assert spliced(tokens).isfinite().all()
    assert not any(p.requires_grad is False for p in model.parameters())


def test_more_training_explains_more(shared_model: Callable[..., Any]) -> None:
    model = shared_model("gpt2")
    fvus: list[float] = []
    train(model, cfg=config(n_tokens=64 * 150), callbacks=[lambda m: fvus.append(m[f"{SITES[0]}/fvu"])])
    assert sum(fvus[-10:]) < 0.6 * sum(fvus[:10])


def test_end_to_end_training_lowers_the_divergence(shared_model: Callable[..., Any]) -> None:
    model = shared_model("gpt2")
    seen: list[dict[str, Any]] = []
    cfg = config(loss="end_to_end", n_tokens=64 * 80, architecture="topk")
    train(model, cfg=cfg, callbacks=[seen.append])
    first, last = (sum(m["kl"] for m in part) for part in (seen[:10], seen[-10:]))
    assert last < 0.5 * first and all("downstream" in m for m in seen)


def test_cached_activations_are_recorded_once_and_give_the_same_saes(
    shared_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = shared_model("gpt2")
    first = train(model, cache=tmp_path / "cache")
    passes: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda *_args: passes.append(1))
    try:
        again = train(model, cache=tmp_path / "cache")
    finally:
        handle.remove()
    assert not passes and same(first, again)
    few = train(model, cache=tmp_path / "few", cache_tokens=300)
    assert 300 <= CachedActivations(tmp_path / "few").n_rows < 400 and not same(first, few)
    cached = CachedActivations(tmp_path / "cache")
    alone = train_saes(None, None, cached, config(), progress=False)
    assert same(first, alone)
    with pytest.raises(InputError, match="End-to-end"):
        train_saes(None, None, cached, config(loss="end_to_end"), progress=False)
    with pytest.raises(InputError, match="something else"):
        train(model, cfg=config(context_length=12), cache=tmp_path / "cache")
    with pytest.raises(InputError, match="needs a model"):
        train_saes(None, SITES, text(), config())


def test_a_folder_is_not_overwritten(shared_model: Callable[..., Any], tmp_path: Path) -> None:
    model = shared_model("gpt2")
    train(model, out=tmp_path / "run")
    with pytest.raises(InputError, match="Resume it"):
        train(model, out=tmp_path / "run")
    with pytest.raises(InputError, match="another config.*l0"):
        train(model, cfg=config(l0=5), out=tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="another data"):
        train(model, text(31), out=tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="another data.*cached"):
        train(model, out=tmp_path / "run", resume=True, cache=tmp_path / "cache")
    with pytest.raises(InputError, match="another model"):
        train(shared_model("llama"), out=tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("gpt2")

    def break_it(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 12:
            with torch.no_grad():
                model.blocks[0].mlp.out.original_component.bias.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"blocks.0.hook_mlp_out is not finite at step 1\d.*step 1\d"):
        train(
            model, cfg=config(n_tokens=6_400), out=tmp_path / "run", callbacks=[break_it],
            checkpoint_seconds=0.0,
        )  # fmt: skip
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(t.isfinite().all() for coder in state["coders"].values() for t in coder.values())
    with pytest.raises(TrainingError, match="before the first step"):
        train(model)


def test_an_interrupt_saves_and_the_next_run_goes_on(
    shared_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = shared_model("gpt2")

    def interrupt(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 9:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(model, out=tmp_path / "run", callbacks=[interrupt])
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 9
    assert same(train(model), train(model, out=tmp_path / "run", resume=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _script(body: str, out: Path) -> list[str]:
    paths = [str(HERE.parents[3]), str(HERE.parent)]
    head = f"import sys\nsys.path[:0] = {paths!r}\nimport conftest, test_trainer as t\n"
    path = out / "script.py"
    path.write_text(head + body)
    return [str(path)]


def _environment() -> dict[str, str]:
    root = str(HERE.parents[4])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


@pytest.mark.processes
def test_killing_a_run_twenty_times_changes_nothing(tmp_path: Path) -> None:
    body = f"""
import os, random, signal, time
from pathlib import Path
out = Path({str(tmp_path)!r})
model = conftest.build_model("gpt2", out / "models")

def run(name):  # in a fork, so that each attempt starts from the same process
    child = os.fork()
    if child == 0:
        try:
            t.train(model, out=out / name, resume=True, checkpoint_seconds=0.0)
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return child

start = time.monotonic()
assert os.waitpid(run("whole"), 0)[1] == 0
took = time.monotonic() - start
draw, kills = random.Random(0), 0
while kills < 20:
    child = run("killed")
    time.sleep(draw.uniform(0.0, 0.25 * took))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "a resumed run failed"
        break
    kills += 1
print("kills", kills)
assert os.waitpid(run("killed"), 0)[1] == 0
"""
    done = subprocess.run(
        [sys.executable, *_script(body, tmp_path)], env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills" in done.stdout
    whole, killed = (load_saes(tmp_path / name) for name in ("whole", "killed"))
    assert same(whole, killed)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert not list((tmp_path / "killed").glob(".checkpoint*"))  # nor halves left behind


@pytest.mark.processes
def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    cases = [("batchtopk", "local"), ("jumprelu", "local"), ("relu", "end_to_end")]
    body = f"""
from pathlib import Path
out = Path({str(tmp_path)!r})
model = conftest.build_model("gpt2", out / "models")
for architecture, loss in {cases!r}:
    cfg = t.config(architecture=architecture, loss=loss, dead_after_tokens=100)
    cache = out / "two-cache" if architecture == "jumprelu" else None
    t.train(model, cfg=cfg, out=out / f"two-{{architecture}}", cache=cache)
"""
    model = build_model("gpt2", tmp_path / "models")
    for architecture, loss in cases:
        cfg = config(architecture=architecture, loss=loss, dead_after_tokens=100)
        cache = tmp_path / "one-cache" if architecture == "jumprelu" else None
        train(model, cfg=cfg, out=tmp_path / f"one-{architecture}", cache=cache)
    port = 20_000 + random.Random(str(tmp_path)).randrange(20_000)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run(
        [sys.executable, *launch, *_script(body, tmp_path)],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    for architecture, _ in cases:
        curves = []
        for name in ("one", "two"):
            lines = (tmp_path / f"{name}-{architecture}" / "metrics.jsonl").read_text().splitlines()
            curves.append([json.loads(line) for line in lines])
        assert len(curves[0]) == len(curves[1]) == 30
        for a, b in zip(*curves, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-4), (architecture, a["step"], key)


def test_one_flipped_bit_in_a_checkpoint_is_seen(shared_model: Callable[..., Any], tmp_path: Path) -> None:
    model = shared_model("gpt2")
    with pytest.raises(Stop):
        train(model, out=tmp_path / "run", callbacks=[stop_at(5)], checkpoint_seconds=0.0)
    path = tmp_path / "run" / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="Cannot read the checkpoint.*checksum"):
        train(model, out=tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="not finished"):
        load_saes(tmp_path / "run")


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_published_batch_topk_saes_have_the_wanted_l0(
    architecture: str, shared_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = shared_model("gpt2")
    saes = train(model, cfg=config(architecture=architecture, n_tokens=6_400), out=tmp_path / "run")
    tokens = token_batches(model, text(), context_length=16)
    quality = sae_quality(model, saes, tokens, n_tokens=1_500, losses=False, progress=False)
    final = json.loads((tmp_path / "run" / "trained.json").read_text())
    for site, measured in quality.items():
        assert measured.l0 == pytest.approx(4, abs=0.4)
        assert final[f"{site}/l0"] == pytest.approx(measured.l0, abs=0.4)  # what is said is what is published
        assert final[f"{site}/fvu"] == pytest.approx(measured.fvu, rel=0.15)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"log_every": 0}, "log_every"),
        ({"cache_tokens": 0, "cache": "x"}, "cache_tokens"),
        ({"cache_tokens": 5}, "cache=DIR"),
        ({"cfg": {"l0": 3}}, "TrainingConfig"),
        ({"cfg": TrainingConfig(l0=50, n_latents=40)}, "among 40"),
        ({"cfg": TrainingConfig(loss="end_to_end"), "cache": "x"}, "Leave cache out"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_done(
    options: dict[str, Any], says: str, shared_model: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        train(shared_model("gpt2"), out="run", **options)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="TransformerLens model"):
        train("tiny")


def test_training_inside_inference_mode(shared_model: Callable[..., Any]) -> None:
    model = shared_model("gpt2")
    with torch.inference_mode():
        inside = train(model)
    assert same(inside, train(model))
