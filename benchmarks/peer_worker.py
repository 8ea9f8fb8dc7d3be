"""The peer's side of the benchmarks: auto-circuit 1.0.1, run by run.py with the Python of its environment.

The peer has the same import name as this library, so this file must never see this repository on its
path. It runs the peer's public code on the weights and tokens of our side; see our_worker.py for the work:
    `sae`:   `forward`  one forward pass of the peer's SparseAutoencoder
    `prune`: `prune`    the peer's pruning on a dataset, which always measures the KL
    `graph`: `eap`      the peer's mask gradients at mask 0, which are edge attribution patching
             `circuit`  the peer's run of one circuit
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from cases import (
    GRAPH,
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

PEER = "1.0.1"


def sae() -> dict[str, Case]:
    """Make the case of one SAE's forward pass."""
    from transformer_lens.hook_points import HookPoint

    from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder

    sae = SparseAutoencoder.from_state_dict(HookPoint(), sae_weights(N_LATENTS, N_INPUTS, seed=0))
    x = sae_input()
    return {"forward": lambda: lambda: some_of(sae(x))}


def prune() -> dict[str, Case]:
    """Make the case of pruning on a dataset."""
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import sae_model

    tokens = prompt_tokens()
    answers = [tokens[i, :1] for i in range(len(tokens))]
    dataset = PromptDataset(tokens, tokens, answers, answers)
    loader = PromptDataLoader(dataset, MODEL["n_ctx"], 0, batch_size=PRUNED["batch_size"], shuffle=False)

    def prepare() -> Callable[[], list[float]]:
        spliced = sae_model(
            _model(), "resid_delta_mlp", False, n_latents=PRUNED["n_latents"], new_instance=False
        )
        for layer, sae in enumerate(spliced.sparse_autoencoders):
            sae.load_state_dict(sae_weights(PRUNED["n_latents"], MODEL["d_model"], seed=10 + layer))

        def run() -> list[float]:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                spliced._prune_latents_with_dataset(loader, PRUNED["max_latents"])
            return [float(kl) for kl in re.findall(r"KL Div: (\S+)", said.getvalue())]

        return run

    return {"prune": prepare}


def graph() -> dict[str, Case]:
    """Make the cases of scoring edges, and of running a circuit."""
    # Ruff sorts by which of these modules our own auto_circuit has, too.
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import sae_model
    from auto_circuit.prune import run_circuits
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.types import AblationType, PatchType
    from auto_circuit.utils.graph_utils import patchable_model

    given = graph_prompts()
    answers, wrong = given["answers"][:, None], given["wrong"][:, None]
    dataset = PromptDataset(given["clean"], given["corrupt"], list(answers), list(wrong))
    loader = PromptDataLoader(dataset, MODEL["n_ctx"], 0, batch_size=GRAPH["n_prompts"], shuffle=False)

    def patchable():
        model = _model().eval()
        model.cfg.use_attn_result = model.cfg.use_attn_in = True
        model.cfg.use_split_qkv_input = model.cfg.use_hook_mlp_in = True
        spliced = sae_model(
            model, "resid_delta_mlp", False, n_latents=PRUNED["n_latents"], new_instance=False
        )
        for layer, sae in enumerate(spliced.sparse_autoencoders):
            sae.load_state_dict(sae_weights(PRUNED["n_latents"], MODEL["d_model"], seed=10 + layer))
            sae.prune_latents(kept_latents(layer))
        for parameter in spliced.parameters():  # as the peer's load_tl_model does
            parameter.requires_grad = False
        return patchable_model(spliced, True, slice_output="last_seq", separate_qkv=True)

    def eap() -> Callable[[], list[float]]:
        model = patchable()

        def run() -> list[float]:
            with torch.enable_grad():
                scores = mask_gradient_prune_scores(model, loader, None, "logit", "avg_diff", mask_val=0.0)
            return [scores[module].sum().item() for module in sorted(scores)]

        return run

    def circuit() -> Callable[[], list[float]]:
        model = patchable()
        scores = {module: edge_scores(module) for module in destinations()}

        def run() -> list[float]:
            outs = run_circuits(
                model, loader, [GRAPH["n_edges"]], scores, PatchType.TREE_PATCH, AblationType.RESAMPLE
            )
            (out,) = outs[GRAPH["n_edges"]].values()
            return some_of(out)

        return run

    return {"eap": eap, "circuit": circuit}


def _model():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(HookedTransformerConfig(**MODEL, device="cpu"))
    given, heads = model_weights(), (MODEL["n_heads"], MODEL["d_head"])
    state = {name: torch.zeros_like(old) for name, old in model.named_parameters()}
    state["embed.W_E"], state["pos_embed.W_pos"] = given["embed"], given["pos"]
    state["unembed.W_U"] = given["unembed"].T
    for layer in range(MODEL["n_layers"]):
        for name in "qkv":
            by_head = given[f"{layer}.{name}"].unflatten(0, heads)
            state[f"blocks.{layer}.attn.W_{name.upper()}"] = by_head.mT
        state[f"blocks.{layer}.attn.W_O"] = given[f"{layer}.o"].T.unflatten(0, heads)
        state[f"blocks.{layer}.mlp.W_in"] = given[f"{layer}.mlp_in"].T
        state[f"blocks.{layer}.mlp.W_out"] = given[f"{layer}.mlp_out"].T
    model.load_state_dict(state, strict=False)
    return model


def _check_peer() -> None:
    try:
        found = version("auto-circuit")
    except PackageNotFoundError:
        found = "none"
    if found != PEER:
        sys.exit(f"This Python has auto-circuit {found}, expected {PEER}. Build it with: make bench-peers")


if __name__ == "__main__":
    _check_peer()
    run_worker({"sae": sae, "prune": prune, "graph": graph})
