"""Record the activations that both SAE trainers of the benchmarks read; runs with our Python.

SmolLM2's activations at one site on a text with a paragraph a line: contexts of 128 tokens, each the BOS
token and 127 tokens of the lines one after another. The BOS token's activations are left out. Training data
comes from the start of the text, held-out data from the last 5 % of its lines. Two files, each with a tensor
`x` `[N, d_model]`, float32, in the order of the text:

    python benchmarks/make_activations.py --text prose.txt.gz --out activations
"""

import argparse
import gzip
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import auto_circuit as ac

#: The share of the lines that training never sees; sae_lens_worker.py has the same.
HELD_OUT = 0.05


def contexts(lines: list[str], tokenizer: Any, length: int) -> Iterator[Tensor]:
    """Yield contexts of `length` tokens, BOS first."""
    ids: list[int] = []
    for line in lines:
        ids += tokenizer(line, add_special_tokens=False)["input_ids"]
        while len(ids) >= length - 1:
            yield torch.tensor([tokenizer.bos_token_id, *ids[: length - 1]])
            del ids[: length - 1]


def record(model: Any, site: str, batches: Iterator[Tensor], n: int) -> Tensor:
    """Return the first `n` activations at a site, without those of the first token."""
    stop = int(site.split(".")[1]) + 1
    rows, have = torch.empty(n, model.cfg.d_model), 0

    def keep(activation: Tensor, hook: Any) -> None:
        del hook
        nonlocal have
        new = activation[:, 1:].flatten(0, 1)[: n - have]
        rows[have : have + len(new)] = new
        have += len(new)

    start = time.perf_counter()
    while have < n:
        tokens = list(itertools.islice(batches, 16))
        if not tokens:
            raise SystemExit(f"The text has {have} activations, fewer than the {n} that were asked for.")
        model.run_with_hooks(
            torch.stack(tokens), return_type=None, stop_at_layer=stop, fwd_hooks=[(site, keep)]
        )
    print(f"{n} activations at {site}, {n / (time.perf_counter() - start):.0f} a second", flush=True)
    return rows


def main() -> None:
    """Record the files that the command line names."""
    parser = argparse.ArgumentParser(description="Record the activations that SAE trainers are measured on.")
    parser.add_argument("--text", type=Path, required=True, help="gzipped text, a paragraph a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--site", default="blocks.12.hook_mlp_out")
    parser.add_argument("--train", type=int, default=200_000, help="activations to train on")
    parser.add_argument("--held-out", type=int, default=20_000, help="activations to measure on")
    parser.add_argument("--context", type=int, default=128)
    args = parser.parse_args()
    with gzip.open(args.text, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    first = len(lines) - int(HELD_OUT * len(lines))
    model = ac.load_model(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    # The smaller first: who waits for a first look has it sooner.
    for name, part, n in (("held_out", lines[first:], args.held_out), ("train", lines[:first], args.train)):
        with torch.inference_mode():
            x = record(model, args.site, contexts(part, model.tokenizer, args.context), n)
        temporary = args.out / f".{name}.safetensors"
        save_file({"x": x}, temporary, {"site": args.site, "model": args.model})
        temporary.replace(args.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
