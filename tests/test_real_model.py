"""SmolLM2-135M with SAEs that SAELens trained on it: the whole job on a real language model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_utils.sparse_autoencoders.test_autoencoder_transformer import assert_same, state_of
from patching.test_edge_patching import dense_logits, random_circuit

import auto_circuit as ac
from auto_circuit.errors import InputError

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def prompts(smollm2: Any) -> ac.PromptDataset:
    return ac.load_prompts("ioi", smollm2, n=32, seed=0)


def test_the_model_knows_the_answer(smollm2: Any) -> None:
    logits = smollm2("When Mary and John went to the store, John gave a drink to")
    assert smollm2.tokenizer.decode(logits[0, -1].argmax()) == " Mary"
    assert len(smollm2.blocks) == 30 and smollm2.cfg.d_model == 576


def test_bitwise_equal_on_32_prompts_and_restored(smollm2: Any, prompts: Any, fixtures: Path) -> None:
    saes = ac.load_saes(fixtures / "smollm2_saes")
    assert {sae.activation.kind for sae in saes.values()} == {"relu", "topk", "jumprelu", "gated"}
    before = state_of(smollm2)
    with torch.no_grad():
        plain = [smollm2(batch.clean) for batch in prompts.batches()]
        with ac.sae_model(smollm2, saes) as spliced:
            for batch, logits in zip(prompts.batches(), plain, strict=True):
                assert torch.equal(spliced(batch.clean), logits)
                out, cache = spliced.run_with_cache(batch.clean, names_filter=lambda name: "latents" in name)
                assert torch.equal(out, logits) and len(cache) >= 5
    assert_same(before, smollm2)


def test_reconstruction_quality_is_what_the_fixtures_say(smollm2: Any, fixtures: Path) -> None:
    """L0 and FVU on the prose they were trained on; a scale or bias lost in loading would show here."""
    import gzip

    with gzip.open(fixtures / "text" / "prose.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read(12_000)
    ids = smollm2.to_tokens(text[4_000:], prepend_bos=False)[0][: 127 * 12].reshape(-1, 127)
    tokens = torch.cat([torch.full((len(ids), 1), smollm2.tokenizer.bos_token_id), ids], 1)
    saes = ac.load_saes(fixtures / "smollm2_saes")
    with torch.no_grad():
        _, cache = smollm2.run_with_cache(tokens, names_filter=list(saes))
    measured = {}
    for name, sae in saes.items():
        x = cache[name][:, 1:].double().flatten(0, 1)
        sae = sae.double()
        z = sae.encode(x)
        fvu = ((x - sae.decode(z)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        measured[name] = ((z > 0).sum(-1).double().mean().item(), fvu.item())
    stated = {
        "blocks.6.hook_mlp_out": (32, 0.38), "blocks.12.hook_mlp_out": (167, 0.33),
        "blocks.18.hook_mlp_out": (32, 0.34), "blocks.24.hook_mlp_out": (33, 0.34),
        "blocks.14.hook_resid_post": (214, None),  # its FVU hangs on how many massive activations there are
    }  # fmt: skip
    for name, (l0, fvu) in stated.items():
        assert measured[name][0] == pytest.approx(l0, rel=0.15), (name, measured)
        assert fvu is None or measured[name][1] == pytest.approx(fvu, rel=0.2), (name, measured)


def test_latent_circuit_of_ioi(smollm2: Any, prompts: Any, fixtures: Path) -> None:
    few = prompts.subset(range(12))
    with ac.sae_model(smollm2, ac.load_saes(fixtures / "smollm2_saes")) as spliced:
        scores = ac.node_attribution(spliced, few, progress=False)
        curve = ac.faithfulness_curve(spliced, scores, few, sizes=[1, 200, 2000, len(scores)], progress=False)
        top = scores.top(12)
        effects = torch.tensor(ac.exact_node_effects(spliced, few, top, progress=False))
    assert curve.faithfulness[-1] == 1 and curve.faithfulness[0] < 0.5 < curve.faithfulness[2]
    # First order against exact: the errors' large changes bend, the order of things stays.
    estimates = torch.tensor([node.score for node in top])
    assert torch.corrcoef(torch.stack([estimates, effects]))[0, 1] > 0.8


def test_neurons_as_latents(smollm2: Any, prompts: Any) -> None:
    few = prompts.subset(range(4))
    with ac.sae_model(smollm2, ac.neuron_saes(smollm2, [18, 24])) as spliced:
        scores = ac.node_attribution(spliced, few, progress=False)
    assert len(scores) == 2 * 1537
    assert all(site.error.abs() < 1e-4 for site in scores.sites.values())


def test_edge_circuit_of_ioi(smollm2: Any, prompts: Any, fixtures: Path) -> None:
    """One in a hundred of 1.9 million edges explains most of it; sources add up to a real stream."""
    few = prompts.subset(range(4))
    saes = ac.load_saes(fixtures / "smollm2_saes")
    with pytest.raises(InputError, match="blocks.14.hook_resid_post stands on the residual stream"):
        ac.CircuitGraph(ac.sae_model(smollm2, saes))
    saes.pop("blocks.14.hook_resid_post")
    with ac.sae_model(smollm2, saes) as spliced:
        graph = ac.CircuitGraph(spliced)
        scores = ac.edge_attribution(graph, few, progress=False)
        size = graph.n_edges // 100
        curve = ac.faithfulness_curve(graph, scores, few, sizes=[size, graph.n_edges], progress=False)
    assert graph.n_edges == 1_913_851
    assert curve.faithfulness[0] > 0.75 and curve.faithfulness[1] == 1


def test_edges_of_a_real_model_equal_every_source_written_out(smollm2: Any, prompts: Any) -> None:
    """Against TransformerLens' split hooks: 30 layers, grouped heads, RoPE, massive activations."""
    one = prompts.subset([0])
    graph = ac.CircuitGraph(smollm2)
    circuit = random_circuit(graph, 0.6)
    ours = ac.run_circuits(graph, one, [circuit], progress=False)[0]
    expected = dense_logits(smollm2, graph, next(one.batches()), circuit, "tree")
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
