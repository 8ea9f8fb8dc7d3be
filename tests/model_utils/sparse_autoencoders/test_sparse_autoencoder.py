"""The module against a dense version written here, and against hand-computed cases."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from auto_circuit.errors import InputError, SpliceError
from auto_circuit.model_utils.sparse_autoencoders.input_scaling import ConstantNormScaling, LayerNormScaling
from auto_circuit.model_utils.sparse_autoencoders.latent_activations import Gated, JumpReLU, TopK
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder

N, D, SEQ = 13, 6, 5
FOUR = {"bias", "latent_bias", "encode_weight", "decode_weight"}


def make(kind: str = "relu", scaling: str = "none", seq_len: int | None = None) -> SparseAutoencoder:
    """An SAE with nothing trivial: random biases, thresholds, gates."""
    torch.manual_seed(3)
    seq = [] if seq_len is None else [seq_len]
    activation = {
        "relu": lambda: None,
        "topk": lambda: TopK(4),
        "jumprelu": lambda: JumpReLU(torch.rand(*seq, N)),
        "gated": lambda: Gated(torch.randn(*seq, N), 0.3 * torch.randn(*seq, N), torch.randn(*seq, N)),
    }[kind]()
    scale = {
        "none": lambda: None,
        "layer_norm": lambda: LayerNormScaling(1e-5),
        "constant_norm": lambda: ConstantNormScaling(D**0.5),
    }[scaling]()
    sae = SparseAutoencoder(HookPoint(), N, D, activation=activation, scaling=scale)
    if seq_len is not None:
        sae.init_params(N, D, seq_len)
    with torch.no_grad():
        sae.bias.copy_(torch.randn(D))
        sae.latent_bias.copy_(0.3 * torch.randn_like(sae.latent_bias))
    return sae


def dense_latents(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Latents one by one, from the formulas, without the module's own methods."""
    if isinstance(sae.scaling, LayerNormScaling):
        mean = x.mean(-1, keepdim=True)
        std = ((x - mean) ** 2).sum(-1, keepdim=True).div(D - 1).sqrt()
        x = (x - mean) / (std + 1e-5)
    elif isinstance(sae.scaling, ConstantNormScaling):
        x = x * D**0.5 / (x**2).sum(-1, keepdim=True).sqrt()
    weight = sae.encode_weight.detach()
    pre = torch.stack([((x - sae.bias) * weight[..., i, :]).sum(-1) for i in range(N)], -1)
    pre = pre + sae.latent_bias.detach()
    kind, tensors = sae.activation.kind, dict(sae.activation.named_parameters())
    if kind == "relu":
        return pre.clamp(min=0)
    if kind == "jumprelu":
        return torch.where(pre > tensors["threshold"], pre.clamp(min=0), torch.zeros_like(pre))
    if kind == "gated":
        size = (pre * tensors["r_mag"].exp() + tensors["mag_bias"]).clamp(min=0)
        return torch.where(pre + tensors["gate_bias"] > 0, size, torch.zeros_like(pre))
    smallest = pre.sort(-1, descending=True).values[..., 3:4]
    return torch.where(pre >= smallest, pre.clamp(min=0), torch.zeros_like(pre))


KINDS = [
    (k, s) for k in ("relu", "topk", "jumprelu", "gated") for s in ("none", "layer_norm", "constant_norm")
]


@pytest.mark.parametrize(("kind", "scaling"), KINDS)
def test_encode_and_forward_equal_the_dense_formulas(kind: str, scaling: str) -> None:
    sae, x = make(kind, scaling), torch.randn(2, SEQ, D)
    z = dense_latents(sae, x)
    assert (z > 0).any() and (z == 0).any()
    torch.testing.assert_close(sae.encode(x), z)
    recon = torch.einsum("...n,dn->...d", z, sae.decode_weight) + sae.bias
    if scaling == "layer_norm":
        recon = recon * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
    elif scaling == "constant_norm":
        recon = recon * x.norm(dim=-1, keepdim=True) / D**0.5
    torch.testing.assert_close(sae(x), recon)


@pytest.mark.parametrize(("kind", "scaling"), KINDS)
def test_coefficients_bias_and_error_add_up_to_the_input(kind: str, scaling: str) -> None:
    sae, x = make(kind, scaling), torch.randn(2, SEQ, D)
    sae.error_nodes = True
    seen = {}
    sae.error_out.add_hook(lambda e, hook: seen.update(error=e))
    sae(x)
    parts = (sae.coefficients(x).unsqueeze(-1) * sae.directions).sum(-2)
    torch.testing.assert_close(parts + sae.constant_bias + seen["error"], x)
    assert (sae.constant_bias == 0).all() == (scaling != "none")


