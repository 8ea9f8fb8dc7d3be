"""Our side of the training benchmarks; sae_lens_worker.py is the peer's, with the same options and answers.

`cached`  trains one SAE from the activations of a file, which are written as cached activations first
`sites`   trains a TopK SAE at each of several sites of a model, from one pass

Each prints one line of JSON. Everything that is not an option is a default of `TrainingConfig`. Times are
those of `train_saes`; a step is from one step's metrics to the next. What is measured on held-out activations
is the SAE as published, with the formulas of the peer's worker.
"""

import argparse
import gzip
import itertools
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from make_activations import HELD_OUT, contexts
from safetensors.torch import load_file, save_file
from torch import Tensor

import auto_circuit as ac
from auto_circuit.files import write_json
from auto_circuit.model_utils.sparse_autoencoders.training.activation_cache import CachedActivations

WARM_UP_STEPS = 10
SHARD_ROWS = 16_384


def measure(sae: Any, x: Tensor) -> dict[str, float]:
    """Measure an SAE on held-out activations."""
    mean = x.mean(0, dtype=torch.float64)
    wrong = total = n_active = 0.0
    fired = torch.zeros(sae.n_latents, dtype=torch.bool)
    for rows in x.split(2_048):
        with torch.inference_mode():
            latents = sae.encode(rows)
            out = sae.decode(latents)
        wrong += (rows.double() - out.double()).square().sum().item()
        total += (rows.double() - mean).square().sum().item()
        active = latents != 0
        n_active += active.sum().item()
        fired |= active.any(0)
    return {"fvu": wrong / total, "l0": n_active / len(x), "dead_share": 1 - fired.double().mean().item()}


def as_cache(x: Tensor, folder: Path) -> CachedActivations:
    """Write activations as `record_activations` does."""
    shards = []
    for number, rows in enumerate(x.split(SHARD_ROWS)):
        name = f"shard_{number:05d}.safetensors"
        save_file({"site": rows.contiguous()}, folder / name)
        shards.append({"file": name, "rows": len(rows)})
    manifest = {"format": "auto_circuit.activations", "version": 1, "sites": {"site": x.shape[1]}}
    manifest |= {"made_of": {}, "n_rows": len(x), "shards": shards, "next": {}}
    write_json(folder / "manifest.json", manifest)
    return CachedActivations(folder)


def train(model: Any, sites: Any, text: Any, config: ac.TrainingConfig) -> tuple[dict[str, Any], dict]:
    """Train; return the SAEs and the times."""
    times: list[float] = []
    start, cpu = time.perf_counter(), time.process_time()
    saes = ac.train_saes(
        model,
        sites,
        text,
        config,
        progress=False,
        log_every=1,
        callbacks=[lambda _metrics: times.append(time.perf_counter())],
    )
    end, cpu = time.perf_counter(), time.process_time() - cpu
    step = statistics.median(b - a for a, b in itertools.pairwise(times[WARM_UP_STEPS:]))
    line = {
        "seconds_per_step": step,
        "total_seconds": end - start,
        "cpu_seconds": cpu,
        "steps": config.n_steps,
        "threads": torch.get_num_threads(),
    }
    return saes, line


def cached(args: argparse.Namespace) -> dict[str, Any]:
    """Train one SAE from activations in a file."""
    architecture = {"standard": "relu"}.get(args.architecture, args.architecture)
    with tempfile.TemporaryDirectory() as folder:
        rows = as_cache(load_file(args.activations)["x"], Path(folder))
        saes, line = train(None, None, rows, _config(args, args.steps * args.batch, architecture))
    line = {"case": args.architecture, "samples_per_s": args.batch / line["seconds_per_step"], **line}
    if args.held_out is not None:
        line |= measure(saes["site"], load_file(args.held_out)["x"])
    return line


def sites(args: argparse.Namespace) -> dict[str, Any]:
    """Train a TopK SAE at each site, all from one pass of the model."""
    from auto_circuit.data.text import TextTokens
    from auto_circuit.model_utils.sparse_autoencoders.training.activations import ModelActivations

    model = ac.load_model(args.model)
    with gzip.open(args.text, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    first = len(lines) - int(HELD_OUT * len(lines))
    n_tokens = args.tokens // args.batch * args.batch
    config = _config(args, n_tokens, "topk", context_length=args.context)
    text = TextTokens(
        lambda: ((line, False) for line in lines[:first]), model.tokenizer, args.context, {"lines": first}
    )
    saes, line = train(model, args.sites, text, config)
    line |= {"case": "sites", "sites": len(args.sites), "seconds": line.pop("total_seconds")}
    line["samples_per_s"] = n_tokens / line["seconds"]
    recorded = ModelActivations(model, args.sites, text, excluded=[model.tokenizer.bos_token_id])
    held_out = itertools.islice(
        contexts(lines[first:], model.tokenizer, args.context), -(-args.held_out_tokens // (args.context - 1))
    )
    parts = [recorded.run(tokens) for tokens in torch.stack(list(held_out)).split(16)]
    line["by_site"] = {
        site: measure(sae, torch.cat([part[site] for part in parts])) for site, sae in saes.items()
    }
    return line


def _config(args: argparse.Namespace, n_tokens: int, architecture: str, **more: Any) -> ac.TrainingConfig:
    return ac.TrainingConfig(
        architecture=architecture,
        l0=args.l0,
        n_latents=args.latents,
        batch_size=args.batch,
        n_tokens=n_tokens,
        learning_rate=args.learning_rate,
        seed=args.seed,
        **more,
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Train SAEs with our trainer, and print one line of JSON.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cached", help="one SAE from activations in a file")
    one.add_argument("--activations", type=Path, required=True)
    one.add_argument("--held-out", type=Path)
    one.add_argument("--architecture", required=True)
    one.add_argument("--steps", type=int, default=1_000)
    many = commands.add_parser("sites", help="TopK SAEs at several sites of a model")
    many.add_argument("--model", type=Path, required=True)
    many.add_argument("--text", type=Path, required=True)
    many.add_argument("--sites", type=lambda names: names.split(","), required=True)
    many.add_argument("--tokens", type=int, default=200_000)
    many.add_argument("--held-out-tokens", type=int, default=20_000)
    many.add_argument("--context", type=int, default=128)
    for command in (one, many):
        command.add_argument("--latents", type=int, default=2_048)
        command.add_argument("--l0", type=int, default=32)
        command.add_argument("--batch", type=int, default=2_048)
        command.add_argument("--learning-rate", type=float)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    print(json.dumps({"cached": cached, "sites": sites}[args.command](args)), flush=True)


if __name__ == "__main__":
    main()
