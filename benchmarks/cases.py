"""What both workers share: sizes, identical weights and tokens, the timed loop, and peak memory.

Only torch is imported here, because each side runs this file in an environment of its own. Weights come
from seeded generators, so that both sides compute the same numbers and their answers can be compared.

Times are wall-clock seconds of one call after one warm-up call of every case; the cases of one process
are interleaved in a shuffled order, so that drift of the machine meets all of them alike. Peak memory is
how far the process's resident memory rises above where it was just before the first call of a case, in a
process that runs nothing else (Linux only; elsewhere it is not measured).
"""

import argparse
import gc
import json
import random
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

#: The SAE whose forward pass is timed.
N_LATENTS, N_INPUTS, N_TOKENS = 32_768, 768, 64

#: The model and the SAEs that are pruned: one SAE at each layer's hook_mlp_out.
PRUNED = {"n_latents": 2_048, "max_latents": 256, "n_prompts": 64, "batch_size": 32}
MODEL = {
    "n_layers": 6,
    "d_model": 256,
    "n_heads": 4,
    "d_head": 64,
    "d_mlp": 1_024,
    "n_ctx": 16,
    "d_vocab": 1_000,
    "act_fn": "gelu",
    "normalization_type": "LNPre",
}

#: The graph whose edges are scored and patched: MODEL with the SAEs of PRUNED, each cut to `max_latents`.
GRAPH = {"max_latents": 256, "n_prompts": 8, "n_edges": 1_000}

#: The large graph: a model of GPT-2 small's shape, and the latents at each of its MLPs.
LARGE = {
    "n_latents": 24_576,
    "model": {
        "n_layers": 12,
        "d_model": 768,
        "n_heads": 12,
        "d_head": 64,
        "d_mlp": 3_072,
        "n_ctx": 16,
        "d_vocab": 50_257,
        "act_fn": "gelu",
        "normalization_type": "LN",
    },
}

#: Prepares one call, untimed. The call is timed; it returns numbers to compare between the sides, or None.
Case = Callable[[], Callable[[], list[float] | None]]


def sae_weights(n_latents: int, n_inputs: int, seed: int) -> dict[str, Tensor]:
    """Return a ReLU SAE's four tensors; directions are random units, scaled to roughly reconstruct."""
    make = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_latents, n_inputs, generator=make)
    directions /= directions.norm(dim=-1, keepdim=True)
    return {
        "bias": 0.01 * torch.randn(n_inputs, generator=make),
        "latent_bias": 0.01 * torch.randn(n_latents, generator=make),
        "encode_weight": directions * (2 * n_inputs / n_latents),
        "decode_weight": directions.T.contiguous(),
    }


def sae_input() -> Tensor:
    """Return the activations that the timed SAE reads, `[1, N_TOKENS, N_INPUTS]`."""
    return torch.randn(1, N_TOKENS, N_INPUTS, generator=torch.Generator().manual_seed(1))


