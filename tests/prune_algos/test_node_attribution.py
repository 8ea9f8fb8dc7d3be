"""Attribution against autograd on an explicit mask, and ablation against rebuilding the activation."""

from typing import Any

import pytest
import torch
from conftest import VOCAB, make_prompts
from references import dense_run, inputs_of, parts
from torch import Tensor
from transformer_lens.hook_points import HookPoint

import auto_circuit as ac
from auto_circuit.errors import InputError, UnknownNameError
from auto_circuit.model_utils.sparse_autoencoders.latent_activations import JumpReLU, TopK

SITES = ("blocks.0.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.2.mlp.hook_post")


def make_saes() -> dict[str, ac.SparseAutoencoder]:
    torch.manual_seed(2)
    activations = [None, TopK(5), JumpReLU(0.2 * torch.rand(16))]
    widths = [24, 24, 40]
    return {
        name: ac.SparseAutoencoder(HookPoint(), 16, width, activation=activation)
        for name, width, activation in zip(SITES, widths, activations, strict=True)
    }


def patches_of(
    model: Any, saes: Any, prompts: Any, batch: Any, ablation: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each site's patched coefficients and error, from the definitions."""
    corrupt = inputs_of(model, batch.corrupt, list(saes))
    if ablation == "zero":
        return {n: (torch.zeros(1, 1, 16), torch.zeros(1, 1, saes[n].n_inputs)) for n in saes}
    if ablation == "resample":
        return {name: parts(saes[name], x) for name, x in corrupt.items()}
    whole = next(b for b in prompts.batches(100) if b.clean.shape[1] == batch.clean.shape[1])
    corrupt = inputs_of(model, whole.corrupt, list(saes))
    means = {}
    for name, x in corrupt.items():
        c, e = parts(saes[name], x)
        means[name] = (c.mean(0, keepdim=True), e.mean(0, keepdim=True))
    return means


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_autograd_on_an_explicit_mask(
    shared_model: Any, prompts: Any, ablation: str, family: str
) -> None:
    model, saes = shared_model(family), make_saes()
    scores = ac.node_attribution(ac.sae_model(model, saes), prompts, ablation=ablation, progress=False)
    masks = {name: (torch.ones(16, requires_grad=True), torch.ones((), requires_grad=True)) for name in saes}
    for batch in prompts.batches(4):
        patch = patches_of(model, saes, prompts, batch, ablation)

        def rebuild(name: str, x: Tensor, c: Tensor, e: Tensor, patch: Any = patch) -> Tensor:
            latents, error = masks[name]
            dc, de = (c - patch[name][0]).detach(), (e - patch[name][1]).detach()
            return x + ((latents - 1) * dc) @ saes[name].decode_weight.detach().T + (error - 1) * de

        ac.logit_diff(dense_run(model, batch.clean, saes, rebuild), batch).sum().backward()
    for name in saes:
        latents, error = (mask.grad / len(prompts) for mask in masks[name])
        torch.testing.assert_close(scores.sites[name].latents, latents, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(scores.sites[name].error, error, rtol=1e-3, atol=1e-6)
    assert scores.flat().abs().max() > 1e-3
    model.zero_grad(set_to_none=True)  # the reference's backward filled the shared model's


def test_leaves_no_gradients_hooks_or_edits_behind(shared_model: Any, prompts: Any) -> None:
    model, saes = shared_model("gpt2"), make_saes()
    model.zero_grad(set_to_none=True)
    with ac.sae_model(model, saes) as spliced:
        ac.node_attribution(spliced, prompts, progress=False)
    assert all(p.grad is None for p in model.parameters())
    for sae in saes.values():
        assert sae.edit is None and sae.counting and (sae.latent_total_act == 0).all()
        assert all(p.grad is None for p in sae.parameters())


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
def test_exact_effects_equal_rebuilding_the_activation(
    shared_model: Any, prompts: Any, ablation: str
) -> None:
    model, saes = shared_model("llama"), make_saes()
    spliced = ac.sae_model(model, saes)
    scores = ac.node_attribution(spliced, prompts, ablation=ablation, progress=False)
    nodes = [*scores.top(6), *[node for node in scores if node.latent is None]]
    effects = ac.exact_node_effects(spliced, prompts, nodes, ablation=ablation, progress=False)
    for node, effect in zip(nodes, effects, strict=True):
        total = 0.0
        for batch in prompts.batches(100):
            patch = patches_of(model, saes, prompts, batch, ablation)

            def rebuild(
                name: str, x: Tensor, c: Tensor, e: Tensor, patch: Any = patch, node: Any = node
            ) -> Tensor:
                if name != node.site:
                    return x
                c2, e2 = c.clone(), e
                if node.latent is None:
                    e2 = patch[name][1]
                else:
                    c2[..., node.latent] = patch[name][0].expand_as(c)[..., node.latent]
                return c2 @ saes[name].decode_weight.T + saes[name].bias + e2

            with torch.no_grad():
                clean = ac.logit_diff(model(batch.clean)[:, -1], batch)
                total += (
                    (clean - ac.logit_diff(dense_run(model, batch.clean, saes, rebuild), batch)).sum().item()
                )
        assert effect == pytest.approx(total / len(prompts), rel=1e-3, abs=2e-6)


def test_attribution_is_exact_where_the_model_is_linear(prompts: Any) -> None:
    """The stream after the last block, no final norm, logits linear in it: first order is everything."""
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    cfg = dict(n_layers=1, d_model=24, n_heads=4, d_head=6, n_ctx=32, d_vocab=VOCAB, attn_only=True)
    model = TransformerBridge.boot_native(cfg | dict(normalization_type=None)).eval()
    spliced = ac.sae_model(model, {"blocks.0.hook_resid_post": ac.SparseAutoencoder(HookPoint(), 16, 24)})
    scores = ac.node_attribution(spliced, prompts, progress=False)
    effects = ac.exact_node_effects(spliced, prompts, list(scores), progress=False)
    torch.testing.assert_close(scores.flat(), torch.tensor(effects), rtol=1e-3, atol=1e-5)
    # A score is objective(kept) − objective(ablated): all nodes together are the whole change.
    assert scores.flat().sum().item() == pytest.approx(_whole_change(model, prompts), rel=1e-3, abs=1e-5)


def _whole_change(model: Any, prompts: Any) -> float:
    with torch.no_grad():
        return sum(
            (ac.logit_diff(model(b.clean)[:, -1], b) - ac.logit_diff(model(b.corrupt)[:, -1], b)).sum().item()
            for b in prompts.batches(100)
        ) / len(prompts)


def test_integrated_gradients_sum_to_patching_each_site_whole(shared_model: Any, prompts: Any) -> None:
    model, saes = shared_model("gpt2"), make_saes()
    spliced = ac.sae_model(model, saes)
    scores = ac.node_attribution(spliced, prompts, ig_steps=10, progress=False)
    for name, sae in saes.items():
        change = 0.0
        for batch in prompts.batches(100):
            x = inputs_of(model, batch.corrupt, [name])[name]
            with torch.no_grad():
                patched = model.run_with_hooks(batch.clean, fwd_hooks=[(name, lambda _, hook, x=x: x)])[:, -1]
                clean = model(batch.clean)[:, -1]
            change += (ac.logit_diff(clean, batch) - ac.logit_diff(patched, batch)).sum().item()
        site = scores.sites[name]
        total = (site.latents.sum() + site.error).item()
        assert total == pytest.approx(change / len(prompts), rel=2e-2, abs=1e-4)
        plain = ac.node_attribution(spliced, prompts, progress=False).sites[name]
        assert not torch.allclose(site.latents, plain.latents, atol=1e-5) or sae.n_inputs == 40


def test_an_earlier_nodes_score_does_not_depend_on_later_sites(shared_model: Any, prompts: Any) -> None:
    model, saes = shared_model("llama"), make_saes()
    alone = ac.node_attribution(ac.sae_model(model, {SITES[0]: saes[SITES[0]]}), prompts, progress=False)
    together = ac.node_attribution(ac.sae_model(model, saes), prompts, progress=False)
    torch.testing.assert_close(alone.sites[SITES[0]].latents, together.sites[SITES[0]].latents)
    torch.testing.assert_close(alone.sites[SITES[0]].error, together.sites[SITES[0]].error)


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("error_nodes", [True, False])
def test_same_whatever_the_batch_size_and_order(
    shared_model: Any, prompts: Any, steps: int | None, error_nodes: bool
) -> None:
    spliced = ac.sae_model(shared_model("gpt2"), make_saes(), error_nodes=error_nodes)
    options = dict(ig_steps=steps, progress=False)
    one = ac.node_attribution(spliced, prompts, batch_size=100, **options)
    two = ac.node_attribution(spliced, prompts, batch_size=1, **options)
    three = ac.node_attribution(spliced, prompts.subset(range(len(prompts))[::-1]), batch_size=2, **options)
    torch.testing.assert_close(one.flat(), two.flat(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(one.flat(), three.flat(), rtol=1e-3, atol=1e-6)
    assert (one.sites[SITES[0]].error is not None) == error_nodes


def test_without_error_nodes_equals_autograd_in_the_reconstructed_model(
    shared_model: Any, prompts: Any
) -> None:
    model, saes = shared_model("gpt2"), make_saes()
    spliced = ac.sae_model(model, saes, error_nodes=False)
    scores = ac.node_attribution(spliced, prompts, ablation="zero", progress=False)
    masks = {name: torch.ones(16, requires_grad=True) for name in saes}
    for batch in prompts.batches(100):

        def rebuild(name: str, x: Tensor, c: Tensor, e: Tensor) -> Tensor:
            # The mask scales the value that is there; upstream gradients still run through it.
            return (c + (masks[name] - 1) * c.detach()) @ saes[name].decode_weight.T + saes[name].bias

        ac.logit_diff(dense_run(model, batch.clean, saes, rebuild), batch).sum().backward()
    for name in saes:
        wanted = masks[name].grad / len(prompts)
        torch.testing.assert_close(scores.sites[name].latents, wanted, rtol=1e-3, atol=1e-6)


def test_per_position_adds_up_and_works_on_saes_pruned_per_position(shared_model: Any) -> None:
    model, saes, prompts = shared_model("llama"), make_saes(), make_prompts(lengths=(6,))
    spliced = ac.sae_model(model, saes)
    whole = ac.node_attribution(spliced, prompts, progress=False)
    each = ac.node_attribution(spliced, prompts, per_position=True, progress=False)
    assert each.per_position and each.sites[SITES[0]].latents.shape == (7, 16)
    for name in saes:
        torch.testing.assert_close(
            each.sites[name].latents.sum(0), whole.sites[name].latents, rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(
            each.sites[name].error.sum(), whole.sites[name].error, rtol=1e-3, atol=1e-6
        )
    node = each.top(1)[0]
    effects = ac.exact_node_effects(spliced, prompts, each.top(3), progress=False)
    assert node.position is not None and len(set(effects)) == 3
    spliced.prune_latents(prompts, 3, per_position=True, progress=False)
    pruned = ac.node_attribution(spliced, prompts, per_position=True, progress=False)
    for name in saes:
        ids = saes[name].latent_ids
        torch.testing.assert_close(
            pruned.sites[name].latents, each.sites[name].latents.gather(-1, ids), rtol=1e-3, atol=1e-6
        )
    with pytest.raises(InputError, match="per_position=True"):
        ac.node_attribution(spliced, prompts, progress=False)


@pytest.mark.parametrize("error_nodes", [True, False])
@pytest.mark.parametrize("steps", [None, 2])
def test_objectives_can_compare_with_the_plain_model(
    shared_model: Any, prompts: Any, error_nodes: bool, steps: int | None
) -> None:
    model, seen = shared_model("gpt2"), []

    def distance(logits: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            seen.append(torch.equal(batch.reference_logits, plain[tuple(batch.idxs.tolist())]))
        return -(logits - batch.reference_logits + 1).abs().sum(-1)

    plain = {tuple(b.idxs.tolist()): model(b.clean)[:, -1] for b in prompts.batches()}
    spliced = ac.sae_model(model, make_saes(), error_nodes=error_nodes)
    scores = ac.node_attribution(spliced, prompts, distance, ig_steps=steps, progress=False)
    ac.exact_node_effects(spliced, prompts, scores.top(1), distance, progress=False)
    assert seen and all(seen)


def test_inference_mode_outside_changes_nothing(shared_model: Any, prompts: Any) -> None:
    model, saes = shared_model("gpt2"), make_saes()
    spliced = ac.sae_model(model, saes)
    expected = ac.node_attribution(spliced, prompts, progress=False)
    with torch.inference_mode():
        scores = ac.node_attribution(spliced, prompts, progress=False)
        spliced.prune_latents(prompts, 5, progress=False)
        for sae in saes.values():
            sae.reset_activated_latents()
    assert torch.equal(scores.flat(), expected.flat())
    spliced(next(prompts.batches()).clean).sum().backward()
    model.zero_grad(set_to_none=True)
    assert (saes[SITES[0]].latent_total_act > 0).any()


def test_float64_and_bfloat16_models(make_model: Any, prompts: Any) -> None:
    reference = None
    for dtype, tolerance in ((torch.float64, 1e-3), (torch.float32, 1e-3), (torch.bfloat16, 0.5)):
        model = make_model("llama", dtype)
        saes = ac.neuron_saes(model, [1])
        assert saes["blocks.1.mlp.hook_post"].bias.dtype == torch.promote_types(dtype, torch.float32)
        spliced = ac.sae_model(model, saes)
        scores = ac.node_attribution(spliced, prompts, ablation="mean", progress=False)
        reference = scores.flat() if reference is None else reference
        assert (scores.flat() - reference).norm() < tolerance * reference.norm()
        assert scores.sites["blocks.1.mlp.hook_post"].error.abs() < 1e-6
        spliced.prune_latents(prompts, 5, progress=False)


def test_wrong_input(shared_model: Any, prompts: Any) -> None:
    spliced = ac.sae_model(shared_model("gpt2"), make_saes())
    with pytest.raises(InputError, match="one length; these have \\[6, 7\\]"):
        ac.node_attribution(spliced, prompts, per_position=True, progress=False)
    with pytest.raises(InputError, match="ig_steps"):
        ac.node_attribution(spliced, prompts, ig_steps=0, progress=False)
    with pytest.raises(UnknownNameError, match="resample"):
        ac.node_attribution(spliced, prompts, ablation="resampl", progress=False)
    scores = ac.node_attribution(spliced, prompts, progress=False)
    for node in (
        ac.Node(SITES[0], -1, -1, None, 0.0), ac.Node(SITES[0], 500, 500, None, 0.0),
        ac.Node(SITES[0], 1, 1, 9, 0.0), ac.Node(SITES[0], 3, 4, None, 0.0),
    ):  # fmt: skip
        with pytest.raises(InputError, match="is no node of this model"):
            ac.exact_node_effects(spliced, prompts, [node], progress=False)
    without = ac.sae_model(spliced.model, spliced.saes, error_nodes=False)
    with pytest.raises(InputError, match="no error node"):
        ac.exact_node_effects(without, prompts, [n for n in scores if n.latent is None], progress=False)
    with pytest.raises(InputError, match="one number for each prompt"):
        ac.node_attribution(spliced, prompts, lambda logits, batch: logits.mean(), progress=False)
    spliced.saes[SITES[1]].latent_bias.data[2] = torch.nan
    with pytest.raises(InputError, match=f"Scores at {SITES[0]} are not finite|Scores at {SITES[1]}"):
        ac.node_attribution(spliced, prompts, progress=False)
    with pytest.raises(InputError, match=f"Latents at {SITES[1]} are not finite"):
        spliced.prune_latents(prompts, progress=False)
    spliced.saes[SITES[1]].latent_bias.data[2] = 0
    spliced.prune_latents(prompts, 6, progress=False)
    with pytest.raises(InputError, match="is no node of this model"):  # another latent stands there now
        ac.exact_node_effects(spliced, prompts, scores.top(40), progress=False)
    nodes = [ac.Node("blocks.9.hook_mlp_out", 0, 0, None, 0.0)]
    with pytest.raises(UnknownNameError, match=r"blocks.0.hook_mlp_out"):
        ac.exact_node_effects(spliced, prompts, nodes, progress=False)
    assert not spliced.is_spliced


def test_an_objective_that_vanishes_at_the_clean_run_needs_a_path(shared_model: Any, prompts: Any) -> None:
    spliced = ac.sae_model(shared_model("gpt2"), make_saes())

    def kl(logits: Tensor, batch: Any) -> Tensor:
        p, q = batch.reference_logits.log_softmax(-1), logits.log_softmax(-1)
        return -(p.exp() * (p - q)).sum(-1)

    with pytest.raises(InputError, match="kl vanishes.*ig_steps"):
        ac.node_attribution(spliced, prompts, kl, progress=False)
    assert ac.node_attribution(spliced, prompts, kl, ig_steps=2, progress=False).flat().any()
