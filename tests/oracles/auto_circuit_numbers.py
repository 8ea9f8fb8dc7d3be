"""Write auto_circuit_1_0_1.safetensors: what auto-circuit 1.0.1 makes of edges, to compare ours with.

Run by hand, with the Python of the peer's environment (auto-circuit 1.0.1 has our import name, so this
repository must not be on its path); the same file comes out every time:

    OMP_NUM_THREADS=1 .venv-peers/bin/python tests/oracles/auto_circuit_numbers.py

The model is a HookedTransformer with random parameters, LN included. SAEs of 40 latents read its every
hook_mlp_out, and the peer pruned each to its 6 strongest on the clean and corrupt prompts. Six prompt pairs
of 7 tokens, one batch. All of it float32 on one thread. The file's tensors:

    model/KEY         parameter KEY of HookedTransformer.named_parameters(); load with strict=False, as the
                      buffers (`mask`, `IGNORE`) are left out
    sae/LAYER/KEY     after pruning: bias [d_model], latent_bias [6], encode_weight [6, d_model],
                      decode_weight [d_model, 6]; latents are relu(encode_weight (x - bias) + latent_bias)
    prompts/KEY       clean and corrupt [6, 7], answers and wrong_answers [6, 1]
    logits/KEY        [6, 7, 30], nothing patched: clean and corrupt of the model with its SAEs (no error
                      nodes), model_clean and model_corrupt of the model without them
    GRAPH/scores/SETTING/MODULE             scores of the edges into MODULE
    GRAPH/circuits/PATCH/ABLATION/ASKED     [6, 30], last-position logits of run_circuits by the scores of
                      SETTING `mask0.logit.avg_diff.resample`, ASKED edges: 0, 10, 60 or all

GRAPH is `whole` (seq_len=None: an edge acts at all positions) or `per_position` (seq_len=7: an edge for each
position). A score tensor is [7 positions (`per_position` only), 2 heads (not of an MLP or the end), sources].
Its last dimension follows `sources[MODULE]` of the metadata, which is the peer's order: Resid Start, then for
each block its heads, then its MLP's latents; a MODULE reads the sources of the layers before it. Modules are
read before LN; Resid Start is the sum of both embeddings.

SETTING is MASK.FUNCTION.ANSWER.ABLATION, all by mask_gradient_prune_scores:
    mask0      mask_val=0.0, which is edge attribution patching; mask0.5: mask_val=0.5
    ig5        integrated_grad_samples=5: the SUM, not the mean, of gradients at masks 0, .2, .4, .6, .8 and 1
    FUNCTION   logit, or logprob (log-softmax over the vocabulary)
    ANSWER     avg_diff: the answer less the wrong one, avg_val: the answer; a mean over the batch's prompts
    ABLATION   resample: by the corrupt prompt of the same pair (clean_corrupt="corrupt"); zero
               (clean_corrupt=None, which the peer insists on)
    mask0.logit.avg_diff.resample.batches_of_3    two batches, whose scores add up: twice those of one of 6
A score is d(-answer)/d(mask) on the clean prompt, where a mask m puts (1 - m) clean + m ablated in the edge's
place: positive where ablating the edge hurts. What no source gives (b_O, the SAEs' bias) stays as it is, also
under zero ablation. In ig5 and mask0.5 the masks of all edges move together, and "clean" is then what the
source gives in that patched run.

PATCH is `tree_patch` (input clean; the edges outside the circuit are ablated) or `edge_patch` (input corrupt;
the edges inside the circuit are ablated). ABLATION is the name of an AblationType in lower case, by:
    resample                 the other prompt of the pair: corrupt in tree_patch, clean in edge_patch
    batch_tokenwise_mean     mean over the prompts of that other batch, position by position
    batch_all_tok_mean       mean over the prompts and positions of that other batch
    tokenwise_mean_clean, tokenwise_mean_corrupt, tokenwise_mean_clean_and_corrupt
                             mean over all those prompts, position by position, whatever PATCH
    zero                     zeros
The circuit is the edges with |score| >= the ASKED-th greatest |score|, so that ties make it larger.

The metadata have one key, `json`: `config` (of the model), `sae` (settings; `kl` as the peer printed it), and
for each GRAPH:
    sources      MODULE -> names of its sources, in order
    dests        MODULE -> names of its destinations, in the order of heads
    edges        names of the edges, sorted; in `per_position` each stands once but is there 7 times
    n_edges      how many edges there are, positions counted
    scores       SETTING -> the peer's arguments
    sizes        PATCH/ABLATION/ASKED -> how many edges the peer says the circuit has
    gaps         ASKED -> how far the ASKED-th |score| lies above the next, relative to it; 0 is a tie
    replication  what comes of the peer's other function for SETTING `mask0.logit.avg_diff.resample`,
                 edge_attribution_patching_prune_scores
"""

