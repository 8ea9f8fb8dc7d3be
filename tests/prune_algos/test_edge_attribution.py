import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_prompts
from dense_edges import DenseEdges
from patching.test_edge_patching import PLACED, SEQ, make_graph, saes_at
from torch import Tensor

import auto_circuit as ac
from auto_circuit.data.prompts import PromptBatch
from auto_circuit.errors import InputError, UnknownNameError
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.prune_scores import Circuit, PruneScores
from auto_circuit.patching.ablations import GraphRecorder
from auto_circuit.patching.edge_patching import run_circuits
from auto_circuit.prune_algos.edge_attribution import METHODS, edge_attribution


def kl_to_reference(logits: Tensor, batch: PromptBatch) -> Tensor:
    """Minus the KL divergence from the plain model's prediction."""
    assert batch.reference_logits is not None
    p, q = batch.reference_logits.log_softmax(-1), logits.log_softmax(-1)
    return -(p.exp() * (p - q)).sum(-1)


def dense_gradients(
    model: Any, graph: CircuitGraph, prompts: Any, mask_value: float, objective: Any, ablation: str
) -> dict[str, Tensor]:
    """Gradient of the mean objective, with the sign of our scores, by autograd on an explicit mask."""
    layout = graph.layout
    index = {layout.source_name(i, 0): i for i in range(layout.n_sources)}
    leaves = {
        d.name: torch.full(layout.shape(d), mask_value, requires_grad=True) for d in layout.destinations
    }

    def carried(source: str, destination: str) -> Tensor:
        module, _, head = destination.partition("/head.")
        mask = leaves[module]
        return (mask[..., int(head), :] if head else mask)[..., index[source]]

    batch = next(prompts.batches())
    dense = DenseEdges(model, graph.saes, error_nodes=graph.error_nodes)
    with torch.no_grad():
        dense.run(batch.corrupt)
        patch = {name: x * (ablation != "zero") for name, x in dense.sources.items()}
        if ablation == "zero":
            sources = GraphRecorder(graph).sources
            patch |= {name: x + sources[name].constant for name, x in patch.items() if name.endswith(".mlp")}
    batch = batch.with_reference(graph.plain_logits(batch.clean))
    value = objective(dense.run(batch.clean, patch, carried), batch).mean()
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return {name: -gradient for name, gradient in zip(leaves, gradients, strict=True)}