def test_state_dict_is_the_four_tensors_with_the_contracts_shapes() -> None:
    sae = SparseAutoencoder(HookPoint(), N, D)
    shapes = {name: tuple(t.shape) for name, t in sae.state_dict().items()}
    assert shapes == {
        "bias": (D,), "latent_bias": (N,), "encode_weight": (N, D), "decode_weight": (D, N)
    }  # fmt: skip
    sae.init_params(N, D, SEQ)
    assert sae.encode_weight.shape == (SEQ, N, D) and sae.decode_weight.shape == (SEQ, D, N)
    assert (sae.encode_weight == sae.encode_weight[0]).all() and (sae.bias == 0).all()
    assert sae.encode_weight.std() > 0.1 and set(sae.state_dict()) == FOUR


def test_contributions_are_built_only_while_something_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = make(), torch.randn(2, SEQ, D)
    built = []
    original = SparseAutoencoder._contributions
    monkeypatch.setattr(
        SparseAutoencoder, "_contributions", lambda self, c: built.append(1) or original(self, c)
    )
    plain = sae(x)
    assert not built
    handles = [
        lambda: sae.latent_outs.register_forward_hook(lambda m, a, out: None),
        lambda: sae.latent_outs.register_forward_pre_hook(lambda m, a: None),
        lambda: sae.latent_outs.register_full_backward_hook(lambda m, gi, go: None),
        lambda: sae.latent_outs.register_full_backward_pre_hook(lambda m, go: None),
    ]
    for n, attach in enumerate(handles):
        handle = attach()
        torch.testing.assert_close(sae(x), plain)
        handle.remove()
        assert len(built) == n + 1
    seen = []

    class Spy(HookPoint):
        def forward(self, out: Tensor) -> Tensor:
            seen.append(out.shape)
            return out

    sae.latent_outs = Spy()
    torch.testing.assert_close(sae(x), plain)
    assert seen == [(2, SEQ, N, D)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_unpatched_output_with_error_nodes_is_the_input(
    dtype: torch.dtype, observed: bool, grad: bool
) -> None:
    sae, x = make("jumprelu"), torch.randn(2, SEQ, D).to(dtype)
    sae.error_nodes = True
    seen = []
    if observed:
        for hook in (sae.latents, sae.latent_outs, sae.error_out):
            hook.add_hook(lambda value, hook: seen.append(value.shape))
    with torch.set_grad_enabled(grad):
        out = sae(x.requires_grad_(grad))
    assert torch.equal(out, x) and out.dtype == dtype
    assert len(seen) == (3 if observed else 0)
    assert observed or out is x


def patched_dense(sae: SparseAutoencoder, x: Tensor, z: Tensor, error: Tensor | None) -> Tensor:
    """What the site puts out when its latents become `z` and its error `error` (None: its own)."""
    own = (sae.encode(x).unsqueeze(-1) * sae.directions).sum(-2)
    new = (z.unsqueeze(-1) * sae.directions).sum(-2)
    return new + sae.bias + (x - own - sae.bias if error is None else error)


def test_patched_output_and_its_gradients_equal_the_dense_version() -> None:
    sae = make().double()
    sae.error_nodes = True
    x = torch.randn(2, SEQ, D, dtype=torch.double, requires_grad=True)
    new_error = torch.randn(2, SEQ, D, dtype=torch.double)

    def halve_some(z: Tensor, hook: HookPoint) -> Tensor:
        return torch.cat([z[..., :4] * 0.5, z[..., 4:8].square(), z[..., 8:]], -1)

    for with_error in (False, True):
        sae.latents.add_hook(halve_some)
        if with_error:
            sae.error_out.add_hook(lambda e, hook: new_error)
        out = sae(x)
        grads = torch.autograd.grad(out.square().sum(), [x, sae.encode_weight, sae.decode_weight])
        expected = patched_dense(sae, x, halve_some(sae.encode(x), None), new_error if with_error else None)
        wanted = torch.autograd.grad(expected.square().sum(), [x, sae.encode_weight, sae.decode_weight])
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grads, wanted)
        sae.latents.remove_hooks()
        sae.error_out.remove_hooks()


