from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_prompts
from dense_edges import DenseEdges
from torch import Tensor
from transformer_lens.hook_points import HookPoint

import auto_circuit as ac
from auto_circuit.errors import InputError, UnknownNameError
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.prune_scores import Circuit, PruneScores
from auto_circuit.model_utils.hooked_model import hooked_model
from auto_circuit.patching.ablations import Ablation, GraphRecorder
from auto_circuit.patching.edge_patching import circuit_logits, run_circuits
from auto_circuit.patching.sources import SourceValues

#: Which kinds of site carry SAEs: none, after the output projections, before them, one of each.
PLACED: dict[str, tuple[str, ...]] = {
    "plain": (),
    "out": ("hook_mlp_out", "hook_attn_out"),
    "inner": ("mlp.hook_post", "attn.hook_z"),
    "mixed": ("hook_mlp_out", "attn.hook_z"),
}
SEQ = 6  # five words and BOS


def saes_at(model: Any, placed: str, n_latents: int = 6) -> dict[str, ac.SparseAutoencoder]:
    """SAEs with biases at some sites of blocks 0 and 1; block 2 keeps its own components."""
    saes = {}
    for site in hooked_model(model).sites():
        if site.kind in PLACED[placed] and site.layer < 2:
            torch.manual_seed(10 * site.layer + len(site.kind))
            sae = ac.SparseAutoencoder(HookPoint(), n_latents, site.width)
            torch.nn.init.normal_(sae.bias, std=0.1)
            torch.nn.init.normal_(sae.latent_bias, std=0.1)
            saes[site.name] = sae
    return saes


def make_graph(
    model: Any, placed: str, *, error_nodes: bool = True, per_position: bool = False, separate: bool = True
) -> CircuitGraph:
    saes = saes_at(model, placed)
    return CircuitGraph(
        ac.sae_model(model, saes, error_nodes=error_nodes) if saes else model,
        per_position=SEQ if per_position else None,
        separate_qkv=separate,
    )


def random_circuit(graph: CircuitGraph, share: float, seed: int = 0, fractions: bool = False) -> Circuit:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(graph.n_edges, generator=generator)
    flat = draw * (draw < share) / share if fractions else (draw < share)
    return Circuit(graph.layout, graph.layout.split(flat))


def carried_by(circuit: Circuit, tree: bool) -> Callable[[str, str], Any]:
    """Look up, by the names of its ends, how much of the patch an edge carries."""
    layout = circuit.layout
    index = {layout.source_name(i, 0): i for i in range(layout.n_sources)}
    rows: dict[str, Tensor] = {}
    for d in layout.destinations:
        kept = circuit.kept[d.name].float()
        kept = 1 - kept if tree else kept
        for row in range(d.rows):
            name = d.name if d.heads is None else f"{d.name}/head.{row}"
            rows[name] = kept if d.heads is None else kept[..., row, :]
    return lambda source, destination: rows[destination][..., index[source]]


def dense_logits(model: Any, graph: CircuitGraph, batch: Any, circuit: Circuit, patch_type: str) -> Tensor:
    tree = patch_type == "tree"
    dense = DenseEdges(model, graph.saes, error_nodes=graph.error_nodes)
    current, other = (batch.clean, batch.corrupt) if tree else (batch.corrupt, batch.clean)
    with torch.no_grad():
        dense.run(other)
        patch = dict(dense.sources)
        return dense.run(current, patch, carried_by(circuit, tree))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("placed", "error_nodes", "per_position"),
    [
        *[("plain", True, p) for p in (False, True)],
        *[(sites, e, p) for sites in ("out", "inner") for e in (True, False) for p in (False, True)],
        ("mixed", True, False),
    ],
)
def test_circuits_equal_every_source_written_out(
    shared_model: Any, family: str, placed: str, error_nodes: bool, per_position: bool
) -> None:
    """Against TransformerLens' split hooks, by the names of edges; small, large and fractional circuits."""
    model = shared_model(family)
    graph = make_graph(model, placed, error_nodes=error_nodes, per_position=per_position)
    prompts = make_prompts(2, (SEQ - 1,))
    batch = next(prompts.batches())
    for patch_type, circuit in (
        ("tree", random_circuit(graph, 0.1)),
        ("tree", random_circuit(graph, 0.7, fractions=True)),
        ("edge", random_circuit(graph, 0.6)),
    ):
        ours = run_circuits(graph, prompts, [circuit], patch_type=patch_type, progress=False)[0]
        expected = dense_logits(model, graph, batch, circuit, patch_type)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placed", PLACED)
