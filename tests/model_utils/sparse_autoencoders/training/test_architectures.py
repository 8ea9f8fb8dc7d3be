"""Every architecture's loss and gradients against a dense reference in float64, and what it publishes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_circuit.errors import UnknownNameError
from auto_circuit.model_utils.sparse_autoencoders.training.architectures import ARCHITECTURES, make_coder
from auto_circuit.model_utils.sparse_autoencoders.training.coder import Coder
from auto_circuit.model_utils.sparse_autoencoders.training.config import (
    ARCHITECTURE_NAMES,
    TrainingConfig,
)

WIDTH, LATENTS, ROWS = 12, 40, 64
VARIANTS = [*((name, "quadratic") for name in ARCHITECTURE_NAMES), ("jumprelu", "tanh")]


def _data(rows: int = ROWS, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=make)
    return 7.0 + 3.0 * torch.randn(rows, WIDTH, generator=make) @ mixing


def _coder(architecture: str, penalty: str = "quadratic", l0: float = 5.0, **settings: Any) -> Coder:
    config = TrainingConfig(
        architecture=architecture, penalty=penalty, l0=l0, n_latents=LATENTS, aux_latents=6, **settings
    )
    coder = make_coder(WIDTH, config)
    make = torch.Generator().manual_seed(1)
    coder.start(_data(512, 5), make)
    with torch.no_grad():  # away from special points: nothing tied, nothing zero
        for parameter in coder.parameters():
            parameter.add_(0.05 * parameter.abs().mean().clamp(min=0.1) * _noise(parameter, make))
    return coder


def _noise(like: Tensor, make: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=make).to(like.dtype)


def _dense_total(coder: Coder, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The loss by its formulas, from dense tensors alone."""
    config, kind = coder.config, coder.kind
    x = x.double() * coder.scale
    power = coder.variance * len(x)
    pre = (x - p["bias"]) @ p["encode_weight"].T + p["latent_bias"]
    more: Any = 0.0
    if kind == "topk":
        kept = torch.zeros_like(pre).scatter(1, pre.topk(int(config.l0)).indices, 1.0)
        z = pre.relu() * kept
    elif kind in ("batchtopk", "matryoshka"):
        smallest = pre.flatten().topk(round(config.l0 * len(x))).values.min()
        z = pre * (pre >= smallest.clamp(min=0))
    elif kind == "jumprelu":
        theta, band = p["threshold"], float(coder.get_buffer("bandwidth"))
        on = (pre > theta).double()
        near = ((pre - theta).abs() < band / 2).double() / band
        tanh = config.penalty == "tanh"
        # The estimated slopes, put in by hand at the current point.
        moved = (theta - theta.detach()) - ((pre - pre.detach()) if tanh else 0.0)
        z = pre * on - (theta * near).detach() * moved
        if tanh:
            more = coder.coefficient * torch.tanh(4.0 * z).sum() / len(x)
        else:
            l0 = (on - near * (theta - theta.detach())).sum() / len(x)
            more = coder.coefficient * (l0 / config.l0 - 1) ** 2
    elif kind == "relu":
        z = pre.relu()
        more = coder.coefficient * (z * p["directions"].norm(dim=-1)).sum() / len(x)
    else:
        gate = pre.relu()
        z = (gate * p["r_mag"].exp() + p["mag_bias"]).relu() * (pre > 0)
        left = (x - p["bias"]).detach() - gate @ p["directions"].detach()
        # The encoder's input keeps its gradient through the gate.
        more = coder.coefficient * gate.sum() / len(x) + left.square().sum() / power
    if kind == "matryoshka":
        sizes = [round(share * LATENTS) for share in config.groups]
        parts = [(x - p["bias"] - z[:, :n] @ p["directions"][:n]).square().sum() / power for n in sizes]
        fvu = sum(parts[1:], parts[0]) / len(parts)
    else:
        fvu = (x - p["bias"] - z @ p["directions"]).square().sum() / power
    error = (x - p["bias"] - z @ p["directions"]).detach()
    dead = (coder.unfired_for > config.dead_after).nonzero().flatten()
    if len(dead):
        k = config.aux_latents
        centred = (x - p["bias"]).detach()
        own = centred @ p["encode_weight"][dead].T + p["latent_bias"][dead]
        kept = torch.zeros_like(own).scatter(1, own.topk(min(k, len(dead))).indices, 1.0)
        left = (error - (own * kept) @ p["directions"][dead]).square().sum()
        more = more + config.aux_share * min(len(dead) / k, 1.0) * left / error.square().sum()
    return fvu + more


