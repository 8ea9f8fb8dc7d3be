"""Our side of the benchmarks, run by run.py with our Python; prints a line of JSON for each case.

`sae`: one forward pass of 64 tokens through an SAE of 32,768 latents × 768 inputs, float32, no gradients:
    `products`     the two bare matrix products, on the SAE's own weights as they lie in memory
    `encoder`      the first of them
    `no_error`     our SAE without error nodes, counting latents (the default of a bare SAE)
    `error`        with error nodes and nothing hooked, counting
    `error_uncounted`  the same without counting

`prune`: pruning six SAEs of 2,048 latents to 256 on 64 prompts of 16 tokens, in a random model of width
256. Model, SAEs and prompts are made anew before each call, outside the time:
    `kl`           without error nodes, KL measured: exactly the peer's work
    `kl_error`     with error nodes while counting (our default), KL measured
    `no_kl`        without error nodes, KL not measured

`graph`: the edges of that model with its SAEs cut to 256 latents each, on 8 prompt pairs of 16 tokens:
    `passes`       two forward passes and one backward pass of the plain model, which attribution needs
    `eap`          edge attribution patching without error nodes: exactly the peer's work
    `eap_error`    the same with error nodes (our default)
    `passes_many`, `eap_many`: `passes` and `eap_error` on 64 prompt pairs
    `circuit`      one circuit of 1,000 edges, tree patching, resampling
    `half`         one circuit of half of the edges

`large`: a random model of GPT-2 small's shape, 24,576 unpruned latents at every MLP, 8 pairs of 16 tokens:
    `eap`          edge attribution patching of all its edges; making model and SAEs is part of the call
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import (
    GRAPH,
    LARGE,
    MODEL,
    N_INPUTS,
    N_LATENTS,
    PRUNED,
    Case,
    destinations,
    edge_scores,
    graph_prompts,
    kept_latents,
    model_weights,
    prompt_tokens,
    run_worker,
    sae_input,
    sae_weights,
    some_of,
)
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from auto_circuit.data.prompts import PromptDataset, PromptPair
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.prune_scores import PruneScores
from auto_circuit.metrics.objectives import logit_diff
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import sae_model
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.patching.edge_patching import run_circuits
from auto_circuit.prune_algos.edge_attribution import edge_attribution


def sae() -> dict[str, Case]:
    """Make the cases of one SAE's forward pass."""
    sae = SparseAutoencoder.from_state_dict(HookPoint(), sae_weights(N_LATENTS, N_INPUTS, seed=0))
    x = sae_input()

    def products() -> None:
        F.linear(F.linear(x, sae.encode_weight), sae.decode_weight)

    def encoder() -> None:
        F.linear(x, sae.encode_weight)

    def forward(error_nodes: bool, counting: bool = True) -> Callable[[], list[float]]:
        def run() -> list[float]:
            sae.error_nodes, sae.counting = error_nodes, counting
            return some_of(sae(x))

        return run

    calls = {
        "products": products,
        "encoder": encoder,
        "no_error": forward(False),
        "error": forward(True),
        "error_uncounted": forward(True, counting=False),
    }
    return {name: lambda call=call: call for name, call in calls.items()}


class NumberTokenizer:
    """Reads whitespace-separated numbers as token ids, which is all that PromptDataset asks of a model."""

    def to_tokens(self, text: str, prepend_bos: bool | None = None) -> Tensor:
        """Return the ids as `[1, seq]`."""
        del prepend_bos
        return torch.tensor([[int(number) for number in text.split()]])


def prune() -> dict[str, Case]:
    """Make the cases of pruning on a dataset."""
    texts = [" ".join(str(i) for i in ids) for ids in prompt_tokens().tolist()]
    pairs = [PromptPair(text, text, (" 0",), (" 1",)) for text in texts]

    def case(error_nodes: bool, measure_kl: bool) -> Case:
        def prepare() -> Callable[[], list[float] | None]:
            spliced = sae_model(_model(), _saes(), error_nodes=error_nodes)
            prompts = PromptDataset(pairs, NumberTokenizer())

            def run() -> list[float] | None:
                result = spliced.prune_latents(
                    prompts,
                    PRUNED["max_latents"],
                    include_corrupt=False,
                    measure_kl=measure_kl,
                    batch_size=PRUNED["batch_size"],
                    progress=False,
                )
                return None if result.kl is None else [result.kl]

            return run

        return prepare

    return {
        "kl": case(error_nodes=False, measure_kl=True),
        "kl_error": case(error_nodes=True, measure_kl=True),
        "no_kl": case(error_nodes=False, measure_kl=False),
    }


