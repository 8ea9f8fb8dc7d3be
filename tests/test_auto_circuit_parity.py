"""Edges against those of the peer auto-circuit 1.0.1, on its model, SAEs and prompts.

What the peer's file holds, and what its scores and ablations mean: oracles/auto_circuit_numbers.py.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_lens
from conftest import WordTokens
from safetensors import safe_open
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from auto_circuit import PromptBatch, PromptDataset, PromptPair, SparseAutoencoder, sae_model
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.prune_scores import Circuit, PruneScores
from auto_circuit.metrics.objectives import answer_log_prob, logit_diff
from auto_circuit.patching.edge_patching import run_circuits
from auto_circuit.prune_algos.edge_attribution import edge_attribution

if not transformer_lens.__dict__.get("HookedTransformer"):
    pytest.skip("TransformerLens 4 has no HookedTransformer", allow_module_level=True)

PROMPT_KEYS = ("clean", "corrupt", "answers", "wrong_answers")
FILE = Path(__file__).parent / "oracles" / "auto_circuit_1_0_1.safetensors"
#: The peer numbers the latents that pruning left; ours keep published ids. Any will do, by layer.
LATENT_IDS = ([3, 8, 13, 21, 30, 39], [0, 5, 9, 16, 33, 38])
#: Both sides are float32 and sum in another order: some units in the last place of the largest terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def log_prob_diff(logits: Tensor, batch: PromptBatch) -> Tensor:
    return logit_diff(logits.log_softmax(-1), batch)


OBJECTIVES = {
    "logit.avg_diff": logit_diff,
    "logprob.avg_diff": log_prob_diff,
    "logprob.avg_val": answer_log_prob,
}
METHODS: dict[str, dict[str, Any]] = {
    "mask0": {"method": "eap"},
    "mask0.5": {"method": "mask", "mask_value": 0.5},
    "ig5": {"method": "mask-ig", "steps": 5, "ig_rule": "sum"},
}
MAIN = "mask0.logit.avg_diff.resample"
SETTINGS = [
    *(f"mask0.{objective}.{ablation}" for objective in OBJECTIVES for ablation in ("resample", "zero")),
    "mask0.5.logit.avg_diff.resample",
    "ig5.logit.avg_diff.resample",
]
ABLATIONS = {
    "resample": "resample",
    "zero": "zero",
    "tokenwise_mean_clean": "mean_clean",
    "tokenwise_mean_corrupt": "mean",
    "tokenwise_mean_clean_and_corrupt": "mean_both",
    "batch_tokenwise_mean": "mean_batch",
    "batch_all_tok_mean": "mean_positions",
}


def our_node(peers: str) -> str:
    match re.sub(r"\d+", "#", peers), re.findall(r"\d+", peers):
        case "Resid Start", []:
            return "start"
        case "Resid End", []:
            return "end"
        case "A#.#", [layer, head]:
            return f"blocks.{layer}.attn/head.{head}"
        case "A#.#.Q" | "A#.#.K" | "A#.#.V", [layer, head]:
            return f"blocks.{layer}.attn.{peers[-1].lower()}/head.{head}"
        case "MLP # Latent #", [layer, i]:
            return f"blocks.{layer}.hook_mlp_out/latent.{LATENT_IDS[int(layer)][int(i)]}"
        case "MLP #", [layer]:
            return f"blocks.{layer}.mlp.in"
    raise ValueError(peers)


@dataclass
class Peer:
    """The file, and ours made of it for one of its two graphs."""

    name: str
    tensors: dict[str, Tensor]
    says: dict[str, Any]
    graph: CircuitGraph
    prompts: PromptDataset

    @property
    def modules(self) -> dict[str, str]:
        """The peer's name of every module that reads → ours."""
        return {module: our_node(rows[0]).partition("/")[0] for module, rows in self.says["dests"].items()}

    def scores(self, setting: str) -> PruneScores:
        by_module = under_prefix(self.tensors, f"{self.name}/scores/{setting}/")
        return PruneScores(self.graph.layout, {self.modules[name]: t for name, t in by_module.items()})


def under_prefix(named: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): v for name, v in named.items() if name.startswith(prefix)}


def read_prompts(tensors: dict[str, Tensor]) -> PromptDataset:
    def words(key: str) -> list[str]:
        return ["".join(f" w{i}" for i in ids) for ids in tensors[f"prompts/{key}"].tolist()]

    texts = zip(*(words(key) for key in PROMPT_KEYS), strict=True)
    pairs = [PromptPair(clean, corrupt, (right,), (wrong,)) for clean, corrupt, right, wrong in texts]
    return PromptDataset(pairs, WordTokens(), prepend_bos=False)


