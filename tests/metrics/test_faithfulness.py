from typing import Any

import pytest
import torch
from conftest import make_prompts
from prune_algos.test_node_attribution import make_saes, patches_of
from references import dense_run
from torch import Tensor

import auto_circuit as ac
from auto_circuit.errors import InputError
from auto_circuit.metrics.faithfulness import default_sizes


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
@pytest.mark.parametrize("signed", [False, True])
def test_curve_equals_rebuilding_every_site(
    shared_model: Any, prompts: Any, ablation: str, signed: bool
) -> None:
    model, saes = shared_model("gpt2"), make_saes()
    spliced = ac.sae_model(model, saes)
    scores = ac.node_attribution(spliced, prompts, ablation=ablation, progress=False)
    sizes = [0, 3, 11, 30, len(scores)]
    curve = ac.faithfulness_curve(
        spliced, scores, prompts, ablation=ablation, sizes=sizes, signed=signed, batch_size=2, progress=False
    )
    flat = scores.flat() if signed else scores.flat().abs()
    order = sorted(range(len(scores)), key=lambda i: (-flat[i].item(), i))
    for size, value in zip(sizes, curve.objective, strict=True):
        kept = {(node.site, node.latent) for node in (scores.node(i) for i in order[:size])}
        total = 0.0
        for batch in prompts.batches(100):
            patch = patches_of(model, saes, prompts, batch, ablation)

            def rebuild(
                name: str, x: Tensor, c: Tensor, e: Tensor, patch: Any = patch, kept: Any = kept
            ) -> Tensor:
                mask = torch.tensor([(name, i) in kept for i in range(16)])
                c = torch.where(mask, c, patch[name][0])
                e = e if (name, None) in kept else patch[name][1]
                return c @ saes[name].decode_weight.T + saes[name].bias + e

            with torch.no_grad():
                total += ac.logit_diff(dense_run(model, batch.clean, saes, rebuild), batch).sum().item()
        assert value == pytest.approx(total / len(prompts), rel=1e-3, abs=1e-5)
    assert curve.faithfulness[0] == 0 and curve.faithfulness[-1] == 1
    assert curve.objective[-1] == curve.full and curve.objective[0] == curve.empty
    assert curve.smallest(1.0) is not None and curve.smallest(1e9) is None


def test_without_error_nodes_full_is_still_the_plain_model(shared_model: Any, prompts: Any) -> None:
    model, saes = shared_model("gpt2"), make_saes()
    spliced = ac.sae_model(model, saes, error_nodes=False)
    scores = ac.node_attribution(spliced, prompts, progress=False)
    curve = ac.faithfulness_curve(spliced, scores, prompts, progress=False)
    with torch.no_grad():
        full, recon = (
            sum(ac.logit_diff(run(b.clean)[:, -1], b).sum().item() for b in prompts.batches()) / len(prompts)
            for run in (model, spliced)
        )
    assert curve.full == pytest.approx(full) and curve.objective[-1] == pytest.approx(recon)
    assert curve.sizes == default_sizes(48) == [1, 2, 5, 10, 20, 48]


def test_an_overshoot_is_not_faithful() -> None:
    curve = ac.FaithfulnessCurve(
        [1, 2, 5, 9], [6.7, 0.5, 1.1, 1.0], [0.0] * 4, 1.0, 0.0, 3, "zero", True, False
    )
    assert curve.smallest(0.9) == 5 and curve.smallest(0.95) == 9 and curve.smallest(0.4) == 2


def test_per_position_masks(shared_model: Any) -> None:
    model, saes, prompts = shared_model("gpt2"), make_saes(), make_prompts(lengths=(6,))
    spliced = ac.sae_model(model, saes)
    each = ac.node_attribution(spliced, prompts, per_position=True, progress=False)
    whole = ac.node_attribution(spliced, prompts, progress=False)
    ends = [
        ac.faithfulness_curve(spliced, scores, prompts, sizes=[len(scores)], progress=False)
        for scores in (each, whole)
    ]
    assert ends[0].empty == pytest.approx(ends[1].empty) and ends[0].full == ends[1].full
    curve = ac.faithfulness_curve(spliced, each, prompts, sizes=[5, 50], progress=False)
    assert 0 not in curve.faithfulness


def test_wrong_input(shared_model: Any, prompts: Any) -> None:
    spliced = ac.sae_model(shared_model("gpt2"), make_saes())
    scores = ac.node_attribution(spliced, prompts, progress=False)
    each = ac.node_attribution(spliced, make_prompts(lengths=(6,)), per_position=True, progress=False)
    with pytest.raises(InputError, match=r"each of 7 positions; the prompts have \[6, 7\]"):
        ac.faithfulness_curve(spliced, each, prompts, progress=False)
    for sizes in ([-1], [52], []):
        with pytest.raises(InputError, match="0 to 51"):
            ac.faithfulness_curve(spliced, scores, prompts, sizes=sizes, progress=False)
    spliced.prune_latents(prompts, 4, progress=False)
    with pytest.raises(InputError, match="Score again after pruning"):
        ac.faithfulness_curve(spliced, scores, prompts, progress=False)
    same = ac.PromptDataset(
        [ac.PromptPair(pair.clean, pair.clean, pair.answers, pair.wrong_answers) for pair in prompts.pairs],
        __import__("conftest").WordTokens(),
    )
    scores = ac.node_attribution(spliced, same, progress=False)
    with pytest.raises(InputError, match="faithfulness is not defined"):
        ac.faithfulness_curve(spliced, scores, same, progress=False)


@pytest.mark.parametrize("patch_type", ["tree", "edge"])
def test_curve_of_edges_is_that_of_the_circuits(shared_model: Any, patch_type: str) -> None:
    model, prompts = shared_model("llama"), make_prompts(5, (5, 4))
    graph = ac.CircuitGraph(model)
    scores = ac.edge_attribution(graph, prompts, progress=False)
    sizes = [5, 40, len(scores)]
    curve = ac.faithfulness_curve(
        graph, scores, prompts, sizes=sizes, patch_type=patch_type, batch_size=2, progress=False
    )
    circuits = [scores.top(k) for k in (0, *sizes)]
    logits = ac.run_circuits(graph, prompts, circuits, patch_type=patch_type, progress=False)

    def value(rows: Tensor) -> float:
        return float(sum(ac.logit_diff(rows[b.idxs], b).sum() for b in prompts.batches())) / len(prompts)

    empty, *values = map(value, logits)
    assert curve.objective == pytest.approx(values, abs=1e-5) and curve.empty == pytest.approx(
        empty, abs=1e-5
    )
    expected = [(v - empty) / (curve.full - empty) for v in values]
    assert curve.faithfulness == pytest.approx(expected, abs=1e-4) and curve.faithfulness[-1] == 1
    assert curve.unit == "edges" and curve.patch_type == patch_type
    with pytest.raises(InputError, match="use patch_type 'tree'"):
        ac.faithfulness_curve(graph, scores, prompts, patch_type="edge", ablation="zero", progress=False)
    with pytest.raises(InputError, match="PruneScores with their CircuitGraph"):
        ac.faithfulness_curve(model, scores, prompts, progress=False)