@pytest.mark.parametrize(("architecture", "penalty"), VARIANTS)
@pytest.mark.parametrize("n_dead", [0, 3, 15])
def test_loss_and_gradients_equal_a_dense_reference(architecture: str, penalty: str, n_dead: int) -> None:
    coder = _coder(architecture, penalty).double()
    coder.coefficient.fill_(0.3)
    coder.unfired_for[4 : 4 + n_dead] = coder.config.dead_after + 1
    x = _data()
    reference = {name: p.detach().clone().requires_grad_() for name, p in coder.named_parameters()}
    expected = _dense_total(coder, x, reference)
    expected_grads = torch.autograd.grad(expected, list(reference.values()), allow_unused=True)
    got = _double_forward(coder, x)
    got.total.backward()
    assert torch.allclose(got.total, expected, rtol=1e-10)
    for (name, parameter), grad in zip(coder.named_parameters(), expected_grads, strict=True):
        assert parameter.grad is not None and grad is not None, name
        assert torch.allclose(parameter.grad, grad, rtol=1e-8, atol=1e-12), name
        assert grad.abs().max() > 0, name


def _double_forward(coder: Coder, x: Tensor) -> Any:
    """`coder(x)` in float64; a coder itself reads float32."""
    x = x.double() * coder.scale
    written, coded, pre = coder.reconstruct(x, learn=True)
    fvu, error = coder.unexplained(x, coded)
    total = fvu + coder.sparsity_loss(coded) + coder.revival((x - coder.bias).detach(), pre, error)
    single = coder.float()(x.float() / coder.scale.float())
    coder.double()
    assert torch.allclose(single.total.double(), total, rtol=2e-3)
    return single._replace(total=total)


