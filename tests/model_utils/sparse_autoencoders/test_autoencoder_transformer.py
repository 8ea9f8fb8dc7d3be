"""Architecture conformance: the splice on every family, every kind of site, both error-node settings."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from auto_circuit import SparseAutoencoder, sae_model
from auto_circuit.errors import InputError, SpliceError, UnknownNameError
from auto_circuit.model_utils.hooked_model import SITE_KINDS, hooked_model

Model = Callable[..., Any]


def saes_for(
    model: Any, kinds: Any = tuple(SITE_KINDS), layers: Any = (0, 1, 2)
) -> dict[str, SparseAutoencoder]:
    torch.manual_seed(5)
    sites = [s for s in hooked_model(model).sites() if s.kind in kinds and s.layer in layers]
    return {site.name: SparseAutoencoder(HookPoint(), 16, site.width) for site in sites}


def state_of(model: Any) -> dict[str, Any]:
    """Everything that must be the same object, or the same bits, after leaving.

    Run once first: TransformerLens and transformers set up some of their own hooks in the first run.
    """
    with torch.no_grad():
        model.run_with_cache(torch.zeros(1, 3, dtype=torch.long))
    points = {n: (id(h), h.name, len(h.fwd_hooks), len(h.bwd_hooks)) for n, h in model.hook_dict.items()}
    modules = [(n, id(m), [(k, id(c)) for k, c in m._modules.items()]) for n, m in model.named_modules()]
    attributes = [
        (
            n,
            sorted((k, id(v)) for k, v in m.__dict__.items() if isinstance(v, nn.Module)),
            sorted(set(m.__dict__) & {"to", "_apply", "__getstate__", "forward"}),
        )
        for n, m in model.named_modules()
    ]
    hooks = [
        (n, list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
        for n, m in model.named_modules()
    ]
    flags = {k: v for k, v in vars(model.cfg).items() if isinstance(v, (bool, int, float, str))}
    parameters = [
        (n, id(p), p.requires_grad, p.grad is None, p.detach().clone()) for n, p in model.named_parameters()
    ]
    return dict(
        modules=modules, attributes=attributes, hooks=hooks, points=points, flags=flags, parameters=parameters
    )


def assert_same(before: dict[str, Any], model: Any) -> None:
    after = state_of(model)
    for key in before.keys() - {"parameters"}:
        assert before[key] == after[key], key
    for a, b in zip(before["parameters"], after["parameters"], strict=True):
        assert a[:4] == b[:4] and torch.equal(a[4], b[4])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spliced_with_error_nodes_is_the_plain_model_bitwise(
    make_model: Model, family: str, dtype: torch.dtype, tokens: Tensor
) -> None:
    model = make_model(family, dtype)
    plain = model(tokens)
    before = state_of(model)
    saes = saes_for(model)
    with sae_model(model, saes) as spliced:
        assert torch.equal(spliced(tokens), plain)
        assert torch.equal(model(tokens), plain)
        assert all(sae.n_calls == 1 for sae in saes.values())
        assert all((sae.latent_total_act > 0).any() for sae in saes.values())
        for sae in saes.values():
            sae.latents.add_hook(lambda z, hook: None)
            sae.error_out.add_hook(lambda e, hook: None)
        assert torch.equal(spliced(tokens), plain)
    assert_same(before, model)
    assert torch.equal(model(tokens), plain)
    assert all(sae.spliced_at is None and not sae.error_nodes for sae in saes.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", SITE_KINDS)
def test_without_error_nodes_the_reconstruction_stands_for_the_activation(
    shared_model: Model, family: str, kind: str, tokens: Tensor
) -> None:
    """Equal to a hook that replaces the activation by the reconstruction, where such a hook is whole."""
    model = shared_model(family)
    saes = saes_for(model, [kind], [1])
    if not saes:
        pytest.skip("this architecture has no such site")
    (name, sae), before = next(iter(saes.items())), state_of(model)
    expected = model(tokens)
    with sae_model(model, saes, error_nodes=False) as spliced:
        out = spliced(tokens)
    assert not torch.allclose(out, expected, atol=1e-4)
    if kind == "hook_resid_mid":
        expected = resid_mid_reference(model, tokens, sae)
    else:
        width = sae.n_inputs
        expected = model.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda x, hook: sae(x.reshape(*x.shape[:2], width)).reshape(x.shape))]
        )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert_same(before, model)


def resid_mid_reference(model: Any, tokens: Tensor, sae: SparseAutoencoder) -> Tensor:
    """The stream after block 1 rebuilt from its parts, with the stream in the middle reconstructed."""
    names = ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    _, plain = model.run_with_cache(tokens, names_filter=names)
    mid = plain[names[0]]
    torch.testing.assert_close(mid + plain[names[1]], plain[names[2]])
    caught: dict[str, Tensor] = {}
    # The branch: what the MLP makes of the reconstruction (the hook point carries just that branch).
    model.run_with_hooks(
        tokens,
        fwd_hooks=[
            (names[0], lambda x, hook: sae(x)),
            (names[1], lambda x, hook: caught.update(mlp=x.clone())),
        ],
    )
    post = sae(mid) + caught["mlp"]
    return model.run_with_hooks(tokens, fwd_hooks=[(names[2], lambda x, hook: post)])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_through_patched_sites_equals_a_finite_difference(
    make_model: Model, family: str, tokens: Tensor
) -> None:
    """d objective / d (a factor on some latents at every site), with error nodes, in float64."""
    model = make_model(family, torch.float64)
    saes = {name: sae.double() for name, sae in saes_for(model, layers=[0, 2]).items()}

    def objective(factor: Tensor) -> Tensor:
        hooks = [(f"{name}.latents", lambda z, hook: z * (1 + factor)) for name in saes]
        hooks += [(f"{name}.error_out", lambda e, hook: e * (1 - 0.5 * factor)) for name in saes]
        return spliced.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1, 3:6].sum()

    with sae_model(model, saes) as spliced:
        factor = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(objective(factor), factor)
        with torch.no_grad():
            # TransformerLens' norms compute in float32 on some families: hence the width of the step.
            step = 1e-4
            difference = (objective(factor + step) - objective(factor - step)) / (2 * step)
    torch.testing.assert_close(gradient, difference, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_inside_restores_everything(make_model: Model, family: str, tokens: Tensor) -> None:
    model = make_model(family)
    plain = model(tokens)
    seen: list[Any] = []
    model.add_hook("blocks.1.hook_resid_post", lambda x, hook: seen.append(hook.name))
    before = state_of(model)

    def fail(z: Tensor, hook: HookPoint) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), sae_model(model, saes_for(model)) as spliced:
        spliced(tokens)
        spliced.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_post.latents", fail)])
    assert_same(before, model)
    with pytest.raises(ZeroDivisionError), sae_model(model, saes_for(model)):
        _ = 1 / 0
    assert_same(before, model)
    seen.clear()
    assert torch.equal(model(tokens), plain)
    assert seen == ["blocks.1.hook_out"]  # the user's hook is still there, under its own name
    with sae_model(model, saes_for(model)) as spliced:
        spliced(tokens)
    assert seen == ["blocks.1.hook_out"] * 2  # and it works while spliced


def test_hooks_by_every_name_and_the_cache(shared_model: Model, tokens: Tensor) -> None:
    model = shared_model("gpt2")
    saes = saes_for(model, ["hook_mlp_out"], [1])
    sae = saes["blocks.1.hook_mlp_out"]
    plain, plain_cache = model.run_with_cache(tokens)
    spliced = sae_model(model, saes)
    assert torch.equal(spliced(tokens), plain) and not spliced.is_spliced
    for site in ("blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out"):
        seen = []
        fwd = [
            (f"{site}.{h}", lambda v, hook, seen=seen: seen.append((hook.name, v.shape)))
            for h in ("latents", "error_out")
        ]
        spliced.run_with_hooks(tokens, fwd_hooks=fwd)
        assert seen == [
            ("blocks.1.mlp.hook_out.latents", (2, 7, 16)), ("blocks.1.mlp.hook_out.error_out", (2, 7, 24))
        ]  # fmt: skip
    logits, cache = spliced.run_with_cache(tokens)
    assert torch.equal(logits, plain)
    x = cache["blocks.1.hook_mlp_out"]
    assert torch.equal(x, plain_cache["blocks.1.hook_mlp_out"])
    torch.testing.assert_close(cache["blocks.1.hook_mlp_out.latents"], sae.encode(x))
    torch.testing.assert_close(
        sae.write(cache["blocks.1.hook_mlp_out.latents"])
        + sae.bias
        + cache["blocks.1.hook_mlp_out.error_out"],
        x,
    )
    assert not any(name.endswith("latent_outs") for name in cache)
    _, outs = spliced.run_with_cache(tokens, names_filter=["blocks.1.hook_mlp_out.latent_outs"])
    assert outs["blocks.1.hook_mlp_out.latent_outs"].shape == (2, 7, 16, 24)
    spliced.add_hook("blocks.1.hook_mlp_out.latents", lambda z, hook: z * 0)
    with sae_model(model, saes) as again:
        assert not torch.equal(again(tokens), plain)
    spliced.reset_hooks()
    assert torch.equal(spliced(tokens), plain)
    for site in ("blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out", "blocks.0.hook_resid_post"):
        with spliced:
            spliced.add_hook(site, lambda x, hook: x * 0)
            assert not torch.equal(spliced(tokens), plain)
            spliced.reset_hooks()
    assert torch.equal(spliced(tokens), plain)
    assert spliced.cfg is model.cfg and spliced.tokenizer is model.tokenizer
    assert torch.equal(spliced.to_tokens("w1 w2"), model.to_tokens("w1 w2"))
    with pytest.raises(AttributeError):
        _ = spliced.no_such_thing


def test_sites_work_in_any_order_and_families_name_every_layer(shared_model: Model, tokens: Tensor) -> None:
    model = shared_model("llama")
    plain = model(tokens)
    for family, kind in (
        ("resid_delta_mlp", "hook_mlp_out"),
        ("mlp_post_act", "mlp.hook_post"),
        ("resid", "hook_resid_post"),
    ):
        saes = list(saes_for(model, [kind]).values())
        spliced = sae_model(model, {family: saes})
        assert list(spliced.saes) == [f"blocks.{i}.{kind}" for i in range(3)]
        assert torch.equal(spliced(tokens), plain)
    with pytest.raises(InputError, match="stands for 3 sites.*given 2 SAEs"):
        sae_model(model, {"resid": saes[:2]})
    shuffled = saes_for(model)
    spliced = sae_model(model, dict(reversed(list(shuffled.items()))))
    assert list(spliced.saes) == list(shuffled)


def test_what_cannot_be_is_refused_with_the_nearest_that_can(make_model: Model, tokens: Tensor) -> None:
    model = make_model("neox")
    before = state_of(model)
    sae = SparseAutoencoder(HookPoint(), 16, 24)
    other = SparseAutoencoder(HookPoint(), 16, 24)
    cases: list[tuple[Any, type[Exception], str]] = [
        ({"blocks.1.hook_mlp_ou": sae}, UnknownNameError, "blocks.1.hook_mlp_out"),
        ({"blocks.7.hook_mlp_out": sae}, UnknownNameError, "blocks 0 to 2"),
        ({"blocks.1.hook_resid_mid": sae}, UnknownNameError, "use blocks.1.hook_resid_pre"),
        ({"blocks.1.attn.hook_pattern": sae}, InputError, "not one where an SAE can stand"),
        ({"blocks.1.mlp.hook_post": sae}, InputError, "width 40; its SAE reads width 24.*hook_mlp_out"),
        ({"blocks.1.hook_mlp_out": sae, "blocks.1.mlp.hook_out": other}, InputError, "Two SAEs for one site"),
        ({"blocks.1.hook_mlp_out": sae, "blocks.2.hook_mlp_out": sae}, InputError, "One SAE for two sites"),
        ({"blocks.1.hook_mlp_out": nn.Linear(2, 2)}, InputError, "given Linear"),
        ({"blocks.1.hook_mlp_out": [sae]}, InputError, "site families"),
        ({"resid_delta": [sae]}, InputError, "resid_delta_mlp"),
        ({"resid": sae}, InputError, "stands for 3 sites.*given 1 SAEs"),
        ({"resid": (s for s in (sae, other))}, InputError, "given 2 SAEs"),
        ({3: sae}, InputError, "named by strings"),
        ({}, InputError, "No SAEs were given"),
        ([sae], InputError, "given list"),
    ]
    for saes, kind, words in cases:
        with pytest.raises(kind, match=words):
            sae_model(model, saes)
    meta = SparseAutoencoder(HookPoint(), 16, 24).to("meta")
    with pytest.raises(InputError, match="on cpu.*on meta"):
        sae_model(model, {"blocks.1.hook_mlp_out": meta})
    with pytest.raises(InputError, match="Expected a TransformerLens model.*given Linear"):
        sae_model(nn.Linear(2, 2), {"blocks.1.hook_mlp_out": sae})
    assert_same(before, model)


def test_while_spliced_what_would_break_the_model_is_refused(make_model: Model, tokens: Tensor) -> None:
    model = make_model("gpt2")
    model(tokens)
    before = state_of(model)
    with sae_model(model, saes_for(model)) as spliced:
        acts: list[Callable[[], Any]] = [
            lambda: model.blocks.half(), lambda: model.blocks[0].mlp.to(torch.float64),
            lambda: model.to(torch.bfloat16), lambda: spliced.to("cpu"), lambda: model.half(),
            lambda: model.cpu(), lambda: model.enable_compatibility_mode(), lambda: copy.deepcopy(model),
            lambda: copy.copy(model), lambda: pickle.dumps(model), lambda: model.original_model.double(),
            spliced.splice, lambda: sae_model(model, saes_for(model)), lambda: spliced.__enter__(),
        ]  # fmt: skip
        for act in acts:
            with pytest.raises(SpliceError, match=r"with` block|unsplice"):
                act()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert spliced.is_spliced
    assert_same(before, model)
    copy.deepcopy(model)
    spliced.to(torch.bfloat16)
    assert next(iter(spliced.saes.values())).bias.dtype == torch.bfloat16
    assert torch.equal(spliced(tokens), model(tokens))


def test_notebook_use_and_double_use_of_an_sae(make_model: Model, tokens: Tensor) -> None:
    model, second = make_model("gpt2"), make_model("gpt2")
    saes = saes_for(model, ["hook_mlp_out"])
    spliced = sae_model(model, saes).splice()
    with pytest.raises(SpliceError, match="already spliced at blocks.0.hook_mlp_out"):
        sae_model(second, saes).splice()
    assert torch.equal(second(tokens), model(tokens))
    spliced.unsplice()
    spliced.unsplice()
    with sae_model(second, saes):
        pass


def test_a_site_that_never_runs_is_named_and_the_model_restored(make_model: Model, tokens: Tensor) -> None:
    """On Granite a module at `hook_mlp_out` is not called; other sites work."""
    model = make_model("granite")
    before_first = sae_model(model, saes_for(model, ["hook_mlp_out"], [1]))
    with pytest.raises(SpliceError, match="blocks.1.hook_mlp_out ran 0 times"):
        before_first(tokens)
    plain, before = model(tokens), state_of(model)
    for run in ("__call__", "run_with_cache"):
        with pytest.raises(SpliceError, match="blocks.1.hook_mlp_out ran 0 times"):
            getattr(sae_model(model, saes_for(model, ["hook_mlp_out"], [1])), run)(tokens)
        assert_same(before, model)
    with pytest.raises(SpliceError, match="ran 0 times"), sae_model(model, saes_for(model, ["hook_mlp_out"])):
        model.run_with_cache(tokens)  # called on the model itself
    from conftest import make_prompts

    import auto_circuit as ac

    for work in (ac.node_attribution, lambda s, p, **kw: s.prune_latents(p, **kw)):
        with pytest.raises(SpliceError, match="blocks.1.hook_attn_out ran 0 times"):
            work(sae_model(model, saes_for(model, ["hook_attn_out"], [1])), make_prompts(2), progress=False)
    assert_same(before, model)
    seen = []
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: seen.append(x.shape))])
    assert seen == [(2, 7, 24)]
    fine = [kind for kind in SITE_KINDS if kind not in ("hook_mlp_out", "hook_attn_out")]
    assert torch.equal(sae_model(model, saes_for(model, fine))(tokens), plain)


def test_stopping_early_is_not_mistaken_for_a_site_that_does_not_run(
    make_model: Model, tokens: Tensor
) -> None:
    model = make_model("gpt2")
    with sae_model(model, saes_for(model)) as spliced:
        spliced(tokens, stop_at_layer=1)
        assert spliced.is_spliced
        assert torch.equal(spliced(tokens), model(tokens))


def test_hooked_transformer_of_transformerlens_3(tokens: Tensor) -> None:
    import transformer_lens

    if not transformer_lens.__dict__.get("HookedTransformer"):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    cfg = dict(n_layers=2, d_model=24, n_heads=4, d_head=6, d_mlp=40, n_ctx=32, d_vocab=60, act_fn="gelu")
    for parallel in (False, True):
        cfg["parallel_attn_mlp"] = parallel
        model = transformer_lens.HookedTransformer(
            transformer_lens.HookedTransformerConfig(**cfg, seed=0)
        ).eval()
        plain, before = model(tokens), state_of(model)
        saes = saes_for(model)
        assert len(saes) == (12 if parallel else 14)
        with sae_model(model, saes) as spliced:
            assert torch.equal(spliced(tokens), plain)
            assert all(sae.n_calls == 1 for sae in saes.values())
            _, cache = spliced.run_with_cache(tokens)
            assert cache["blocks.1.attn.hook_z.latents"].shape == (2, 7, 16)
        assert_same(before, model)
        with sae_model(model, saes):
            for act in (model.setup, model.process_weights_):
                with pytest.raises(SpliceError, match="set up anew"):
                    act()
        assert_same(before, model)
        for kind in SITE_KINDS:
            one = saes_for(model, [kind], [1])
            for name, sae in one.items():
                out = sae_model(model, one, error_nodes=False)(tokens)
                hook = (name, lambda x, hook, sae=sae: sae(x))
                assert torch.allclose(out, model.run_with_hooks(tokens, fwd_hooks=[hook]), atol=1e-6)
                assert not torch.allclose(out, plain, atol=1e-4)
        assert_same(before, model)