@pytest.fixture(scope="module", params=["whole", "per_position"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    with safe_open(FILE, "pt") as file:
        says = json.loads(file.metadata()["json"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    config = transformer_lens.HookedTransformerConfig(**says["config"])
    model = transformer_lens.HookedTransformer(config).eval()
    left_out = model.load_state_dict(under_prefix(tensors, "model/"), strict=False)
    assert not left_out.unexpected_keys
    assert not set(left_out.missing_keys) & set(dict(model.named_parameters()))
    saes = [
        SparseAutoencoder.from_state_dict(
            HookPoint(), under_prefix(tensors, f"sae/{layer}/") | {"latent_ids": torch.tensor(ids)}
        )
        for layer, ids in enumerate(LATENT_IDS)
    ]
    with sae_model(model, {"hook_mlp_out": saes}, error_nodes=False) as spliced:
        graph = CircuitGraph(spliced, per_position={"whole": None, "per_position": 7}[request.param])
        yield Peer(request.param, tensors, says[request.param], graph, read_prompts(tensors))


def test_prompts_and_unpatched_logits_are_the_peers(peer: Peer) -> None:
    (batch,) = peer.prompts.batches(6)
    for key in PROMPT_KEYS:
        assert torch.equal(getattr(batch, key), peer.tensors[f"prompts/{key}"])
    for key in ("clean", "corrupt"):
        tokens = getattr(batch, key)
        torch.testing.assert_close(peer.graph.model(tokens), peer.tensors[f"logits/{key}"], **CLOSE)
        plain = peer.tensors[f"logits/model_{key}"][:, -1]
        torch.testing.assert_close(peer.graph.plain_logits(tokens), plain, **CLOSE)


def test_edges_are_the_peers_and_tensors_have_its_order(peer: Peer) -> None:
    layout = peer.graph.layout
    assert sorted(peer.modules.values()) == sorted(d.name for d in layout.destinations)
    names = []
    for module, ours in peer.modules.items():
        expected = [
            f"{our_node(source)}->{our_node(row)}" + ("" if position is None else f"@{position}")
            for position in ([None] if layout.seq_len is None else range(layout.seq_len))
            for row in peer.says["dests"][module]
            for source in peer.says["sources"][module]
        ]
        numbers = range(layout.n_edges)[layout.slice_of(ours)]
        assert [layout.edge_name(i) for i in numbers] == expected
        names += expected
    assert len(set(names)) == layout.n_edges == peer.says["n_edges"]
    peers = {"->".join(our_node(node) for node in edge.split("->")) for edge in peer.says["edges"]}
    assert {name.partition("@")[0] for name in names} == peers


@pytest.mark.parametrize("setting", SETTINGS)
def test_scores_are_the_peers_sign_included(peer: Peer, setting: str) -> None:
    """The peer's is d(−answer)/d(mask of ablation), ours kept less ablated: both positive where it helps."""
    mask, objective, ablation = re.fullmatch(r"(mask0\.5|mask0|ig5)\.(.+)\.(\w+)", setting).groups()
    ours = edge_attribution(
        peer.graph, peer.prompts, OBJECTIVES[objective], ablation=ablation, progress=False, **METHODS[mask]
    )
    torch.testing.assert_close(ours.flat(), peer.scores(setting).flat(), **CLOSE)


def test_every_setting_of_the_file_is_compared(peer: Peer) -> None:
    assert {*SETTINGS, f"{MAIN}.batches_of_3"} == set(peer.says["scores"])


def test_our_scores_are_means_where_the_peers_add_up_over_batches(peer: Peer) -> None:
    ours = edge_attribution(peer.graph, peer.prompts, batch_size=3, progress=False)
    torch.testing.assert_close(2 * ours.flat(), peer.scores(f"{MAIN}.batches_of_3").flat(), **CLOSE)


def test_the_peers_scores_are_what_ablating_a_little_of_an_edge_takes_away(peer: Peer) -> None:
    scores, layout, part = peer.scores(MAIN), peer.graph.layout, 0.01
    order = scores.flat().argsort()
    edges = torch.cat([order[:4], order[-4:]])
    ones = torch.ones(layout.n_edges)
    kept = [ones, *(ones.index_fill(0, edge, 1 - part) for edge in edges)]
    circuits = [Circuit(layout, layout.split(each)) for each in kept]
    runs = run_circuits(peer.graph, peer.prompts, circuits, progress=False)
    (batch,) = peer.prompts.batches(6)
    whole, *less = [logit_diff(logits, batch).mean() for logits in runs]
    slopes = (whole - torch.stack(less)) / part
    assert (slopes[:4] < 0).all() and (slopes[4:] > 0).all()
    torch.testing.assert_close(slopes, scores.flat()[edges], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("patch_type", ["tree", "edge"])
def test_circuits_give_the_peers_logits(peer: Peer, patch_type: str, ablation: str) -> None:
    scores = peer.scores(MAIN)
    sizes = {"0": 0, "10": 10, "60": 60, "all": peer.graph.n_edges}
    runs = run_circuits(
        peer.graph,
        peer.prompts,
        scores,
        list(sizes.values()),
        patch_type=patch_type,
        ablation=ABLATIONS[ablation],
        progress=False,
    )
    prefix = f"{patch_type}_patch/{ablation}/"
    assert sizes == under_prefix(peer.says["sizes"], prefix), "ties would make the peer's circuits larger"
    theirs = under_prefix(peer.tensors, f"{peer.name}/circuits/{prefix}")
    torch.testing.assert_close(dict(zip(sizes, runs, strict=True)), theirs, **CLOSE)
