"""What is read of each family's blocks, against the modules themselves and against what the model runs."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_prompts
from torch import Tensor, nn

import auto_circuit as ac
from auto_circuit.errors import InputError
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.prune_scores import PruneScores
from auto_circuit.model_utils.block_wiring import Block, check_blocks, read_blocks
from auto_circuit.model_utils.hooked_model import hooked_model
from auto_circuit.prune_algos.edge_attribution import edge_attribution

CENTRED = {"gpt2", "neox", "native_attn_only"}
GROUPED = {"llama", "gemma2", "qwen3"}
D_HEAD = {"gemma2": 8, "qwen3": 8}
families = pytest.mark.parametrize("family", FAMILIES)


def wiring(model: Any) -> list[Block]:
    return read_blocks(hooked_model(model))


def check(model: Any) -> None:
    check_blocks(hooked_model(model), wiring(model), model)


def norms(block: Block) -> dict[str, Any]:
    """A block's norms that are there, by what TransformerLens calls them."""
    writers = {"ln1_post": block.attn} | ({} if block.mlp is None else {"ln2_post": block.mlp})
    found = {"ln1": block.attn_norm, "ln2": block.mlp_norm} | {n: w.post for n, w in writers.items()}
    return {name: norm for name, norm in found.items() if norm.module is not None}


def n_hooks(model: Any) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@contextmanager
def doubled(module: nn.Module) -> Iterator[None]:
    """Have a module put out twice what it does."""

    def twice(_module: Any, _inputs: Any, out: Any) -> Any:
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    handle = module.register_forward_hook(twice)
    try:
        yield
    finally:
        handle.remove()


# ---- what is read --------------------------------------------------------------------------------