@pytest.mark.parametrize(("architecture", "penalty"), VARIANTS)
def test_what_is_published_computes_what_was_trained(architecture: str, penalty: str) -> None:
    coder = _coder(architecture, penalty)
    x = _data()
    with torch.no_grad():
        if coder.unit_directions:
            coder.directions.div_(coder.directions.norm(dim=-1, keepdim=True))
        for _ in range(3):
            coder(_data(seed=9))  # BatchTopK learns its threshold
        sae = coder.to_sae()
        z = sae.encode(x)
        norms = sae.directions.norm(dim=-1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
        if architecture in ("batchtopk", "matryoshka"):
            assert sae.activation.kind == "jumprelu"
            scaled = x * coder.scale
            pre = (scaled - coder.bias) @ coder.encode_weight.T + coder.latent_bias
            values = torch.where(pre > coder.get_buffer("threshold"), pre, 0.0)
            expected = (values @ coder.directions + coder.bias) / coder.scale
        else:
            written, coded, _ = coder.reconstruct(x * coder.scale)
            expected = written / coder.scale
            assert float((z > 0).sum()) == float((coded.values > 0).sum())
        assert torch.allclose(sae.decode(z), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("architecture", "penalty"), VARIANTS)
def test_every_architecture_learns_and_comes_near_the_wanted_l0(architecture: str, penalty: str) -> None:
    make = torch.Generator().manual_seed(3)
    features = torch.nn.functional.normalize(torch.randn(24, WIDTH * 2, generator=make), dim=-1)
    active = (torch.rand(6_000, 24, generator=make) < 3 / 24) * (1 + torch.rand(6_000, 24, generator=make))
    x = 4.0 * active @ features + 2.0
    config = TrainingConfig(
        architecture=architecture, penalty=penalty, l0=3, n_latents=48, n_tokens=38_400, batch_size=128
    )
    coder = make_coder(WIDTH * 2, config)
    coder.start(x, make)
    optimiser = torch.optim.Adam(coder.parameters(), lr=coder.rate)
    for step in range(config.n_steps):
        batch = x[torch.randint(len(x), (128,), generator=make)]
        for group in optimiser.param_groups:
            group["lr"] = coder.rate * config.rate_at(step)
        optimiser.zero_grad()
        losses = coder(batch)
        losses.total.backward()
        optimiser.step()
        coder.after_step(float(losses.l0), losses.fired, 128)
    sae = coder.to_sae()
    with torch.no_grad():
        z = sae.encode(x)
        fvu = float((x - sae.decode(z)).square().sum() / (x - x.mean(0)).square().sum())
    l0 = float((z > 0).float().sum(-1).mean())
    assert 2.0 < l0 < 4.5
    assert fvu < (0.5 if architecture == "relu" else 0.2)  # L1 shrinks what it keeps
    best = (sae.directions @ features.T).max(0).values
    assert float((best > 0.9).float().mean()) > 0.5  # most of the true features are found


def test_dead_latents_come_back() -> None:
    x = _data(2_000)
    fractions = []
    for share in (0.0, 1 / 32):
        coder = _coder("topk", l0=3, dead_after_tokens=500, aux_share=share, n_tokens=200_000)
        with torch.no_grad():
            coder.encode_weight[:20].mul_(-0.01)
            coder.latent_bias[:20].fill_(-0.5)
        optimiser = torch.optim.Adam(coder.parameters(), lr=5e-3)
        make = torch.Generator().manual_seed(0)
        for _ in range(300):
            optimiser.zero_grad()
            losses = coder(x[torch.randint(len(x), (256,), generator=make)])
            losses.total.backward()
            optimiser.step()
            coder.after_step(float(losses.l0), losses.fired, 256)
        fractions.append(float(coder.dead.float().mean()))
    assert fractions[0] > 0.3 and fractions[1] < 0.5 * fractions[0]


def test_batch_topk_is_exact_whatever_its_running_threshold() -> None:
    coder = _coder("batchtopk")
    x = _data() * coder.scale
    wanted = round(5 * len(x))
    for running in (0.0, 1e-3, 1e6):
        coder.get_buffer("threshold").fill_(running)
        _, coded, pre = coder.reconstruct(x)
        expected = pre >= pre.flatten().topk(wanted).values.min()
        found = torch.zeros_like(expected)
        found[coded.code.rows, coded.code.latents] = True  # type: ignore[union-attr]
        assert torch.equal(found, expected)


def test_directions_stay_units_and_the_coefficient_follows_l0() -> None:
    coder = _coder("gated")
    before = float(coder.coefficient)
    coder.after_step(50.0, torch.zeros(LATENTS, dtype=torch.bool), 8)
    assert torch.allclose(coder.directions.norm(dim=-1), torch.ones(LATENTS), atol=1e-6)
    assert float(coder.coefficient) > before
    middle = float(coder.coefficient)
    coder.after_step(1.0, torch.ones(LATENTS, dtype=torch.bool), 8)
    assert float(coder.coefficient) < middle and int(coder.unfired_for.max()) == 0


def test_constant_and_zero_activations_give_finite_losses() -> None:
    for architecture in ARCHITECTURES:
        for x in (torch.zeros(64, WIDTH), torch.full((64, WIDTH), 3.0)):
            coder = make_coder(WIDTH, TrainingConfig(architecture=architecture, l0=3, n_latents=LATENTS))
            coder.start(x, torch.Generator().manual_seed(0))
            losses = coder(x)
            losses.total.backward()
            grads = [p.grad for p in coder.parameters() if p.grad is not None]
            assert losses.total.isfinite() and all(g.isfinite().all() for g in grads), architecture


def test_the_registry_has_the_names_of_the_config() -> None:
    assert tuple(ARCHITECTURES) == ARCHITECTURE_NAMES
    broken = replace(TrainingConfig())
    object.__setattr__(broken, "architecture", "gatd")
    with pytest.raises(UnknownNameError, match="gated"):
        make_coder(8, broken)
