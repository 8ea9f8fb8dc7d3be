"""End-to-end losses against plain hooks and dense formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import VOCAB
from torch import Tensor

from auto_circuit.model_utils.hooked_model import hooked_model
from auto_circuit.model_utils.sparse_autoencoders.training.architectures import make_coder
from auto_circuit.model_utils.sparse_autoencoders.training.coder import Coder
from auto_circuit.model_utils.sparse_autoencoders.training.config import TrainingConfig
from auto_circuit.model_utils.sparse_autoencoders.training.end_to_end import EndToEndLoss

SITES = {
    "gpt2": ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"],
    "llama": ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.2.mlp.hook_post"],
    "gemma2": ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"],
}


def _tokens() -> Tensor:
    tokens = torch.randint(3, VOCAB, (6, 9), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = 0
    tokens[2, 4] = 1
    return tokens


def _coders(model: Any, sites: list[str], architecture: str) -> dict[str, Coder]:
    config = TrainingConfig(architecture=architecture, l0=4, n_latents=60, dead_after_tokens=10)
    make = torch.Generator().manual_seed(0)
    coders = {}
    for name in sites:
        site = hooked_model(model).site(name)
        seen: list[Tensor] = []
        with torch.no_grad():
            hook = (site.canonical, lambda x, hook, seen=seen: seen.append(x))
            model.run_with_hooks(_tokens(), fwd_hooks=[hook])
        coder = make_coder(site.width, config)
        coder.start(seen[0].flatten(0, 1).flatten(1), make)
        coder.unfired_for[:5] = 11
        coders[site.name] = coder
    return coders


def _reference(model: Any, coders: dict[str, Coder], weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss with ordinary hooks: each replaces the activation by a dense SAE's output."""
    tokens = _tokens()
    counted = (tokens != 0) & (tokens != 1) & (tokens != 2)
    hooked = hooked_model(model)
    sites = {name: hooked.site(name) for name in coders}
    first = min(site.layer for site in sites.values())
    streams = [hooked.site(f"blocks.{i}.hook_resid_post").canonical for i in range(first, hooked.n_layers)]
    penalties: list[Tensor] = []

    def replace(name: str) -> Callable[..., Tensor]:
        coder = coders[name]

        def hook(x: Tensor, hook: Any) -> Tensor:
            flat = x.flatten(2)
            rows = flat[counted] * coder.scale
            pre = (rows - coder.bias) @ coder.encode_weight.T + coder.latent_bias
            if coder.kind == "topk":
                z = torch.zeros_like(pre).scatter(1, *_relu_top(pre, 4))
            else:
                z = pre.relu()
                cost = (z * coder.directions.norm(dim=-1)).sum() / len(rows)
                penalties.append(coder.coefficient * cost)
            written = z @ coder.directions + coder.bias
            centred = (rows - coder.bias).detach()
            own = centred @ coder.encode_weight[:5].T + coder.latent_bias[:5]
            error = (rows - written).detach()
            left = (error - own @ coder.directions[:5]).square().sum() / error.square().sum()
            penalties.append(coder.config.aux_share * 5 / 8 * left)
            new = flat.clone()
            new[counted] = written / coder.scale
            return new.view(x.shape)

        return hook

    def run(hooks: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}
        records = [(name, lambda x, hook, name=name: seen.__setitem__(name, x)) for name in streams]
        logits = model.run_with_hooks(tokens, fwd_hooks=[*hooks, *records])
        return logits[counted].log_softmax(-1), seen

    with torch.no_grad():
        plain, plain_streams = run([])
    spliced, new = run([(site.canonical, replace(name)) for name, site in sites.items()])
    kl = (plain.exp() * (plain - spliced)).sum() / counted.sum()
    fvus = []
    for name in streams:
        a, b = plain_streams[name][counted], new[name][counted]
        fvus.append((b - a).square().sum() / (a - a.mean(0)).square().sum())
    downstream = sum(fvus[1:], fvus[0]) / len(fvus)
    return kl + weight * downstream + sum(penalties), kl, downstream


def _relu_top(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = pre.topk(k)
    return top.indices, top.values.relu()


@pytest.mark.parametrize("architecture", ["topk", "relu"])
@pytest.mark.parametrize("family", SITES)
def test_loss_and_gradients_equal_plain_hooks(
    family: str, architecture: str, shared_model: Callable[..., Any]
) -> None:
    model = shared_model(family)
    coders = _coders(model, SITES[family], architecture)
    parameters = [p for coder in coders.values() for p in coder.parameters()]
    found = EndToEndLoss(model, coders, [0, 1, 2], downstream=0.7)(_tokens())
    grads = torch.autograd.grad(found.total, parameters)
    total, kl, downstream = _reference(model, coders, 0.7)
    expected = torch.autograd.grad(total, parameters)
    assert torch.allclose(found.kl, kl, rtol=1e-4) and torch.allclose(found.downstream, downstream, rtol=1e-4)
    assert torch.allclose(found.total, total, rtol=1e-4)
    for mine, theirs in zip(grads, expected, strict=True):
        assert (mine - theirs).norm() <= 2e-3 * theirs.norm() + 1e-7
        assert theirs.norm() > 0


def test_the_model_gets_no_gradients_and_is_given_back(shared_model: Callable[..., Any]) -> None:
    model = shared_model("llama")
    before = [(p.requires_grad, p.clone()) for p in model.parameters()]
    modules = dict(model.named_modules())
    hooks = [len(m._forward_hooks) for m in model.modules()]
    coders = _coders(model, SITES["llama"], "topk")
    loss = EndToEndLoss(model, coders, [0])
    loss(_tokens()).total.backward()
    assert all(p.grad is None for p in model.parameters())
    after = [(p.requires_grad, p) for p in model.parameters()]
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before, after, strict=True))
    assert dict(model.named_modules()) == modules
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_perfect_coders_cost_nothing(shared_model: Callable[..., Any]) -> None:
    model = shared_model("gpt2")
    coders = _coders(model, ["blocks.1.hook_mlp_out"], "relu")
    coder = coders["blocks.1.hook_mlp_out"]
    eye = torch.eye(24)
    with torch.no_grad():  # x = relu(x) − relu(−x)
        for parameter in coder.parameters():
            parameter.zero_()
        coder.encode_weight[:48] = torch.cat([eye, -eye])
        coder.directions[:48] = torch.cat([eye, -eye])
    found = EndToEndLoss(model, coders, [0])(_tokens())
    assert float(found.kl.detach()) < 1e-9 and float(found.downstream.detach()) < 1e-9