def graph() -> dict[str, Case]:
    """Make the cases of scoring edges and running circuits."""
    pairs = _pairs(graph_prompts())

    def graph_of(error_nodes: bool) -> CircuitGraph:
        saes = _saes()
        for layer, sae in enumerate(saes.values()):
            sae.prune_latents(kept_latents(layer))
        spliced = sae_model(_model().requires_grad_(False), saes, error_nodes=error_nodes)
        return CircuitGraph(spliced.splice())  # untimed, as the peer's wrapping is

    def passes(prompts: PromptDataset = pairs) -> Callable[[], None]:
        batch = next(prompts.batches(len(prompts)))
        model = _model().requires_grad_(False)

        def run() -> None:
            model(batch.corrupt)
            start: list[Tensor] = []

            def take(x: Tensor, hook: object) -> Tensor:
                del hook
                start.append(x.detach().requires_grad_())
                return start[0]

            with torch.enable_grad(), model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", take)]):
                value = logit_diff(model(batch.clean)[:, -1], batch).sum()
                torch.autograd.grad(value, start)

        return run

    def eap(error_nodes: bool, prompts: PromptDataset = pairs) -> Case:
        def prepare() -> Callable[[], list[float]]:
            graph = graph_of(error_nodes)

            def run() -> list[float]:
                scores = edge_attribution(graph, prompts, batch_size=len(prompts), progress=False).scores
                return [float(scores[_ours(name)].sum()) for name in sorted(destinations())]

            return run

        return prepare

    def circuit(n_edges: int | None) -> Case:
        def prepare() -> Callable[[], list[float]]:
            graph = graph_of(error_nodes=False)
            scores = PruneScores(graph.layout, {_ours(name): edge_scores(name) for name in destinations()})
            chosen = scores.top(n_edges or graph.n_edges // 2)
            return lambda: some_of(run_circuits(graph, pairs, [chosen], progress=False)[0])

        return prepare

    many = _pairs(
        {side: tokens.repeat(8, *[1] * (tokens.ndim - 1)) for side, tokens in graph_prompts().items()}
    )
    return {
        "passes": passes,
        "passes_many": lambda: passes(many),
        "eap_many": eap(error_nodes=True, prompts=many),
        "eap": eap(error_nodes=False),
        "eap_error": eap(error_nodes=True),
        "circuit": circuit(GRAPH["n_edges"]),
        "half": circuit(None),
    }


def large() -> dict[str, Case]:
    """Make the case of a graph of 60 million edges."""

    def run() -> list[float]:
        torch.manual_seed(0)
        model = TransformerBridge.boot_native(dict(LARGE["model"])).requires_grad_(False)
        saes = {}
        for layer in range(LARGE["model"]["n_layers"]):
            sae = SparseAutoencoder(HookPoint(), LARGE["n_latents"], LARGE["model"]["d_model"])
            saes[f"blocks.{layer}.hook_mlp_out"] = sae.requires_grad_(False)
        tokens = torch.randint(0, 1_000, (2, 8, 16))
        prompts = _pairs({"clean": tokens[0], "corrupt": tokens[1], "answers": [1] * 8, "wrong": [2] * 8})
        graph = CircuitGraph(sae_model(model, saes))
        scores = edge_attribution(graph, prompts, progress=False)
        return [float(graph.n_edges), *(edge.score or 0.0 for edge in scores.edges(3))]

    return {"eap": lambda: run}


def _ours(hook: str) -> str:
    """Return our name of one of the peer's destinations."""
    layer, kind = hook.split(".")[1:]
    kinds = {"hook_mlp_in": "mlp.in", "hook_resid_post": ""}
    name = kinds.get(kind, f"attn.{kind.removeprefix('hook_')[0]}")
    return f"blocks.{layer}.{name}" if name else "end"


def _pairs(tokens: dict[str, Any]) -> PromptDataset:
    """Make prompts of token ids."""
    texts = {
        side: [" ".join(map(str, row)) for row in tokens[side].tolist()] for side in ("clean", "corrupt")
    }
    ids = [[f" {int(i)}" for i in tokens[side]] for side in ("answers", "wrong")]
    rows = zip(texts["clean"], texts["corrupt"], *ids, strict=True)
    pairs = [PromptPair(clean, corrupt, (answer,), (wrong,)) for clean, corrupt, answer, wrong in rows]
    return PromptDataset(pairs, NumberTokenizer())


def _model() -> TransformerBridge:
    model = TransformerBridge.boot_native(dict(MODEL))
    weights = model_weights()
    native = model.original_model
    native.tok_embed.weight.copy_(weights["embed"])
    native.pos.weight.copy_(weights["pos"])
    native.head.weight.copy_(weights["unembed"])
    for layer, block in enumerate(native.layers):
        for name in "qkvo":
            getattr(block.attn, name).weight.copy_(weights[f"{layer}.{name}"])
        block.mlp.fc_in.weight.copy_(weights[f"{layer}.mlp_in"])
        block.mlp.fc_out.weight.copy_(weights[f"{layer}.mlp_out"])
    return model


def _saes() -> dict[str, SparseAutoencoder]:
    return {
        f"blocks.{layer}.hook_mlp_out": SparseAutoencoder.from_state_dict(
            HookPoint(), sae_weights(PRUNED["n_latents"], MODEL["d_model"], seed=10 + layer)
        )
        for layer in range(MODEL["n_layers"])
    }


if __name__ == "__main__":
    run_worker({"sae": sae, "prune": prune, "graph": graph, "large": large})
