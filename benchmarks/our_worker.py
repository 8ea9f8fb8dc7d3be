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
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import (
    MODEL,
    N_INPUTS,
    N_LATENTS,
    PRUNED,
    Case,
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
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import sae_model
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder


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
    run_worker({"sae": sae, "prune": prune})