# ruff: noqa: I001  (it sorts by which of the peer's modules our own auto_circuit has, too)
import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
    AutoencoderTransformer,
    sae_model,
)
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.edge_attribution_patching import edge_attribution_patching_prune_scores
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.types import AblationType, PatchType
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel

OUT = Path(__file__).with_name("auto_circuit_1_0_1.safetensors")
CONFIG = {
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 2,
    "d_head": 8,
    "d_mlp": 32,
    "act_fn": "gelu",
    "normalization_type": "LN",
    "d_vocab": 30,
    "n_ctx": 8,
    "device": "cpu",
    "seed": 0,
}
SAE = {"n_latents": 40, "max_latents": 6}
N_PROMPTS, N_TOKENS = 6, 7
GRAPHS = {"whole": None, "per_position": N_TOKENS}
MAIN = "mask0.logit.avg_diff.resample"


def make_model() -> HookedTransformer:
    """Return the model: every parameter random, none of it trained, set to edge patching."""
    model = HookedTransformer(HookedTransformerConfig(**CONFIG))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
        if re.search(r"ln\w*\.w$", name):
            parameter.data += 1
        parameter.requires_grad = False
    model.cfg.use_attn_result = model.cfg.use_attn_in = True
    model.cfg.use_split_qkv_input = model.cfg.use_hook_mlp_in = True
    return model.eval()


def make_prompts(batch_size: int) -> PromptDataLoader:
    """Return the prompt pairs in batches."""
    make = torch.Generator().manual_seed(1)
    shape = (2, N_PROMPTS, N_TOKENS)
    clean, corrupt = torch.randint(0, CONFIG["d_vocab"], shape, generator=make)
    ids = torch.stack([torch.randperm(CONFIG["d_vocab"], generator=make)[:2] for _ in range(N_PROMPTS)])
    dataset = PromptDataset(clean, corrupt, list(ids[:, :1]), list(ids[:, 1:]))
    return PromptDataLoader(dataset, N_TOKENS, 0, batch_size=batch_size, shuffle=False)


def make_spliced() -> tuple[AutoencoderTransformer, float]:
    """Return a new model with its pruned SAEs, and the KL that pruning cost, as the peer prints it."""
    spliced = sae_model(
        make_model(), "resid_delta_mlp", False, n_latents=SAE["n_latents"], new_instance=False
    )
    make = torch.Generator().manual_seed(2)
    for sae in spliced.sparse_autoencoders:
        for parameter in sae.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=make)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), torch.no_grad():
        loader = make_prompts(N_PROMPTS)
        spliced._prune_latents_with_dataset(loader, SAE["max_latents"], include_corrupt=True)
    for parameter in spliced.parameters():
        parameter.requires_grad = False
    return spliced, float(re.findall(r"KL Div: (\S+)", said.getvalue())[0])


def make_patchable(seq_len: int | None) -> PatchableModel:
    """Return a new model, spliced and patchable; the peer wraps modules in place."""
    spliced = make_spliced()[0]
    return patchable_model(spliced, True, slice_output="last_seq", seq_len=seq_len, separate_qkv=True)


def score_settings() -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield each setting's name, the peer's arguments, and the size of a batch."""
    masks = {"mask0": {"mask_val": 0.0}, "mask0.5": {"mask_val": 0.5}, "ig5": {"integrated_grad_samples": 5}}
    corrupts = {"resample": "corrupt", "zero": None}
    asked = [
        f"mask0.{function}.{answer}.{ablation}"
        for function, answer in [("logit", "avg_diff"), ("logprob", "avg_diff"), ("logprob", "avg_val")]
        for ablation in corrupts
    ]
    for name in [*asked, "mask0.5.logit.avg_diff.resample", "ig5.logit.avg_diff.resample"]:
        mask, function, answer, ablation = name.rsplit(".", 3)
        arguments = masks[mask] | {"grad_function": function, "answer_function": answer}
        arguments |= {"ablation_type": ablation.upper(), "clean_corrupt": corrupts[ablation]}
        yield name, arguments, N_PROMPTS
        if name == MAIN:
            yield name + ".batches_of_3", arguments, 3


def score(model: PatchableModel, arguments: dict[str, Any], batch_size: int) -> dict[str, Tensor]:
    """Return the peer's scores."""
    arguments = arguments | {"ablation_type": AblationType[arguments["ablation_type"]]}
    return mask_gradient_prune_scores(model, make_prompts(batch_size), None, **arguments)