def close_to(scores: PruneScores, expected: dict[str, Tensor]) -> None:
    largest = max(float(e.abs().max()) for e in expected.values())
    for name, e in expected.items():
        torch.testing.assert_close(scores.scores[name], e, rtol=1e-3, atol=1e-5 * max(largest, 1e-2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("error_nodes", [True, False])
@pytest.mark.parametrize("per_position", [True, False])
def test_scores_equal_autograd_on_an_explicit_mask(
    shared_model: Any, family: str, placed: str, error_nodes: bool, per_position: bool
) -> None:
    model = shared_model(family)
    graph = make_graph(model, placed, error_nodes=error_nodes, per_position=per_position)
    prompts = make_prompts(2, (SEQ - 1,))
    mask_value, ablation = (0.0, "resample") if per_position == error_nodes else (0.4, "zero")
    expected = dense_gradients(model, graph, prompts, mask_value, ac.answer_log_prob, ablation)
    scores = edge_attribution(
        graph,
        prompts,
        ac.answer_log_prob,
        method="mask",
        mask_value=mask_value,
        ablation=ablation,
        progress=False,
    )
    close_to(scores, expected)
    if mask_value == 0:
        eap = edge_attribution(graph, prompts, ac.answer_log_prob, ablation=ablation, progress=False)
        assert torch.equal(eap.flat(), scores.flat())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placed", ["plain", "mixed"])
def test_one_reader_for_q_k_and_v_scores_their_sum(shared_model: Any, family: str, placed: str) -> None:
    model, prompts = shared_model(family), make_prompts(3, (SEQ - 1, 4))
    apart = edge_attribution(make_graph(model, placed), prompts, progress=False).scores
    joint = edge_attribution(make_graph(model, placed, separate=False), prompts, progress=False).scores
    for name, scores in joint.items():
        if name.endswith("attn.in"):
            q, k, v = (apart[name.replace(".in", f".{part}")] for part in "qkv")
            expected = q.unflatten(0, (len(k), -1)).sum(1) + k + v
            torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("placed", "error_nodes"), [("plain", True), ("out", True), ("inner", False)])
@pytest.mark.parametrize(
    ("family", "ablation"),
    # Not zero for RMS norms: without biases the stream shrinks to nothing, and the path turns at its end.
    [(f, a) for f in FAMILIES for a in ("resample", "mean")] + [("gpt2", "zero"), ("neox", "zero")],
)
def test_integrated_gradients_over_masks_sum_to_the_change(
    shared_model: Any, family: str, placed: str, error_nodes: bool, ablation: str
) -> None:
    graph = make_graph(shared_model(family), placed, error_nodes=error_nodes)
    prompts = make_prompts(3, (SEQ - 1,))
    scores = edge_attribution(graph, prompts, method="mask-ig", steps=60, ablation=ablation, progress=False)
    ends = [Circuit.of(graph.layout, list(range(graph.n_edges))), Circuit.of(graph.layout, [])]
    kept, ablated = run_circuits(graph, prompts, ends, ablation=ablation, progress=False)
    batch = next(prompts.batches())
    change = (ac.logit_diff(kept, batch) - ac.logit_diff(ablated, batch)).mean()
    torch.testing.assert_close(scores.flat().double().sum().float(), change, rtol=1e-2, atol=2e-3)


def test_where_the_model_is_linear_scores_are_exact_ablations(shared_model: Any) -> None:
    """Into the end of a model whose final norm is taken out, logits are linear in every source."""
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    cfg = dict(n_layers=2, d_model=24, n_heads=4, d_head=6, n_ctx=16, d_vocab=60, d_mlp=40, act_fn="relu")
    model = TransformerBridge.boot_native(dict(cfg, normalization_type=None)).eval()
    graph = make_graph(model, "mixed")
    prompts = make_prompts(3, (SEQ - 1,))
    scores = edge_attribution(graph, prompts, progress=False)
    batch = next(prompts.batches())
    clean = ac.logit_diff(graph.plain_logits(batch.clean), batch).mean()
    rest = graph.layout.slice_of("end")
    everything = set(range(graph.n_edges))
    chosen = list(range(rest.start, rest.stop))
    circuits = [Circuit.of(graph.layout, sorted(everything - {i})) for i in chosen]
    for i, logits in zip(chosen, run_circuits(graph, prompts, circuits, progress=False), strict=True):
        exact = clean - ac.logit_diff(logits, batch).mean()
        assert scores[i] == pytest.approx(float(exact), rel=1e-3, abs=2e-6)


@pytest.mark.parametrize("placed", ["plain", "mixed"])
def test_paths_equal_brute_force(shared_model: Any, placed: str) -> None:
    """Gradients by dense autograd at each point of the path, contracted with clean minus corrupt sources."""
    model = shared_model("gpt2")
    graph, prompts = make_graph(model, placed), make_prompts(2, (SEQ - 1,))
    batch, steps = next(prompts.batches()), 3
    dense = DenseEdges(model, graph.saes)
    with torch.no_grad():
        dense.run(batch.corrupt)
        corrupt = dict(dense.sources)
        dense.run(batch.clean)
        clean = dict(dense.sources)

    def scores_at(tokens: Tensor, start: Tensor | None = None) -> dict[str, Tensor]:
        hooks = [] if start is None else [("blocks.0.hook_resid_pre", lambda x, hook: start)]
        with model.hooks(fwd_hooks=hooks):
            zeros = torch.zeros((), requires_grad=True)
            logits = dense.run(tokens, corrupt, lambda s, d: zeros)
            gradients = torch.autograd.grad(
                ac.logit_diff(logits, batch).mean(), list(dense.inputs.values()), allow_unused=True
            )
        found = dict(zip(dense.inputs, gradients, strict=True))
        flat = torch.zeros(graph.n_edges)
        for i in range(graph.n_edges):
            edge = graph.edge(i)
            flat[i] = ((clean[edge.source] - corrupt[edge.source]) * found[edge.destination]).sum()
        return graph.layout.split(flat)

    def mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}

    both = mean([scores_at(batch.clean), scores_at(batch.corrupt)])
    close_to(edge_attribution(graph, prompts, method="clean-corrupt", progress=False), both)
    between = [corrupt["start"] + k / steps * (clean["start"] - corrupt["start"]) for k in range(steps)]
    expected = mean([scores_at(batch.clean, start) for start in between])
    options = {"steps": steps, "ig_rule": "left", "progress": False}
    close_to(edge_attribution(graph, prompts, method="ig-inputs", **options), expected)


def test_paths_over_activations_sum_for_each_component_to_patching_it(shared_model: Any) -> None:
    """With only the last MLP's edge to the end left, the path is the exact one from patch to clean."""
    graph, prompts = make_graph(shared_model("llama"), "plain"), make_prompts(3, (SEQ - 1,))
    scores = edge_attribution(graph, prompts, method="ig-activations", steps=50, progress=False)
    batch = next(prompts.batches())
    for source in ("blocks.2.mlp", "blocks.2.attn"):
        names = [n for n in (graph.edge_name(i) for i in range(graph.n_edges)) if n.startswith(source)]
        kept = sorted(set(range(graph.n_edges)) - {graph.edge_index(name) for name in names})
        ablated = run_circuits(graph, prompts, [Circuit.of(graph.layout, kept)], progress=False)[0]
        clean = graph.plain_logits(batch.clean)
        change = (ac.logit_diff(clean, batch) - ac.logit_diff(ablated, batch)).mean()
        assert sum(scores[n] for n in names) == pytest.approx(float(change), rel=2e-2, abs=1e-4)


