"""The peer's side of the training benchmarks: SAELens 6.54 with the Python of its own environment.

`cached`  trains one SAE from activations in memory: SAELens' own training SAE, `SAETrainer` and export
`sites`   trains a TopK SAE at each of several sites of a model, with SAELens' `MultiSAETrainingRunner`

Each prints one line of JSON. Everything that is not an option here is SAELens' default: Adam with betas 0.9
and 0.999, a constant learning rate of 3e-4, gradients clipped to norm 1, decoder rows of norm 0.1 at the
start and the encoder their transpose, auxiliary loss of the TopK family with coefficient 1 for latents that
were silent for 1,000 steps. Where SAELens has no usable default for so short a run, what its documentation
recommends is taken: Matryoshka levels of a quarter, a half and all of the latents; the L1 coefficient warmed
up over the first 5 % of the steps; for JumpReLU Anthropic's setting (tanh loss, bandwidth 2, thresholds that
start at 0.1, pre-activation loss 3e-6, warm-up over all steps, and `jumprelu_ste_to_input`, without which L0
stays far above 32 for so short a run). Other JumpReLU losses are an option.

Inputs of `cached` are scaled so that their mean norm is √d, which is what SAELens'
`expected_average_only_in` does; FVU and L0 do not depend on it. What is measured on held-out activations is
the SAE as exported for inference (BatchTopK and Matryoshka become JumpReLU):
    `fvu`         Σ‖x − x̂‖² / Σ‖x − mean‖², in float64
    `l0`          latents that are not zero, per activation
    `dead_share`  share of the latents that no held-out activation turns on

Times are wall-clock seconds, but `cpu_seconds` is the processor's time of all training with all its threads:
where other work shares the machine, it says more. A step is from one batch asked for to the next, so feeding
is in it; the first ten steps are left out. `norm_seconds` of `sites` is what estimating the inputs' scale
takes before training; it is in `cpu_seconds`, and not in `seconds`. Samples are activations, per site.
"""

import argparse
import gzip
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PEER = "6.54.12"
WARM_UP_STEPS = 10

#: The share of the lines that training never sees; make_activations.py has the same.
HELD_OUT = 0.05

#: Sparsity coefficients that bring L0 near 32 in 2,000 steps on SmolLM2's blocks.12.hook_mlp_out with 2,048
#: latents, found with batches of 256. After fewer steps L0 is higher. JumpReLU's is for the tanh loss.
COEFFICIENTS = {"standard": 5.0, "jumprelu": 1.4, "gated": 7.0}

