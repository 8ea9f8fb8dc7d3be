"""What `test_autoencoder_transformer` does not reach: aliases, original model, leaving half-way."""

from typing import Any

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from auto_circuit import SparseAutoencoder, sae_model
from auto_circuit.errors import SpliceError
from auto_circuit.model_utils import splice as splice_module


def test_aliases_that_came_to_point_at_the_sae_are_repaired(make_model: Any, tokens: torch.Tensor) -> None:
    model = make_model("gpt2")
    block = model.blocks[1]
    before = block.hook_mlp_out
    sae = SparseAutoencoder(HookPoint(), 8, 24)
    with sae_model(model, {"blocks.1.hook_mlp_out": sae}):
        block._register_aliases()  # as compatibility mode does
        assert block.hook_mlp_out is sae
    assert block.hook_mlp_out is before is model.blocks[1].mlp.hook_out


def test_a_failure_while_entering_leaves_nothing(
    make_model: Any, tokens: torch.Tensor, monkeypatch: Any
) -> None:
    model = make_model("gpt2")
    plain = model(tokens)
    names = set(model.hook_dict)
    monkeypatch.setattr(splice_module.Splice, "_watch_forward", lambda self: 1 / 0)
    saes = {f"blocks.{i}.hook_resid_mid": SparseAutoencoder(HookPoint(), 8, 24) for i in range(3)}
    with pytest.raises(ZeroDivisionError):
        sae_model(model, saes).splice()
    assert set(model.hook_dict) == names and torch.equal(model(tokens), plain)
    assert not any(
        isinstance(module, (SparseAutoencoder, splice_module.BlockOutput)) for module in model.modules()
    )
    model.to(torch.float32)
    monkeypatch.undo()
    with sae_model(model, saes), pytest.raises(SpliceError, match="moved or converted"):
        model.to(torch.float64)


def test_an_interrupt_while_leaving_still_restores_the_rest(make_model: Any, tokens: torch.Tensor) -> None:
    model = make_model("gpt2")
    plain, names = model(tokens), set(model.hook_dict)

    def interrupt() -> None:
        raise KeyboardInterrupt

    spliced = sae_model(model, {"blocks.1.hook_resid_mid": SparseAutoencoder(HookPoint(), 8, 24)}).splice()
    spliced._splice._undo.insert(len(spliced._splice._undo) // 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        spliced.unsplice()
    assert not spliced.is_spliced and set(model.hook_dict) == names and torch.equal(model(tokens), plain)
    model.to(torch.float32)
    with spliced:
        assert torch.equal(spliced(tokens), plain)