@pytest.mark.parametrize("error_nodes", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_hook_that_writes_in_place_is_not_lost(error_nodes: bool, grad: bool) -> None:
    """A view of the clean value would be changed with it, and the patch would cancel."""
    sae, x = make(), torch.randn(2, SEQ, D)
    sae.error_nodes = error_nodes
    z = sae.encode(x).detach()
    busiest = int(z.sum((0, 1)).argmax())

    def zero(latents: Tensor, hook: HookPoint) -> None:
        latents[..., busiest] = 0

    sae.latents.add_hook(zero)
    with torch.set_grad_enabled(grad):
        out = sae(x)
    z[..., busiest] = 0
    expected = patched_dense(sae, x, z, None if error_nodes else torch.zeros(D))
    torch.testing.assert_close(out, expected)
    assert (out - x).abs().max() > 0.01
    sae.latents.remove_hooks()
    sae.error_nodes = True
    sae.error_out.add_hook(lambda e, hook: e.zero_())
    torch.testing.assert_close(sae(x), patched_dense(sae, x, sae.encode(x), torch.zeros(D)))


def test_latent_outs_patches_one_contribution_with_error_nodes() -> None:
    sae, x = make(), torch.randn(2, SEQ, D)
    sae.error_nodes = True

    def flip(outs: Tensor, hook: HookPoint) -> Tensor:
        return torch.cat([-outs[..., :1, :], outs[..., 1:, :]], -2)

    sae.latent_outs.add_hook(flip)
    z = sae.encode(x)
    torch.testing.assert_close(sae(x), x - 2 * z[..., :1] * sae.directions[0])


def test_hooks_work_in_inference_mode() -> None:
    sae = make()
    sae.error_nodes = True
    sae.latents.add_hook(lambda z, hook: None)
    with torch.inference_mode():
        x = torch.randn(2, SEQ, D)
        assert torch.equal(sae(x), x)
        sae.latents.add_hook(lambda z, hook: z.zero_())
        assert not torch.equal(sae(x), x)


def test_counting() -> None:
    sae, x = make().bfloat16(), torch.randn(3, SEQ, D).bfloat16()
    z = sae.encode(x).detach().float()
    sae(x)
    sae(x)
    assert sae.latent_total_act.dtype == torch.float32
    torch.testing.assert_close(sae.latent_total_act, 2 * z.sum((0, 1)))
    for batch_len, seq_len, dims in ((None, SEQ, 0), (3, SEQ, ()), (3, None, 1)):
        sae.reset_activated_latents(batch_len, seq_len)
        sae(x)
        torch.testing.assert_close(sae.latent_total_act, z.sum(dims) if dims != () else z)
        assert not sae.latent_total_act.requires_grad
    sae.counting = False
    sae.reset_activated_latents()
    sae(x)
    assert (sae.latent_total_act == 0).all() and "latent_total_act" not in sae.state_dict()
    sae.counting = True
    sae.reset_activated_latents(seq_len=SEQ + 1)
    with pytest.raises(InputError, match="reset_activated_latents"):
        sae(x)


def test_flattened_heads() -> None:
    sae, x = make(), torch.randn(2, SEQ, 2, D // 2)
    torch.testing.assert_close(sae(x), sae(x.flatten(-2)).reshape(x.shape))
    sae.error_nodes = True
    assert sae(x) is x
    sae.latents.add_hook(lambda z, hook: z * 0)
    assert sae(x).shape == x.shape and not torch.equal(sae(x), x)


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("per_position", [False, True])
def test_pruning_keeps_values_and_ids_also_the_second_time(kind: str, per_position: bool) -> None:
    whole, x = make(kind), torch.randn(2, SEQ, D)
    z = whole.encode(x)
    sae = copy.deepcopy(whole)
    first = (
        torch.stack([torch.randperm(N)[:7] for _ in range(SEQ)]) if per_position else torch.randperm(N)[:7]
    )
    sae.prune_latents(first)
    first = first.expand(SEQ, 7)
    index = first.expand(2, SEQ, 7)
    torch.testing.assert_close(sae.encode(x), z.gather(-1, index))
    assert torch.equal(sae.latent_ids.expand(SEQ, 7), first)
    assert sae.n_latents == 7 and sae.seq_len == (SEQ if per_position else None)
    for again in (torch.tensor([5, 0, 2]), torch.stack([torch.randperm(7)[:3] for _ in range(SEQ)])):
        twice = copy.deepcopy(sae)
        twice.prune_latents(again)
        ids = first.gather(-1, again.expand(SEQ, 3))
        assert torch.equal(twice.latent_ids.expand(SEQ, 3), ids)
        torch.testing.assert_close(twice.encode(x), z.gather(-1, ids.expand(2, SEQ, 3)))
        kept = torch.zeros_like(z).scatter(-1, ids.expand(2, SEQ, 3), 1)
        torch.testing.assert_close(twice(x), whole.decode(z * kept))
        assert twice(x).is_contiguous()
        loaded = SparseAutoencoder.from_state_dict(HookPoint(), twice.state_dict())
        torch.testing.assert_close(loaded(x), twice(x))
        assert torch.equal(loaded.latent_ids, twice.latent_ids)
        twice.error_nodes = True
        assert twice(x) is x


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_weights_by_position_make_the_trip_through_safetensors(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    sae = make(kind)
    sae.init_params(N, D, SEQ)
    sae.prune_latents(torch.tensor([3, 1, 4]))
    save_file(sae.state_dict(), tmp_path / "sae.safetensors")
    again = SparseAutoencoder.from_state_dict(HookPoint(), load_file(tmp_path / "sae.safetensors"))
    x = torch.randn(2, SEQ, D)
    assert torch.equal(again(x), sae(x)) and again.latent_ids.tolist() == [3, 1, 4]


def test_a_zero_token_stays_finite() -> None:
    sae = make("relu", "constant_norm")
    assert sae(torch.zeros(1, SEQ, D)).isfinite().all()


def test_init_params_forgets_pruning() -> None:
    sae = make("topk")
    sae.prune_latents(torch.arange(3))
    assert any(name.startswith("selector_") for name in sae.state_dict())
    sae.init_params(N, D)
    assert set(sae.state_dict()) == FOUR | {"activation.k"} and torch.equal(sae.latent_ids, torch.arange(N))


def test_wrong_input_is_refused_with_a_sentence() -> None:
    sae = make()
    for idxs, words in (
        (torch.tensor([0, N]), f"latents 0 to {N - 1}"),
        (torch.tensor([-1]), "-1"),
        (torch.tensor([2, 2]), "repeats.*2"),
        (torch.tensor([0.5]), "whole numbers"),
        (torch.ones(N, dtype=torch.bool), "nonzero"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "shape"),
    ):
        with pytest.raises(InputError, match=words):
            sae.prune_latents(idxs)
    assert sae.n_latents == N
    with pytest.raises(InputError, match=f"width {D}"):
        sae(torch.randn(2, SEQ, D + 1))
    sae.error_nodes, sae.counting = True, False
    with pytest.raises(InputError, match=f"width {D}"):
        sae(torch.randn(2, SEQ, D + 1))
    sae.prune_latents(torch.arange(4).expand(SEQ, 4))
    sae.error_nodes, sae.counting = False, True
    with pytest.raises(InputError, match=f"{SEQ} positions; the input has {SEQ + 1}"):
        sae(torch.randn(2, SEQ + 1, D))
    with pytest.raises(InputError, match=f"{SEQ} positions"):
        sae.prune_latents(torch.zeros(SEQ + 1, 1, dtype=torch.long))
    with pytest.raises(InputError, match="n_latents = 0"):
        SparseAutoencoder(HookPoint(), 0, D)
    with pytest.raises(InputError, match="for 13 latents"):
        SparseAutoencoder(HookPoint(), N + 1, D, activation=JumpReLU(torch.zeros(N)))


def test_stands_in_for_its_hook_point_and_stays_whole_while_spliced() -> None:
    sae = make()
    seen = []
    sae.add_hook(lambda x, hook: seen.append(x.shape))
    sae(torch.randn(2, SEQ, D))
    assert seen == [(2, SEQ, D)] and sae.has_hooks() and sae.fwd_hooks
    sae.remove_hooks()
    assert not sae.wrapped_hook.fwd_hooks
    with pytest.raises(AttributeError):
        _ = sae.no_such_thing
    sae.spliced_at = "blocks.0.hook_mlp_out"
    for act in (lambda: sae.half(), lambda: copy.deepcopy(sae), lambda: pickle.dumps(sae)):
        with pytest.raises(SpliceError, match="blocks.0.hook_mlp_out"):
            act()
    sae.spliced_at = None
    assert torch.equal(copy.deepcopy(sae).bias, sae.bias)
    assert sae.half().latent_total_act.dtype == torch.float32


def test_one_batch_does_not_hang_on_to_the_next() -> None:
    sae = make()
    for _ in range(3):
        sae(torch.randn(2, SEQ, D)).sum().backward()
    assert sae.latent_total_act.grad_fn is None
