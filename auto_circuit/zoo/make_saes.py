"""Make the packaged SAEs of the tiny model: `python -m auto_circuit.zoo.make_saes --out DIR`.

1. Load `DIR/model`, and train an SAE at each site on rows of the model's own language.
2. Measure them on other sentences. Where FVU or L0 misses what is required, nothing is written.
3. Write `DIR/saes` (SAELens' layout, a folder a site) with its card.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_circuit.errors import AutoCircuitError, TrainingError
from auto_circuit.files import replacing_folder, write_text
from auto_circuit.model_utils.model_loading import load_model
from auto_circuit.model_utils.sparse_autoencoders.checkpoints import load_saes, save_saes
from auto_circuit.model_utils.sparse_autoencoders.quality import sae_quality
from auto_circuit.model_utils.sparse_autoencoders.quality_results import SiteQuality
from auto_circuit.model_utils.sparse_autoencoders.training.config import TrainingConfig
from auto_circuit.model_utils.sparse_autoencoders.training.trainer import train_saes
from auto_circuit.zoo.train_model import Recipe, sentence_batches

#: Where the SAEs stand: every layer's attention and MLP, and the stream once.
SITES = (
    *(f"blocks.{layer}.{kind}" for layer in range(4) for kind in ("hook_attn_out", "hook_mlp_out")),
    "blocks.2.hook_resid_post",
)
#: What every SAE must reach on `N_TEST` tokens of sentences from `TEST_SEED`.
MOST_FVU, MOST_L0 = 0.05, 20.0
N_TEST, TEST_SEED = 50_000, 2_000_003
RECIPE = TrainingConfig(
    architecture="batchtopk", l0=16, n_latents=512, n_tokens=3_000_000, context_length=64, seed=1
)


class Sentences:
    """Rows of whole sentences of the language, as the model was trained on.

    Args:
        tokenizer: the model's.
        seed: of the sentences.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self.restore({"n": 0})

    def next_batch(self, n_tokens: int) -> Tensor:
        """See `TokenSource`."""
        self._n += 1
        del n_tokens  # a batch of the recipe has 2,048
        return next(self._batches)

    def state(self) -> dict[str, Any]:
        """See `TokenSource`."""
        return {"n": self._n}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `TokenSource`."""
        self._batches = sentence_batches(Recipe(seed=self._seed), self._tokenizer)
        self._n = state["n"]
        for _ in range(self._n):
            next(self._batches)

    def description(self) -> dict[str, Any]:
        """See `TokenSource`."""
        return {"sentences": self._seed}


def make_saes(out: Path, config: TrainingConfig = RECIPE, *, progress: bool = True) -> dict[str, SiteQuality]:
    """Train the SAEs of `out/model`, measure them, and write `out/saes`.

    Args:
        out: the folder of the tiny model; SAEs that are there already are replaced.
        config: how to train.
        progress: show progress bars.

    Raises:
        TrainingError: when an SAE misses `MOST_FVU` or `MOST_L0`; nothing is written then.
    """
    model = load_model(out / "model")
    start, start_cpu = time.perf_counter(), time.process_time()
    saes = train_saes(model, SITES, Sentences(model.tokenizer, config.seed), config, progress=progress)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    for sae in saes.values():
        sae.metadata["cfg"]["metadata"]["model_name"] = "tiny"
    with replacing_folder(out / "saes") as folder:
        save_saes(saes, folder)
        test = Sentences(model.tokenizer, TEST_SEED)
        tokens = iter(lambda: test.next_batch(0), None)
        measured = sae_quality(model, load_saes(folder), tokens, n_tokens=N_TEST, progress=progress)
        missed = [
            f"{site}: FVU {quality.fvu}, L0 {quality.l0:.1f}"
            for site, quality in measured.items()
            if quality.fvu is None or quality.fvu > MOST_FVU or quality.l0 > MOST_L0
        ]
        if missed:
            raise TrainingError(
                f"Required are FVU ≤ {MOST_FVU} and L0 ≤ {MOST_L0:g}; missed by {'; '.join(missed)}. "
                f"Nothing was written; train on more tokens."
            )
        took = f"{seconds / 60:.1f} minutes ({cpu_seconds / 60:.1f} of processor time)"
        write_text(folder / "README.md", _card(config, measured, took))
    return measured


def _card(config: TrainingConfig, measured: Mapping[str, SiteQuality], took: str) -> str:
    rows = []
    for site, quality in measured.items():
        row = quality.as_row()
        recovered = [row.get(f"loss_recovered_{by}") for by in ("zero", "mean")]
        shown = ["–" if value is None else f"{value:.3f}" for value in recovered]
        numbers = f"{quality.l0:.1f} | {row['fvu']:.4f} | {row['dead_share']:.1%} | {row['kl_spliced']:.4f}"
        rows.append(f"| {site} | {numbers} | {shown[0]} | {shown[1]} |")
    settings = [f"| {name} | {value} |" for name, value in config.as_dict().items()]
    return f"""# SAEs of the tiny model

{len(measured)} SAEs of {config.latents_of(64)} latents each, in SAELens' layout:
`auto_circuit.load_saes("tiny")`.

## How good they are

On {N_TEST:,} tokens of sentences from another seed than those of training (`auto_circuit.sae_quality`;
KL in nats, with the one reconstruction in place; loss recovered against zero and mean ablation):

| site | L0 | FVU | dead | KL | recovered, zero | recovered, mean |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

## How they were made

`python -m auto_circuit.zoo.make_saes --out DIR`, after `make_tiny`: all sites from the same forward
passes, {took}, with torch {version("torch")}. The same seed and
threads give the same weights on the same machine.

| setting | value |
|---|---|
{chr(10).join(settings)}

Nothing but the tiny model and its language went into them; the package's licence, MIT, holds for them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m auto_circuit.zoo.make_saes",
        description="Train the SAEs of the tiny model and write their folders and card.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that make_tiny wrote")
    parser.add_argument("--threads", type=int, default=1, help="to compute with; weights depend on it (1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        make_saes(arguments.out)
    except AutoCircuitError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