#: Settings of each of SAELens' JumpReLU losses. Its defaults (`step`) do not lower L0 in so few steps.
ANTHROPIC = {"jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1, "jumprelu_ste_to_input": True}
JUMPRELU = {"tanh": ANTHROPIC | {"pre_act_loss_coefficient": 3e-6}, "quadratic": ANTHROPIC, "step": {}}

#: Where a Hugging Face model has what TransformerLens calls a site of block {}.
MODULES = {
    "hook_mlp_out": "model.layers.{}.mlp",
    "hook_attn_out": "model.layers.{}.self_attn",
    "hook_resid_post": "model.layers.{}",
}


class Asked:
    """Hands on another iterator's items and remembers when each was asked for."""

    def __init__(self, items: Iterable) -> None:
        self.items = iter(items)
        self.times: list[float] = []

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        self.times.append(time.perf_counter())
        return next(self.items)

    def step_seconds(self, first: int, end: float) -> float:
        """Return the median seconds between items, from item `first` on, without the warm-up."""
        times = [*self.times[first + WARM_UP_STEPS :], end]
        return statistics.median(after - before for before, after in itertools.pairwise(times))


def batches(x: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of rows for ever, shuffled anew each epoch; rows that fill no batch are left out."""
    shuffle = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=shuffle)
        for start in range(0, len(x) - size + 1, size):
            yield x.index_select(0, order[start : start + size])


def training_sae(args: argparse.Namespace, d_in: int) -> Any:
    """Return an untrained SAE of the architecture that the command line names."""
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        GatedTrainingSAE,
        GatedTrainingSAEConfig,
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )

    size = {"d_in": d_in, "d_sae": args.latents}
    k, coefficient = args.l0, args.coefficient
    l1 = {"l1_coefficient": coefficient, "l1_warm_up_steps": args.steps // 20}
    l0 = {"l0_coefficient": coefficient, "l0_warm_up_steps": args.steps, "target_l0": float(args.l0)}
    l0 |= {"jumprelu_sparsity_loss_mode": args.jumprelu_loss, **JUMPRELU[args.jumprelu_loss]}
    widths = [args.latents // 4, args.latents // 2, args.latents]
    match args.architecture:
        case "topk":
            return TopKTrainingSAE(TopKTrainingSAEConfig(k=k, **size))
        case "batchtopk":
            return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=k, **size))
        case "matryoshka":
            return MatryoshkaBatchTopKTrainingSAE(
                MatryoshkaBatchTopKTrainingSAEConfig(k=k, matryoshka_widths=widths, **size)
            )
        case "standard":
            return StandardTrainingSAE(StandardTrainingSAEConfig(**l1, **size))
        case "gated":
            return GatedTrainingSAE(GatedTrainingSAEConfig(**l1, **size))
        case "jumprelu":
            return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**l0, **size))
    raise ValueError(args.architecture)


def measure(sae: Any, x: Tensor) -> dict[str, float]:
    """Export a trained SAE as SAELens does, load it again, and measure it on held-out activations."""
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        exported = SAE.load_from_disk(folder).eval()
    mean = x.mean(0, dtype=torch.float64)
    wrong = total = n_active = 0.0
    fired = torch.zeros(exported.cfg.d_sae, dtype=torch.bool)
    for rows in x.split(2_048):
        with torch.inference_mode():
            latents = exported.encode(rows)
            out = exported.decode(latents)
        wrong += (rows.double() - out.double()).square().sum().item()
        total += (rows.double() - mean).square().sum().item()
        active = latents != 0
        n_active += active.sum().item()
        fired |= active.any(0)
    return {"fvu": wrong / total, "l0": n_active / len(x), "dead_share": 1 - fired.double().mean().item()}


def cached(args: argparse.Namespace) -> dict[str, object]:
    """Train one SAE from activations in memory."""
    from sae_lens import LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x = load_file(args.activations)["x"]
    scale = x.shape[1] ** 0.5 / x.norm(dim=-1).mean()
    x *= scale
    sae = training_sae(args, x.shape[1])
    provider = Asked(batches(x, args.batch, args.seed))
    config = SAETrainerConfig(
        total_training_samples=args.steps * args.batch,
        train_batch_size_samples=args.batch,
        lr=args.learning_rate,
        lr_end=args.learning_rate / 10,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=provider)
    start, cpu = time.perf_counter(), time.process_time()
    trainer.fit()
    end, cpu = time.perf_counter(), time.process_time() - cpu
    step = provider.step_seconds(0, end)
    line: dict[str, object] = {
        "case": args.architecture,
        "seconds_per_step": step,
        "samples_per_s": args.batch / step,
        "total_seconds": end - start,
        "cpu_seconds": cpu,
        "steps": args.steps,
        "threads": torch.get_num_threads(),
        "coefficient": args.coefficient,
        "learning_rate": args.learning_rate,
    }
    if args.held_out is not None:
        line |= measure(sae, load_file(args.held_out)["x"] * scale)
    return line


def contexts(lines: list[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Yield contexts of `length` tokens, BOS first; make_activations.py makes the same."""
    ids: list[int] = []
    for line in lines:
        ids += tokenizer(line, add_special_tokens=False)["input_ids"]
        while len(ids) >= length - 1:
            yield [tokenizer.bos_token_id, *ids[: length - 1]]
            del ids[: length - 1]


def sites(args: argparse.Namespace) -> dict[str, object]:
    """Train a TopK SAE at each site, all from one pass of the model."""
    from datasets import Dataset
    from sae_lens import (
        LoggingConfig,
        MultiSAETrainingRunner,
        MultiSAETrainingRunnerConfig,
        TopKTrainingSAEConfig,
    )
    from transformers import AutoConfig, AutoTokenizer

    d_in = AutoConfig.from_pretrained(args.model).hidden_size
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with gzip.open(args.text, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    first = len(lines) - int(HELD_OUT * len(lines))
    n_train = (args.tokens + args.norm_batches * args.batch) // (args.context - 1) + 100
    train = list(itertools.islice(contexts(lines[:first], tokenizer, args.context), n_train))
    n_held_out = -(-args.held_out_tokens // (args.context - 1))
    held_out = list(itertools.islice(contexts(lines[first:], tokenizer, args.context), n_held_out))
    steps = args.tokens // args.batch

    config = MultiSAETrainingRunnerConfig(
        saes={
            site: TopKTrainingSAEConfig(
                d_in=d_in, d_sae=args.latents, k=args.l0, normalize_activations="expected_average_only_in"
            )
            for site in args.sites
        },
        hook_names={site: hf_module(site) for site in args.sites},
        model_name=str(args.model),
        model_class_name="AutoModelForCausalLM",
        dataset_path="in memory",
        streaming=False,
        context_size=args.context,
        training_tokens=steps * args.batch,
        train_batch_size_tokens=args.batch,
        store_batch_size_prompts=args.prompts,
        n_batches_in_buffer=args.buffer_contexts,
        exclude_special_tokens=[tokenizer.bos_token_id],
        n_batches_for_norm_estimate=args.norm_batches,
        lr=args.learning_rate,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )
    runner = MultiSAETrainingRunner(config, override_dataset=Dataset.from_dict({"input_ids": train}))
    store = runner.activations_store
    provider = Asked(store.get_multi_hook_data_loader())
    store.get_multi_hook_data_loader = lambda: provider
    activations, model_seconds = store.get_multi_hook_activations, []

    def timed_activations(tokens: Tensor) -> dict[str, Tensor]:
        start = time.perf_counter()
        found = activations(tokens)
        model_seconds.append((start, time.perf_counter() - start))
        return found

    store.get_multi_hook_activations = timed_activations
    cpu = time.process_time()
    saes = runner.run()
    end, cpu = time.perf_counter(), time.process_time() - cpu
    trained_from = provider.times[args.norm_batches]
    line = {
        "case": "sites",
        "sites": len(args.sites),
        "seconds": end - trained_from,
        "model_seconds": sum(seconds for start, seconds in model_seconds if start >= trained_from),
        "norm_seconds": trained_from - provider.times[0],
        "cpu_seconds": cpu,
        "samples_per_s": steps * args.batch / (end - trained_from),
        "steps": steps,
        "threads": torch.get_num_threads(),
        "learning_rate": args.learning_rate,
    }
    parts = [activations(tokens) for tokens in torch.tensor(held_out).split(16)]
    line["by_site"] = {
        site: measure(sae, torch.cat([part[hf_module(site)][:, 1:].flatten(0, 1) for part in parts]).clone())
        for site, sae in saes.items()
    }
    return line


def hf_module(site: str) -> str:
    """Return the module of the Hugging Face model whose output a site is."""
    blocks, layer, kind = site.split(".", 2)
    if blocks != "blocks" or kind not in MODULES:
        sys.exit(f"SAELens finds {', '.join(MODULES)} of a block here, not {site}.")
    return MODULES[kind].format(layer)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Train SAEs with SAELens, and print one line of JSON.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cached", help="one SAE from activations in a file")
    one.add_argument("--activations", type=Path, required=True, help="safetensors file: x [N, d], float32")
    one.add_argument("--held-out", type=Path, help="the same, to measure FVU and L0 on")
    one.add_argument(
        "--architecture",
        required=True,
        choices=("topk", "batchtopk", "matryoshka", "standard", "jumprelu", "gated"),
    )
    one.add_argument("--steps", type=int, default=1_000)
    one.add_argument("--coefficient", type=float, help="of the sparsity loss; unless given, L0 nears 32")
    one.add_argument("--jumprelu-loss", choices=JUMPRELU, default="tanh", help="JumpReLU's sparsity loss")
    many = commands.add_parser("sites", help="TopK SAEs at several sites of a model")
    many.add_argument("--model", type=Path, required=True, help="folder in Hugging Face layout")
    many.add_argument("--text", type=Path, required=True, help="gzipped text, a paragraph a line")
    many.add_argument("--sites", type=lambda names: names.split(","), required=True, help="with commas")
    many.add_argument("--tokens", type=int, default=200_000, help="activations of each site to train on")
    many.add_argument("--held-out-tokens", type=int, default=20_000, help="activations to measure on")
    many.add_argument("--context", type=int, default=128)
    many.add_argument("--prompts", type=int, default=32, help="contexts in one pass of the model")
    many.add_argument(
        "--buffer-contexts", type=int, default=20, help="contexts whose activations are mixed (SAELens: 20)"
    )
    many.add_argument(
        "--norm-batches", type=int, default=8, help="batches to estimate the inputs' norm on (SAELens: 1,000)"
    )
    for command in (one, many):
        command.add_argument("--latents", type=int, default=2_048)
        command.add_argument("--l0", type=int, default=32, help="k of the TopK family")
        command.add_argument("--batch", type=int, default=2_048, help="activations in a step")
        command.add_argument("--learning-rate", type=float, default=3e-4)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, help="threads of torch; its own choice unless given")
    args = parser.parse_args()
    steps = args.steps if args.command == "cached" else args.tokens // args.batch
    if steps <= WARM_UP_STEPS:
        parser.error(
            f"There must be more than {WARM_UP_STEPS} steps, since those are not timed; given {steps}."
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.command == "cached" and args.coefficient is None:
        args.coefficient = COEFFICIENTS.get(args.architecture)
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(args.seed)
    print(json.dumps({"cached": cached, "sites": sites}[args.command](args)), flush=True)


def _check_peer() -> None:
    try:
        found = version("sae-lens")
    except PackageNotFoundError:
        found = "none"
    if found != PEER:
        sys.exit(f"This Python has sae-lens {found}, expected {PEER}. Build it with: make bench-peers")


if __name__ == "__main__":
    _check_peer()
    main()