def test_an_objective_that_vanishes_at_the_clean_run_is_refused_there_and_works_elsewhere(
    shared_model: Any,
) -> None:
    graph, prompts = make_graph(shared_model("gpt2"), "mixed"), make_prompts(3, (SEQ - 1,))
    with pytest.raises(InputError, match=r"kl_to_reference vanishes.*mask-ig"):
        edge_attribution(graph, prompts, kl_to_reference, progress=False)
    with pytest.raises(InputError, match="mask_value above 0"):
        edge_attribution(graph, prompts, kl_to_reference, method="mask", mask_value=0.0, progress=False)
    for method in ("mask-ig", "ig-inputs", "clean-corrupt", "mask"):
        assert edge_attribution(graph, prompts, kl_to_reference, method=method, progress=False).flat().any()


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_orders_do_not_matter_and_no_parameter_gets_a_gradient(
    shared_model: Any, method: str
) -> None:
    model = shared_model("gemma2")
    graph, prompts = make_graph(model, "mixed"), make_prompts(5, (5, 4))
    options: dict[str, Any] = {"method": method, "steps": 2, "progress": False}
    whole = edge_attribution(graph, prompts, **options)
    close_to(edge_attribution(graph, prompts, batch_size=1, **options), whole.scores)
    close_to(edge_attribution(graph, prompts.subset([4, 2, 0, 1, 3]), **options), whole.scores)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scores_of_latents_keep_their_published_names_after_pruning(shared_model: Any) -> None:
    model, prompts = shared_model("gpt2"), make_prompts(3, (SEQ - 1,))
    saes = saes_at(model, "out", n_latents=10)
    graph = CircuitGraph(ac.sae_model(model, saes))
    before = edge_attribution(graph, prompts, progress=False)
    for sae in saes.values():
        sae.prune_latents(torch.tensor([7, 2, 5]))
    with pytest.raises(InputError, match="pruned after this graph"):
        edge_attribution(graph, prompts, progress=False)
    pruned = CircuitGraph(ac.sae_model(model, saes))
    after = edge_attribution(pruned, prompts, progress=False)
    for i in range(pruned.n_edges):
        edge = pruned.edge(i)
        if "/latent." in edge.source:
            assert after[i] == pytest.approx(before[edge.name], rel=1e-3, abs=1e-6)


def test_wrong_options_say_what_is_possible(shared_model: Any) -> None:
    graph, prompts = make_graph(shared_model("gpt2"), "plain"), make_prompts(2, (SEQ - 1,))
    with pytest.raises(UnknownNameError, match="mask-ig"):
        edge_attribution(graph, prompts, method="maskig", progress=False)
    with pytest.raises(UnknownNameError, match="midpoint"):
        edge_attribution(graph, prompts, method="mask-ig", ig_rule="middle", progress=False)
    with pytest.raises(InputError, match="steps must be"):
        edge_attribution(graph, prompts, method="mask-ig", steps=0, progress=False)
    with pytest.raises(InputError, match="mask_value is between"):
        edge_attribution(graph, prompts, method="mask", mask_value=1.5, progress=False)
    with pytest.raises(UnknownNameError, match="resample"):
        edge_attribution(graph, prompts, ablation="resampel", progress=False)
    with pytest.raises(InputError, match="Edges need a graph"):
        edge_attribution(graph.model, prompts, progress=False)
    with pytest.raises(InputError, match="a PromptDataset and a callable"):
        edge_attribution(graph, [1, 2], progress=False)
    with pytest.raises(InputError, match="not finite"):
        edge_attribution(graph, prompts, lambda logits, batch: logits[:, 0] * torch.nan, progress=False)
    with pytest.raises(InputError, match="cuts their gradient"):
        edge_attribution(graph, prompts, lambda logits, batch: logits.detach()[:, 0], progress=False)


HASHED = """
import sys, torch
sys.path[:0] = {path!r}
from pathlib import Path
from conftest import build_model, make_prompts
from patching.test_edge_patching import make_graph
from auto_circuit.prune_algos.edge_attribution import edge_attribution
torch.set_num_threads(1)
graph = make_graph(build_model("gpt2", Path({root!r})), "mixed")
scores = edge_attribution(graph, make_prompts(3, (5,)), progress=False)
print([scores.layout.edge_name(int(i)) for i in scores.top_indices(50)])
"""


def test_the_ranking_is_the_same_under_every_hash_seed(model_root: Any, make_model: Any) -> None:
    make_model("gpt2")  # so that its folder exists
    code = HASHED.format(path=[p for p in sys.path if p], root=str(model_root))
    said = set()
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        said.add(done.stdout.splitlines()[-1])
    assert len(said) == 1