def some_of(out: Tensor) -> list[float]:
    """Return a few numbers of an output, for comparing the sides."""
    return out.detach().flatten()[:: out.numel() // 8].tolist()


def model_weights() -> dict[str, Tensor]:
    """Return the model's matrices as `[out, in]`; norms have no weights and biases are zero."""
    make = torch.Generator().manual_seed(2)
    d_model, d_mlp, d_vocab, n_ctx = (MODEL[name] for name in ("d_model", "d_mlp", "d_vocab", "n_ctx"))
    shapes = {"embed": (d_vocab, d_model), "pos": (n_ctx, d_model), "unembed": (d_vocab, d_model)}
    for layer in range(MODEL["n_layers"]):
        shapes |= {f"{layer}.{name}": (d_model, d_model) for name in "qkvo"}
        shapes |= {f"{layer}.mlp_in": (d_mlp, d_model), f"{layer}.mlp_out": (d_model, d_mlp)}
    return {name: 0.05 * torch.randn(shape, generator=make) for name, shape in shapes.items()}


def prompt_tokens() -> Tensor:
    """Return the token ids of the prompts, `[n_prompts, n_ctx]`."""
    make = torch.Generator().manual_seed(3)
    return torch.randint(0, MODEL["d_vocab"], (PRUNED["n_prompts"], MODEL["n_ctx"]), generator=make)


def kept_latents(layer: int) -> Tensor:
    """Return which latents of a layer's SAE are in the graph, in their order there."""
    make = torch.Generator().manual_seed(30 + layer)
    return torch.randperm(PRUNED["n_latents"], generator=make)[: GRAPH["max_latents"]]


def graph_prompts() -> dict[str, Tensor]:
    """Return prompt pairs: `clean`, `corrupt`: `[n_prompts, n_ctx]`, `answers`, `wrong`: `[n_prompts]`."""
    make = torch.Generator().manual_seed(4)
    shape = (2, GRAPH["n_prompts"], MODEL["n_ctx"])
    clean, corrupt = torch.randint(0, MODEL["d_vocab"], shape, generator=make)
    ids = torch.randperm(MODEL["d_vocab"], generator=make)[: 2 * GRAPH["n_prompts"]]
    answers, wrong = ids.unflatten(0, (2, GRAPH["n_prompts"]))
    return {"clean": clean, "corrupt": corrupt, "answers": answers, "wrong": wrong}


def destinations() -> list[str]:
    """Return the hooks that edges lead to, in the order of the model; the last is the end of the residual."""
    kinds = ("q_input", "k_input", "v_input", "mlp_in")
    last = MODEL["n_layers"] - 1
    inputs = [f"blocks.{layer}.hook_{kind}" for layer in range(MODEL["n_layers"]) for kind in kinds]
    return [*inputs, f"blocks.{last}.hook_resid_post"]


def edge_scores(destination: str) -> Tensor:
    """Return random scores of the edges into one of `destinations()`.

    `[heads, sources]`, or `[sources]` into an MLP and the end. Sources are in the order of the model: the
    embeddings, then for each block its heads, then the latents of its SAE as `kept_latents` orders them. The
    scores of the embeddings and heads are thrice as great: without them, no circuit would say anything.
    """
    number, n_heads = destinations().index(destination), MODEL["n_heads"]
    layer, kind = divmod(number, 4)
    n_block = n_heads + GRAPH["max_latents"]
    source = torch.arange(1 + layer * n_block + (n_heads if kind == 3 else 0))
    shape = (n_heads, len(source)) if layer < MODEL["n_layers"] and kind < 3 else (len(source),)
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(50 + number))
    strong = (source == 0) | ((source - 1) % n_block < n_heads)
    return torch.where(strong, 3 * scores, scores)


def run_worker(benchmarks: dict[str, Callable[[], dict[str, Case]]]) -> None:
    """Read the command line, run what it asks for, and print one line of JSON for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("benchmark", choices=benchmarks)
    parser.add_argument("--repetitions", type=int, default=3, help="timed calls of each case")
    parser.add_argument("--only", help="run this case alone, and measure its peak memory")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice unless given")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with torch.no_grad():
        torch.randn(256, 256) @ torch.randn(256, 256)  # the threads and the library's own buffers
        cases = benchmarks[args.benchmark]()
        if args.only is not None:
            cases = {args.only: cases[args.only]}
        lines = [_run_first(name, case, args.only is not None) for name, case in cases.items()]
        for name, seconds in _timed(cases, args.repetitions).items():
            line = next(line for line in lines if line["case"] == name)
            print(json.dumps(line | {"seconds": seconds, "threads": torch.get_num_threads()}), flush=True)


def _run_first(name: str, case: Case, measure: bool) -> dict[str, object]:
    """Run the warm-up call; return its numbers and, if asked, its peak memory."""
    call = case()
    gc.collect()
    before = _memory("VmRSS") if measure and _reset_peak() else None
    check = call()
    after = _memory("VmHWM") if before is not None else None
    peak = after - before if after is not None and before is not None else None
    return {"case": name, "check": check, "peak_bytes": peak}


def _timed(cases: dict[str, Case], repetitions: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    shuffle = random.Random(0)
    for _ in range(repetitions):
        for name in _shuffled(cases, shuffle):
            call = cases[name]()
            gc.collect()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _shuffled(names: Iterable[str], shuffle: random.Random) -> list[str]:
    order = list(names)
    shuffle.shuffle(order)
    return order


def _reset_peak() -> bool:
    """Make the kernel forget the process's peak resident memory so far; say whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory(what: str) -> int | None:
    """Return the resident memory now (VmRSS) or at its peak (VmHWM), in bytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else None