def test_sources_and_constants_add_up_to_the_stream(shared_model: Any, family: str, placed: str) -> None:
    graph = make_graph(shared_model(family), placed)
    recorder = GraphRecorder(graph)
    tokens = next(make_prompts(3, (SEQ - 1,)).batches()).clean
    values = SourceValues(recorder.record(tokens))
    for destination in graph.layout.destinations:
        groups = graph.layout.groups_before(destination)
        written = sum(values.total(g.name) + recorder.sources[g.name].constant for g in groups)
        torch.testing.assert_close(values.stream(destination.stage), written, rtol=1e-5, atol=1e-5)
    for name, source in recorder.sources.items():
        if source.directions is not None and source.group.remainder is None:
            written = source.write(values.coefficients(name), source.directions)
            torch.testing.assert_close(written, values.total(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("separate", [True, False])
def test_all_edges_patched_is_the_other_run_and_none_its_own_bitwise(
    shared_model: Any, family: str, placed: str, dtype: torch.dtype, separate: bool
) -> None:
    model = shared_model(family, dtype)
    graph = make_graph(model, placed, separate=separate)
    prompts = make_prompts(3, (SEQ - 1,))
    batch = next(prompts.batches())
    everything = Circuit.of(graph.layout, list(range(graph.n_edges)))
    nothing = Circuit.of(graph.layout, [])
    clean, corrupt = graph.plain_logits(batch.clean), graph.plain_logits(batch.corrupt)
    for patch_type in ("tree", "edge"):
        all_kept, none_kept = run_circuits(
            graph, prompts, [everything, nothing], patch_type=patch_type, progress=False
        )
        assert torch.equal(all_kept, clean) and torch.equal(none_kept, corrupt)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_circuits_are_near_single_precision(shared_model: Any, family: str) -> None:
    prompts = make_prompts(3, (SEQ - 1,))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        graph = make_graph(shared_model(family, dtype), "mixed")
        circuits = [random_circuit(graph, share) for share in (0.3, 0.9)]
        logits[dtype] = torch.stack(run_circuits(graph, prompts, circuits, progress=False)).float()
    assert (logits[torch.float32] - logits[torch.bfloat16]).abs().max() < 0.1


@pytest.mark.parametrize(
    "ablation", ["zero", "mean", "mean_clean", "mean_both", "mean_batch", "mean_positions"]
)
@pytest.mark.parametrize(("family", "placed"), [("gpt2", "mixed"), ("gemma2", "inner"), ("llama", "plain")])
def test_other_ablations_equal_every_source_replaced(
    shared_model: Any, family: str, placed: str, ablation: str
) -> None:
    model = shared_model(family)
    graph = make_graph(model, placed)
    prompts = make_prompts(4, (SEQ - 1,))
    batch = next(prompts.batches())
    circuit = random_circuit(graph, 0.6)
    dense = DenseEdges(model, graph.saes)
    with torch.no_grad():
        dense.run(batch.clean)
        clean = dict(dense.sources)
        dense.run(batch.corrupt)
        corrupt = dict(dense.sources)

        def instead(name: str) -> Tensor:
            a, b = clean[name], corrupt[name]
            means = {
                "zero": torch.zeros_like(a) + (graph_constant(graph, name)),
                "mean": b.mean(0, keepdim=True),
                "mean_clean": a.mean(0, keepdim=True),
                "mean_both": torch.cat([a, b]).mean(0, keepdim=True),
                "mean_batch": b.mean(0, keepdim=True),
                "mean_positions": b.mean((0, 1), keepdim=True),
            }
            return means[ablation].expand_as(a)

        expected = dense.run(batch.clean, {n: instead(n) for n in clean}, carried_by(circuit, tree=True))
    ours = run_circuits(graph, prompts, [circuit], ablation=ablation, progress=False)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    if "batch" not in ablation and "positions" not in ablation:
        one_by_one = run_circuits(graph, prompts, [circuit], ablation=ablation, batch_size=1, progress=False)[
            0
        ]
        torch.testing.assert_close(one_by_one, ours, rtol=1e-4, atol=1e-5)


def graph_constant(graph: CircuitGraph, source: str) -> Tensor | float:
    """The output bias that an MLP without SAE writes in any case; the reference counts it to the MLP."""
    if source.endswith(".mlp"):
        return GraphRecorder(graph).sources[source].constant
    return 0.0


def test_given_activations_are_what_other_edges_carry(shared_model: Any) -> None:
    graph = make_graph(shared_model("gpt2"), "mixed")
    prompts = make_prompts(4, (SEQ - 1,))
    batch = next(prompts.batches())
    circuit = random_circuit(graph, 0.5)
    given = GraphRecorder(graph).record(batch.corrupt)
    expected = run_circuits(graph, prompts, [circuit], progress=False)[0]
    ours = run_circuits(graph, prompts, [circuit], ablation=given, progress=False)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    one = {name: value[:1] for name, value in given.items()}
    assert run_circuits(graph, prompts, [circuit], ablation=one, progress=False)[0].shape == expected.shape
    wrong = {name: value[:, :2] for name, value in given.items()}
    with pytest.raises(InputError, match="2 tokens"):
        run_circuits(graph, prompts, [circuit], ablation=wrong, progress=False)
    with pytest.raises(InputError, match="lack"):
        run_circuits(graph, prompts, [circuit], ablation={}, progress=False)


@pytest.mark.parametrize("per_position", [False, True])
def test_masks_have_the_gradient_of_finite_differences(shared_model: Any, per_position: bool) -> None:
    graph = make_graph(shared_model("gpt2"), "mixed", per_position=per_position)
    prompts = make_prompts(3, (SEQ - 1,))
    flat = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(0))

    def value(weights: Tensor) -> Tensor:
        circuit = Circuit(graph.layout, graph.layout.split(weights))
        runs = circuit_logits(graph, prompts, [circuit], progress=False)
        return torch.stack([ac.logit_diff(logits, batch).sum() for batch, _, logits in runs]).sum()

    leaf = flat.clone().requires_grad_()
    gradient = torch.autograd.grad(value(leaf), leaf)[0]
    direction = torch.randn(graph.n_edges, generator=torch.Generator().manual_seed(1))
    step = 1e-2 * direction / direction.norm()
    with torch.no_grad():
        slope = (value(flat + step) - value(flat - step)) / 2
    torch.testing.assert_close(slope, gradient @ step, rtol=2e-2, atol=1e-5)


def test_nothing_is_left_behind_in_the_model(shared_model: Any) -> None:
    model = shared_model("llama")
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    flags = dict(vars(model.cfg))
    graph = make_graph(model, "mixed")
    run_circuits(graph, make_prompts(2, (SEQ - 1,)), [random_circuit(graph, 0.5)], progress=False)
    assert hooks == {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    assert flags == dict(vars(model.cfg))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_several_lengths_batch_sizes_and_orders_give_the_same(shared_model: Any) -> None:
    graph = make_graph(shared_model("gpt2"), "mixed")
    prompts = make_prompts(6, (5, 4))
    circuit = random_circuit(graph, 0.5)
    whole = run_circuits(graph, prompts, [circuit], progress=False)[0]
    for size in (1, 2):
        some = run_circuits(graph, prompts, [circuit], batch_size=size, progress=False)[0]
        torch.testing.assert_close(some, whole, rtol=1e-5, atol=1e-6)
    turned = run_circuits(graph, prompts.subset(list(range(6))[::-1]), [circuit], progress=False)[0]
    torch.testing.assert_close(turned.flip(0), whole, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_run_says_why(shared_model: Any) -> None:
    model = shared_model("gpt2")
    graph, prompts = make_graph(model, "out"), make_prompts(2, (SEQ - 1,))
    other = make_graph(model, "plain")
    with pytest.raises(InputError, match="another graph"):
        run_circuits(graph, prompts, [random_circuit(other, 0.5)], progress=False)
    with pytest.raises(InputError, match="Expected a Circuit"):
        run_circuits(graph, prompts, [["start->end"]], progress=False)
    with pytest.raises(UnknownNameError, match="tree"):
        run_circuits(graph, prompts, [random_circuit(graph, 0.5)], patch_type="tre", progress=False)
    scores = PruneScores(graph.layout, graph.layout.split(torch.zeros(graph.n_edges)))
    with pytest.raises(InputError, match="sizes must be"):
        run_circuits(graph, prompts, scores, [graph.n_edges + 1], progress=False)
    with pytest.raises(InputError, match="sizes must be"):
        run_circuits(graph, prompts, scores, progress=False)
    positions = make_graph(model, "plain", per_position=True)
    with pytest.raises(InputError, match="for each of 6 positions"):
        run_circuits(positions, make_prompts(2, (3,)), [random_circuit(positions, 0.5)], progress=False)


def test_latents_that_differ_nowhere_need_no_work(shared_model: Any) -> None:
    model = shared_model("gpt2")
    sae = ac.SparseAutoencoder(HookPoint(), 600, 24)
    torch.nn.init.constant_(sae.latent_bias, -100.0)  # never active
    graph = CircuitGraph(ac.sae_model(model, {"blocks.0.hook_mlp_out": sae}))
    prompts = make_prompts(2, (SEQ - 1,))
    latents = [i for i in range(graph.n_edges) if "/latent." in graph.edge(i).source]
    half = Circuit.of(graph.layout, sorted(set(range(graph.n_edges)) - set(latents[::2])))
    kept = run_circuits(graph, prompts, [half], progress=False)[0]
    torch.testing.assert_close(kept, graph.plain_logits(next(prompts.batches()).clean), rtol=1e-5, atol=1e-6)
    scores = ac.edge_attribution(graph, prompts, progress=False)
    assert not scores.flat()[latents].any()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("placed", ["out", "inner"])
@pytest.mark.parametrize("error_nodes", [True, False])
def test_saes_in_half_precision_run_too(
    shared_model: Any, family: str, placed: str, error_nodes: bool
) -> None:
    model = shared_model(family, torch.bfloat16)
    saes = {name: sae.to(torch.bfloat16) for name, sae in saes_at(model, placed).items()}
    graph = CircuitGraph(ac.sae_model(model, saes, error_nodes=error_nodes))
    prompts = make_prompts(2, (SEQ - 1,))
    everything = Circuit(graph.layout, graph.layout.split(torch.ones(graph.n_edges)))
    for ablation in Ablation:
        circuits = [random_circuit(graph, 0.5), random_circuit(graph, 0.5, fractions=True), everything]
        *_, kept = run_circuits(graph, prompts, circuits, ablation=ablation, progress=False)
        with graph.running(), torch.no_grad():
            assert torch.equal(kept, graph.last_logits(next(prompts.batches()).clean))
    assert ac.edge_attribution(graph, prompts, progress=False).flat().any()


def test_given_activations_may_be_edited_and_every_edge_carries_them(shared_model: Any) -> None:
    """Whatever is computed from the smaller side: hard, soft and scored circuits see the same."""
    model = shared_model("gpt2")
    graph, prompts = CircuitGraph(model), make_prompts(2, (SEQ - 1,))
    batch = next(prompts.batches())
    given = dict(GraphRecorder(graph).record(batch.corrupt))
    given["blocks.1.mlp:total"] = torch.zeros_like(given["blocks.1.mlp:total"])
    given["blocks.0.attn:coefficients"] = given["blocks.0.attn:coefficients"] + 1
    hard = torch.ones(graph.n_edges)
    hard[graph.layout.slice_of("end")] = 0
    soft = hard.clone().requires_grad_()
    circuits = [Circuit(graph.layout, graph.layout.split(kept)) for kept in (hard, soft)]
    for ablated in circuits:
        logits = run_circuits(graph, prompts, [ablated], ablation=given, progress=False)[0]
        dense = DenseEdges(model, {})
        with torch.no_grad():
            dense.run(batch.corrupt)
            patch = dict(dense.sources)
            patch["blocks.1.mlp"] = torch.zeros_like(patch["blocks.1.mlp"])
            patch["blocks.1.mlp"] += GraphRecorder(graph).sources["blocks.1.mlp"].constant
            for head in range(4):
                weight = graph.blocks[0].attn.weight.unflatten(0, (4, -1))[head]
                patch[f"blocks.0.attn/head.{head}"] = patch[f"blocks.0.attn/head.{head}"] + weight.sum(0)
            expected = dense.run(batch.clean, patch, lambda _s, d: float(d == "end"))
        torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="not finite"):
        run_circuits(
            graph, prompts, circuits, ablation={**given, "start:total": given["start:total"] * torch.nan}
        )
    with pytest.raises(InputError, match=r"expected a tensor \[batch, seq, 24\]"):
        run_circuits(
            graph, prompts, circuits, ablation={**given, "start:total": given["start:total"][..., :3]}
        )


def test_masks_keep_their_gradient_under_no_grad_and_generators_are_read_once(shared_model: Any) -> None:
    graph, prompts = make_graph(shared_model("gpt2"), "plain"), make_prompts(2, (SEQ - 1,))
    kept = torch.full((graph.n_edges,), 0.5, requires_grad=True)
    with torch.no_grad():
        circuit = Circuit(graph.layout, {n: m.clone() for n, m in graph.layout.split(kept).items()})
    soft = Circuit(graph.layout, graph.layout.split(kept))
    with torch.no_grad():
        assert run_circuits(graph, prompts, [soft], progress=False)[0].requires_grad
    assert len(run_circuits(graph, prompts, (c for c in (circuit, circuit)), progress=False)) == 2
    with pytest.raises(InputError, match="Circuits run on a graph"):
        run_circuits(graph.model, prompts, [circuit])