def replicate(seq_len: int | None, scores: dict[str, Tensor]) -> str:
    """Say what comes of the peer's replication of edge attribution patching, beside its own fast way."""
    try:
        slow = edge_attribution_patching_prune_scores(make_patchable(seq_len), make_prompts(N_PROMPTS), None)
    except Exception as error:  # whatever it is, it is what we want to know
        said = f"{type(error).__name__}: {error}"
        return re.sub(r"blocks\.\d+", "blocks.N", said)  # it meets the edges in any order
    return f"differs by {max((slow[module] - scores[module]).abs().max().item() for module in scores):.1e}"


def describe(model: PatchableModel) -> dict[str, Any]:
    """Return the graph's names: sources and destinations of every module, and edges."""
    sources, dests = {}, {}
    for wrapper in sorted(model.dest_wrappers, key=lambda wrapper: wrapper.module_name):
        mine = [edge for edge in model.edges if edge.dest.module_name == wrapper.module_name]
        by_index = {edge.src.src_idx - edge.dest.min_src_idx: edge.src.name for edge in mine}
        by_head = {edge.dest.head_idx or 0: edge.dest.name for edge in mine}
        sources[wrapper.module_name] = [by_index[i] for i in range(wrapper.patch_mask.shape[-1])]
        dests[wrapper.module_name] = [by_head[i] for i in range(len(by_head))]
    edges = sorted({edge.name for edge in model.edges})
    return {"sources": sources, "dests": dests, "edges": edges, "n_edges": model.n_edges}


def run_graph(graph: str, seq_len: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return one graph's tensors and what the metadata say of it."""
    model = make_patchable(seq_len)
    says = describe(model) | {"scores": {}, "sizes": {}}
    tensors, by_setting = {}, {}
    for setting, arguments, batch_size in score_settings():
        says["scores"][setting] = arguments | {"batch_size": batch_size}
        by_setting[setting] = score(model, arguments, batch_size)
        for module, values in by_setting[setting].items():
            tensors[f"{graph}/scores/{setting}/{module}"] = values
    says["replication"] = replicate(seq_len, by_setting[MAIN])

    ranked = torch.cat([values.flatten() for values in by_setting[MAIN].values()]).abs().sort().values.flip(0)
    says["gaps"] = {n: float((ranked[n - 1] - ranked[n]) / ranked[n - 1]) for n in (10, 60)}
    for patch in PatchType:
        for ablation in AblationType:
            for asked in (0, 10, 60, model.n_edges):
                name = "all" if asked == model.n_edges else asked
                key = f"{patch.name}/{ablation.name}/{name}".lower()
                outs = run_circuits(
                    model, make_prompts(N_PROMPTS), [asked], by_setting[MAIN], patch, ablation
                )
                ((says["sizes"][key], by_batch),) = outs.items()
                (tensors[f"{graph}/circuits/{key}"],) = by_batch.values()
    return tensors, says


def main() -> None:
    """Compute everything and write the file."""
    torch.set_num_threads(1)
    model = make_model()
    (batch,) = make_prompts(N_PROMPTS)
    tensors = {f"model/{name}": parameter.data for name, parameter in model.named_parameters()}
    for name in ("clean", "corrupt", "answers", "wrong_answers"):
        tensors[f"prompts/{name}"] = getattr(batch, name)
    spliced, kl = make_spliced()
    for layer, sae in enumerate(spliced.sparse_autoencoders):
        tensors |= {f"sae/{layer}/{name}": value for name, value in sae.state_dict().items()}
    with torch.no_grad():
        for name in ("clean", "corrupt"):
            tensors[f"logits/model_{name}"] = model(getattr(batch, name))
            tensors[f"logits/{name}"] = spliced(getattr(batch, name))

    says: dict[str, Any] = {"config": CONFIG, "sae": SAE | {"kl": kl}}
    for graph, seq_len in GRAPHS.items():
        more, says[graph] = run_graph(graph, seq_len)
        tensors |= more
    tensors = {name: tensors[name].detach().clone().contiguous() for name in sorted(tensors)}
    save_file(tensors, OUT, {"json": json.dumps(says, sort_keys=True)})


if __name__ == "__main__":
    main()
