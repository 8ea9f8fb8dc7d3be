from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_prompts
from patching.test_edge_patching import PLACED, make_graph, saes_at
from transformer_lens.hook_points import HookPoint

import auto_circuit as ac
from auto_circuit.errors import InputError, SpliceError, UnknownNameError


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("separate", [True, False])
def test_every_source_has_an_edge_to_every_later_reader(
    shared_model: Any, family: str, placed: str, separate: bool
) -> None:
    """Counted by hand from the sizes of the tiny models: 3 layers, 4 heads, 6 latents where SAEs stand."""
    model = shared_model(family)
    graph = make_graph(model, placed, separate=separate)
    with_mlp, parallel = family != "native_attn_only", family == "neox"
    kv = 2 if family in ("llama", "gemma2", "qwen3") else 4
    rows = 4 + 2 * kv if separate else kv
    sites = {name.removeprefix("blocks.") for name in graph.saes}
    before, expected = 1, 0
    for layer in range(3):
        of_attn = 7 if {f"{layer}.hook_attn_out", f"{layer}.attn.hook_z"} & sites else 4
        of_mlp = 7 if {f"{layer}.hook_mlp_out", f"{layer}.mlp.hook_post"} & sites else 1
        expected += rows * before
        expected += (before if parallel else before + of_attn) if with_mlp else 0
        before += of_attn + (of_mlp if with_mlp else 0)
    assert graph.n_edges == expected + before
    names = {graph.edge_name(i) for i in range(graph.n_edges)}
    assert len(names) == graph.n_edges and "start->end" in names
    assert len(graph.sources_of("end")) == before


def test_positions_multiply_edges_and_name_them(shared_model: Any) -> None:
    whole = make_graph(shared_model("gpt2"), "out")
    each = make_graph(shared_model("gpt2"), "out", per_position=True)
    assert each.n_edges == 6 * whole.n_edges
    assert each.edge_name(each.edge_index("start->end@4")) == "start->end@4"
    with pytest.raises(InputError, match="no position"):
        whole.edge_index("start->end@4")
    for wrong in (0, True, 6.0):
        with pytest.raises(InputError, match="per_position is the number of tokens"):
            ac.CircuitGraph(shared_model("gpt2"), per_position=wrong)


@pytest.mark.parametrize("kind", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"])
def test_saes_on_the_stream_have_no_edges(shared_model: Any, kind: str) -> None:
    sae = ac.SparseAutoencoder(HookPoint(), 6, 24)
    spliced = ac.sae_model(shared_model("gpt2"), {f"blocks.1.{kind}": sae})
    with pytest.raises(InputError, match="cuts it.*node_attribution"):
        ac.CircuitGraph(spliced)


def test_saes_in_series_on_one_component_are_refused(shared_model: Any) -> None:
    saes = {"blocks.1.mlp.hook_post": ac.SparseAutoencoder(HookPoint(), 6, 40)}
    saes["blocks.1.hook_mlp_out"] = ac.SparseAutoencoder(HookPoint(), 6, 24)
    with pytest.raises(InputError, match="in series"):
        ac.CircuitGraph(ac.sae_model(shared_model("gpt2"), saes))


def test_saes_pruned_per_position_need_positions(shared_model: Any) -> None:
    model, saes = shared_model("gpt2"), saes_at(shared_model("gpt2"), "out")
    idxs = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(s))[:3] for s in range(6)])
    for sae in saes.values():
        sae.prune_latents(idxs)
    spliced = ac.sae_model(model, saes)
    with pytest.raises(InputError, match="set per_position=6"):
        ac.CircuitGraph(spliced)
    graph = ac.CircuitGraph(spliced, per_position=6)
    for position in (0, 5):
        named = {f"blocks.0.hook_mlp_out/latent.{i}" for i in idxs[position].tolist()}
        found = {graph.edge(i) for i in range(graph.n_edges)}
        at_end = {e.source for e in found if e.destination == "end" and e.position == position}
        assert named == {s for s in at_end if s.startswith("blocks.0.hook_mlp_out/latent")}
    scores = ac.edge_attribution(graph, make_prompts(2, (5,)), progress=False)
    full = ac.CircuitGraph(ac.sae_model(model, saes_at(model, "out")), per_position=6)
    expected = ac.edge_attribution(full, make_prompts(2, (5,)), progress=False)
    for i in range(0, graph.n_edges, 7):
        name = graph.edge_name(i)
        if "/error" not in name:
            assert scores[i] == pytest.approx(expected[name], rel=1e-3, abs=1e-6)


def test_unknown_names_say_what_is_near(shared_model: Any) -> None:
    graph = make_graph(shared_model("gpt2"), "out")
    with pytest.raises(UnknownNameError, match="blocks.1.attn.q"):
        graph.edge_index("start->blocks.1.atn.q/head.0")
    with pytest.raises(UnknownNameError, match="latent.5"):
        graph.edge_index("blocks.0.hook_mlp_out/latent.6->end")
    with pytest.raises(InputError, match="no such edge"):
        graph.edge_index("blocks.2.mlp->blocks.1.mlp.in")


def test_a_model_spliced_meanwhile_is_refused(shared_model: Any) -> None:
    model = shared_model("gpt2")
    graph = ac.CircuitGraph(model)
    with ac.sae_model(model, saes_at(model, "out")), pytest.raises(SpliceError, match="spliced already"):
        ac.edge_attribution(graph, make_prompts(2, (5,)), progress=False)


def test_a_model_that_changed_meanwhile_is_refused(make_model: Any) -> None:
    model, prompts = make_model("gpt2"), make_prompts(2, (5,))
    graph = ac.CircuitGraph(model)
    model.add_hook("blocks.1.hook_attn_out", lambda x, hook: 2 * x)
    with pytest.raises(InputError, match=r"Hooks at blocks.1.*reset_hooks"):
        ac.edge_attribution(graph, prompts, progress=False)
    with pytest.raises(InputError, match=r"There are hooks at blocks.0.hook_out, blocks.1"):
        model.add_hook("blocks.0.hook_resid_post", lambda x, hook: 2 * x)
        ac.CircuitGraph(model)
    model.reset_hooks()
    ac.edge_attribution(graph, prompts, progress=False)
    model.train()
    for call in (lambda: ac.CircuitGraph(model), lambda: ac.edge_attribution(graph, prompts, progress=False)):
        with pytest.raises(InputError, match=r"training mode.*model.eval"):
            call()
    model.eval()
    with torch.no_grad():
        model.blocks[0].ln1.original_component.weight.mul_(2)
    with pytest.raises(InputError, match="weights changed"):
        ac.edge_attribution(graph, prompts, progress=False)


def test_other_error_nodes_than_the_graph_was_made_with_are_refused(shared_model: Any) -> None:
    spliced = ac.sae_model(shared_model("gpt2"), saes_at(shared_model("gpt2"), "out"))
    graph = ac.CircuitGraph(spliced)
    with spliced.with_error_nodes(False), pytest.raises(InputError, match="error_nodes=True"):
        ac.edge_attribution(graph, make_prompts(2, (5,)), progress=False)