@families
def test_weight_bias_and_kind_of_a_norm_say_what_its_module_does(shared_model: Any, family: str) -> None:
    model = shared_model(family)
    x = 3 * torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3)) + 1
    for block in wiring(model):
        found = norms(block)
        assert len(found) == (4 if family == "gemma2" else 2)
        for name, norm in found.items():
            module = getattr(model.blocks[block.layer], name, None) or model.blocks[block.layer].ln1
            with torch.no_grad():
                y = module(x)
            assert norm.centred == (family in CENTRED)
            torch.testing.assert_close(norm(x), y, rtol=1e-5, atol=1e-5)
            centred = norm.centre(x)
            assert torch.equal(centred, x - x.mean(-1, keepdim=True) if norm.centred else x)
            r = norm.scale(x, y)
            assert r.shape == (2, 5, 1)
            torch.testing.assert_close(
                r, centred.square().mean(-1, keepdim=True).rsqrt(), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(r * norm.weight * centred + norm.bias, y, rtol=1e-4, atol=1e-5)


@families
def test_weight_and_bias_of_a_norm_are_its_parameters(shared_model: Any, family: str) -> None:
    model = shared_model(family)
    for block in wiring(model):
        for norm in norms(block).values():
            own = norm.module.original_component
            weight = own.weight + 1 if family == "gemma2" else own.weight
            torch.testing.assert_close(norm.weight, weight.detach(), rtol=1e-4, atol=1e-5)
            bias = getattr(own, "bias", None)
            wanted = torch.zeros(24) if bias is None else bias.detach()
            torch.testing.assert_close(norm.bias, wanted, rtol=1e-5, atol=1e-6)


@families
def test_weights_have_a_row_for_each_head_and_key_value_heads_are_fewer(
    shared_model: Any, family: str
) -> None:
    blocks, d_head = wiring(shared_model(family)), D_HEAD.get(family, 6)
    assert [block.layer for block in blocks] == [0, 1, 2]
    for block in blocks:
        n_kv = 2 if family in GROUPED else 4
        assert block.n_heads == 4 and block.parallel == (family == "neox")
        for projection, heads in ((block.q, 4), (block.k, n_kv), (block.v, n_kv)):
            assert projection.weight.shape == (heads, 24, d_head)
            assert projection.bias.shape == (heads, d_head)
        assert block.attn.weight.shape == (4 * d_head, 24) and block.attn.constant.shape == (24,)
        if family == "native_attn_only":
            assert block.mlp is None and block.mlp_reader is None
        else:
            assert block.mlp.weight.shape == (40, 24) and block.mlp.constant.shape == (24,)
        tensors = [projection.weight for projection in (block.q, block.k, block.v)]
        assert not any(t.requires_grad for t in [*tensors, block.attn.weight, block.attn.constant])


@families
def test_projections_of_the_normalised_stream_are_the_models_q_k_v(
    shared_model: Any, family: str, tokens: Tensor
) -> None:
    model = shared_model(family)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        for block in wiring(model):
            y = block.attn_norm(cache[f"blocks.{block.layer}.hook_resid_pre"])
            for part, projection in (("q", block.q), ("k", block.k), ("v", block.v)):
                n, d_head = projection.bias.shape
                wanted = cache[f"blocks.{block.layer}.attn.hook_{part}"].reshape(2, 7, n, d_head)
                for heads in (torch.arange(n), torch.tensor([n - 1, 0])):
                    found = projection(y.expand(len(heads), *y.shape), heads)
                    torch.testing.assert_close(found, wanted[:, :, heads], rtol=1e-4, atol=1e-5)


@families
def test_a_projection_gives_each_head_its_own_input(shared_model: Any, family: str) -> None:
    y = torch.randn(2, 3, 5, 24, generator=torch.Generator().manual_seed(4))
    projection, heads = wiring(shared_model(family))[1].v, torch.tensor([1, 0])
    found = projection(y, heads)
    for row, head in enumerate(heads.tolist()):
        wanted = y[row] @ projection.weight[head] + projection.bias[head]
        torch.testing.assert_close(found[:, :, row], wanted, rtol=1e-4, atol=1e-5)


@families
def test_output_projections_and_constants_are_what_components_write(
    shared_model: Any, family: str, tokens: Tensor
) -> None:
    model = shared_model(family)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        for block in wiring(model):
            name = f"blocks.{block.layer}"
            inner = {"attn": "attn.hook_z", "mlp": "mlp.hook_post"}
            for part, writer in (("attn", block.attn), ("mlp", block.mlp)):
                if writer is None:
                    continue
                x = cache[f"{name}.{inner[part]}"].reshape(2, 7, -1)
                wanted = cache[f"{name}.hook_{part}_out"]
                r = 1.0
                if family == "gemma2":  # what the post-norm is given, to know its scale
                    r = writer.post.scale(x @ (writer.weight / writer.post.weight), wanted)
                else:
                    assert writer.post.module is None
                torch.testing.assert_close(
                    x @ writer.weight * r + writer.constant, wanted, rtol=1e-4, atol=1e-5
                )


# ---- what is checked -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@families
def test_every_family_passes_and_keeps_no_hook(make_model: Any, family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    model(torch.arange(3)[None])
    before = n_hooks(model)
    check(model)
    assert n_hooks(model) == before


def test_a_block_that_scales_what_is_added_is_refused_by_name(make_model: Any) -> None:
    model = make_model("granite")
    model(torch.arange(3)[None])
    before = n_hooks(model)
    for refused in (check, CircuitGraph):
        with pytest.raises(InputError, match="Granite.*: blocks.0.*Edges .* node_attribution"):
            refused(model)
        assert n_hooks(model) == before


HEADS = "blocks.{}.attn writes something else than the sum of its heads"
ADDED = "blocks.{} does not add what attention and MLP write to the stream as it is"
#: The module of a block that is made to put out twice what it does → what the block then does otherwise.
ALTERED = {
    "ln1": "blocks.{}.attn.q.hook_out does not read the norm of the stream",
    "attn.q.hook_out": "blocks.{}.attn.q.hook_out does not read the norm of the stream",
    "attn.k.hook_out": "blocks.{}.attn.k.hook_out does not read the norm of the stream",
    "attn.v.hook_out": "blocks.{}.attn.v.hook_out does not read the norm of the stream",
    "attn.o": HEADS,
    "attn.hook_out": HEADS,
    "attn": "blocks.{}.mlp does not read the stream after attention",
    "mlp": ADDED,
    "hook_out": ADDED,
}
ALTERED_OTHERWISE: dict[str, dict[str, str | None]] = {
    "neox": {"attn": ADDED},  # nothing reads the stream between attention and MLP
    "native_attn_only": {"attn": ADDED, "mlp": None},
    # A post-norm does not see that its input was doubled, and its output may be scaled token by token.
    "gemma2": {"attn": HEADS, "mlp": None, "attn.hook_out": None, "ln2_post": ADDED},
}
CASES = [
    pytest.param(family, path, sentence, id=f"{family}-{path}")
    for family in FAMILIES
    for path, sentence in {**ALTERED, **ALTERED_OTHERWISE.get(family, {})}.items()
    if sentence is not None
]


@pytest.mark.parametrize(("family", "path", "sentence"), CASES)
def test_an_altered_block_is_refused_by_name(
    shared_model: Any, family: str, path: str, sentence: str
) -> None:
    model = shared_model(family)
    model(torch.arange(3)[None])
    before = n_hooks(model)
    for layer in (0, 2):
        module = model.blocks[layer].get_submodule(path)
        with doubled(module), pytest.raises(InputError, match=sentence.format(layer)):
            check(model)
        assert n_hooks(model) == before
    check(model)


def test_a_norm_that_is_not_affine_is_refused_by_name(make_model: Any) -> None:
    model = make_model("llama")
    own = model.blocks[1].ln2.original_component
    own.forward = lambda x: torch.tanh(x)
    with pytest.raises(InputError, match="blocks.1.ln2 .* is no affine RMS or layer norm"):
        wiring(model)


def test_hooks_are_taken_off_when_the_run_fails(shared_model: Any) -> None:
    model = shared_model("gpt2")
    before = n_hooks(model)

    def failing(tokens: Tensor) -> Callable[..., Any]:
        model(tokens)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        check_blocks(hooked_model(model), wiring(model), failing)
    assert n_hooks(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_stream_in_half_precision_is_not_refused(make_model: Any, dtype: torch.dtype) -> None:
    model = make_model("llama", dtype)
    with torch.no_grad():
        model.embed.original_component.weight.mul_(300)
    check(model)


def test_an_rms_norm_with_small_weights_is_not_taken_to_centre(make_model: Any) -> None:
    def of(factor: float) -> PruneScores:
        model = make_model("llama")
        block = model.blocks[1]
        with torch.no_grad():
            block.ln1.original_component.weight.mul_(factor)
            for part in "qkv":
                getattr(block.attn, part).original_component.weight.div_(factor)
        return edge_attribution(CircuitGraph(model), make_prompts(), progress=False)

    torch.testing.assert_close(of(1e-4).flat(), of(1.0).flat(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("family", "path"), [("gemma2", "mlp"), ("llama", "mlp.out.original_component")])
def test_an_mlp_that_does_not_write_what_its_neurons_say_is_refused(
    make_model: Any, family: str, path: str
) -> None:
    model = make_model(family)
    model.blocks[1].get_submodule(path).register_forward_hook(lambda m, a, out: 2 * out)
    with pytest.raises(InputError, match="blocks.1.mlp"):
        CircuitGraph(ac.sae_model(model, ac.neuron_saes(model, [1])))


def test_nan_weights_are_called_so(make_model: Any) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.blocks[1].attn.o.original_component.weight.mul_(math.nan)
    with pytest.raises(InputError, match="finite|NaN"):
        check(model)


def test_granite_is_refused_for_its_reason(make_model: Any) -> None:
    with pytest.raises(InputError) as error:
        CircuitGraph(make_model("granite"))
    assert "never runs" not in str(error.value)
