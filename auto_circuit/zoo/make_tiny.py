"""Make the packaged tiny model: `python -m auto_circuit.zoo.make_tiny --out DIR`.

1. Train a small GPT-2 on the language (`train_model.py`).
2. Save it, load it as users do, and measure it on prompts of its own. Below 99 % nothing is written.
3. Write `DIR/model` (Hugging Face layout) and `DIR/README.md`, the card with what was measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from auto_circuit.errors import AutoCircuitError, TrainingError
from auto_circuit.files import replacing_folder, write_json, write_text
from auto_circuit.zoo.language import build_tokenizer
from auto_circuit.zoo.train_model import Measured, Recipe, measure, train

#: What each task must reach in the written model.
REQUIRED = 0.99
#: Prompts of each task that the written model is measured on, and their seed: never that of the sentences.
N_TEST, TEST_SEED = 1000, 2_000_003


def make_model(out: Path, recipe: Recipe | None = None, *, progress: bool = True) -> dict[str, Measured]:
    """Train the model, measure it, and write `out/model` and `out/README.md`.

    Args:
        out: the folder to write; a model that is there already is replaced.
        recipe: how it is made; None: as the packaged one.
        progress: show a progress bar.

    Raises:
        TrainingError: when a task stays below `REQUIRED`; nothing is written then.
    """
    from auto_circuit.model_utils.model_loading import load_model

    recipe = recipe or Recipe()
    start, start_cpu = time.perf_counter(), time.process_time()
    model, n_steps = train(recipe, progress=progress)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    with replacing_folder(out / "model") as folder:
        model.save_pretrained(folder)
        _save_tokenizer(folder, recipe)
        booted = load_model(folder)
        measured = measure(booted, booted, N_TEST, TEST_SEED)
        missed = [f"{task} {m.accuracy:.1%}" for task, m in measured.items() if m.accuracy < REQUIRED]
        if missed:
            raise TrainingError(
                f"After {n_steps} steps the model does not reach {REQUIRED:.0%} on {', '.join(missed)}. "
                f"Nothing was written; give more steps, or another seed."
            )
    took = f"{n_steps:,} steps, {seconds / 60:.1f} minutes ({cpu_seconds / 60:.1f} of processor time)"
    write_text(out / "README.md", _card(recipe, measured, took, model))
    return measured


def _save_tokenizer(folder: Path, recipe: Recipe) -> None:
    build_tokenizer(recipe.n_ctx).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # The class that transformers 4 and 5 both know; 5 writes a name of its own.
    write_json(path, json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _card(recipe: Recipe, measured: dict[str, Measured], took: str, model: Any) -> str:
    rows = [
        f"| {task} | {m.accuracy:.1%} | {m.clean:.2f} | {m.corrupt:.2f} | {m.n_prompts} |"
        for task, m in measured.items()
    ]
    return _CARD.format(
        rows="\n".join(rows),
        recipe="\n".join(f"| {name} | {value} |" for name, value in asdict(recipe).items()),
        took=took,
        n_parameters=f"{model.num_parameters():,}",
        n_words=model.config.vocab_size,
        torch=torch.__version__,
        transformers=version("transformers"),
        threads=torch.get_num_threads(),
        seed=recipe.seed,
        test_seed=TEST_SEED,
        n_layers=recipe.n_layers,
        n_heads=recipe.n_heads,
        d_model=recipe.d_model,
        n_ctx=recipe.n_ctx,
    )


_CARD = """# The tiny model

A GPT-2 with {n_layers} layers of {n_heads} heads, d_model {d_model}, {n_ctx} positions, {n_words} words
and {n_parameters} parameters (float32), for tests and examples: `auto_circuit.load_model("tiny")`. It speaks
only the artificial language of `auto_circuit/zoo/language.py` and knows nothing of the world.

## What it does

Share of prompts after which a right answer has the largest logit of the whole vocabulary, and the mean
logit difference of right and wrong answers, after clean and after corrupt prompts:

| task | accuracy | clean | corrupt | prompts |
|---|---|---|---|---|
{rows}

The prompts are those of `load_prompts(task, model, n, seed={test_seed})`; the seed is never that of the
training sentences. There are finitely many prompts, so some of them are beginnings of sentences seen in
training, of `successor` and `agreement` most. Of `ioi, held-out pairs` none is: a tenth of the pairs of
names never occurs together in the language's sentences of that kind.

## How it was made

`python -m auto_circuit.zoo.make_tiny --out DIR --seed {seed} --threads {threads}`:
{took}, with torch {torch} and transformers {transformers}. The same
seed and number of threads give the same weights on the same machine; other machines round differently. It
was trained on the cross-entropy of every token of fresh sentences of five kinds (indirect object
identification, induction, successor, agreement, fillers), packed whole into rows; warm-up, constant
learning rate until the tasks are learned, cool-down.

| setting | value |
|---|---|
{recipe}

Nothing but this script and its language went into the weights; the package's licence, MIT, holds for them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m auto_circuit.zoo.make_tiny",
        description="Train the packaged tiny model and write its folder and card.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of weights and sentences")
    parser.add_argument("--steps", type=int, default=Recipe.max_steps, help="at most, before the cool-down")
    parser.add_argument("--threads", type=int, default=1, help="to compute with; weights depend on it")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        make_model(arguments.out, Recipe(seed=arguments.seed, max_steps=arguments.steps))
    except AutoCircuitError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
