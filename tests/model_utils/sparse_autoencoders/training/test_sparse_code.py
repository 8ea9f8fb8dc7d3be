"""Sparse encoding and decoding against dense products, values and gradients."""

import pytest
import torch

from auto_circuit.model_utils.sparse_autoencoders.training.sparse_code import (
    AllLatents,
    SomeLatents,
    pre_activations,
    where,
)

ROWS, LATENTS, WIDTH = 9, 14, 5


def _tensors() -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64).requires_grad_()

    return {
        "x": draw(ROWS, WIDTH),
        "encode": draw(LATENTS, WIDTH),
        "bias": draw(LATENTS),
        "directions": draw(LATENTS, WIDTH),
        "weights": draw(ROWS, WIDTH),
    }


def _mask(kind: str) -> torch.Tensor:
    if kind == "each_row":
        chosen = torch.rand(ROWS, LATENTS, generator=torch.Generator().manual_seed(1)).topk(3).indices
        return torch.zeros(ROWS, LATENTS, dtype=torch.bool).scatter(1, chosen, True)
    mask = torch.rand(ROWS, LATENTS, generator=torch.Generator().manual_seed(2)) < 0.3
    mask[2] = False  # a row without an entry, a latent without one, and both at the ends
    mask[-1] = False
    mask[:, 4] = False
    mask[:, 0] = False
    mask[:, -1] = False
    return mask


@pytest.mark.parametrize("kind", ["some", "each_row", "none", "all"])
@pytest.mark.parametrize("known", [True, False])
def test_values_and_gradients_equal_dense_ones(kind: str, known: bool) -> None:
    masks = {"none": torch.zeros(ROWS, LATENTS, dtype=torch.bool)}
    mask = masks[kind] if kind in masks else _mask(kind)
    t = _tensors()
    if kind == "all":
        code, mask = AllLatents((ROWS, LATENTS)), torch.ones(ROWS, LATENTS, dtype=torch.bool)
    elif kind == "each_row":
        chosen = mask.nonzero()[:, 1].view(ROWS, 3).flip(1)  # in any order
        code = SomeLatents.each_row(chosen, LATENTS)
    else:
        code = SomeLatents.where(mask)
    pre = pre_activations(t["x"], t["encode"], t["bias"]) if known else None
    p = code.encode(t["x"], t["encode"], t["bias"], pre)
    out = code.decode(p.relu() ** 2, t["directions"])
    names = ("x", "encode", "bias", "directions")
    got = torch.autograd.grad((out * t["weights"]).sum(), [t[name] for name in names], allow_unused=True)

    dense = (t["x"] @ t["encode"].T + t["bias"]).relu() ** 2 * mask
    expected_out = dense @ t["directions"]
    expected = torch.autograd.grad((expected_out * t["weights"]).sum(), [t[name] for name in names])
    assert torch.allclose(out, expected_out)
    for name, mine, theirs in zip(names, got, expected, strict=True):
        mine = torch.zeros_like(theirs) if mine is None else mine
        assert torch.allclose(mine, theirs), name


def test_where_takes_the_dense_form_when_much_takes_part() -> None:
    assert isinstance(where(torch.ones(4, 6, dtype=torch.bool)), AllLatents)
    few = torch.zeros(4, 6, dtype=torch.bool)
    few[1, 2] = True
    found = where(few)
    assert isinstance(found, SomeLatents) and found.rows.tolist() == [1] and found.latents.tolist() == [2]


def test_a_part_has_the_entries_of_its_latents_and_what_fired() -> None:
    mask = _mask("some")
    code = SomeLatents.where(mask)
    part, entries = code.part(3, 9)
    inside = torch.zeros_like(mask)
    inside[:, 3:9] = mask[:, 3:9]
    assert torch.equal(torch.stack([part.rows, part.latents], 1), inside.nonzero())
    assert torch.equal(code.latents[entries], part.latents)
    values = torch.where(code.latents == 5, 0.0, 1.0)
    expected = mask.any(0)
    expected[5] = False
    assert torch.equal(code.fired(values), expected)
    assert torch.equal(AllLatents((ROWS, LATENTS)).fired(mask.float()), mask.any(0))
