import pytest
import torch
from transformer_lens.hook_points import HookPoint

from auto_circuit.errors import CheckpointError
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder


def state(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    whole = SparseAutoencoder(HookPoint(), 5, 3).state_dict() | changes
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": None}, "missing: \\['bias'\\]"),
        ({"bias": torch.zeros(4)}, r"'bias': '\[4\], expected \[3\]"),
        ({"decode_weight": torch.zeros(5, 3)}, r"decode_weight.*expected \[3, 5\]"),
        ({"encode_weight": torch.zeros(3)}, "n_latents, n_inputs"),
        ({"surprise": torch.zeros(3)}, "surprise"),
        ({"activation.threshold": torch.zeros(4)}, "activation.threshold"),
        ({"activation.tau": torch.zeros(5)}, "No latent activation"),
        ({"scaling.mean": torch.zeros(5)}, "No input scaling"),
        ({"selector_idxs": torch.arange(5)}, "needs all of"),
        ({"latent_ids": torch.arange(4)}, "latent_ids"),
    ],
)
def test_strict(changes: dict[str, torch.Tensor | None], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        SparseAutoencoder.from_state_dict(HookPoint(), state(**changes))


def test_copies_unless_asked_to_assign_and_keeps_the_dtype() -> None:
    given = {name: tensor.half() for name, tensor in state().items()}
    copied = SparseAutoencoder.from_state_dict(HookPoint(), given)
    assigned = SparseAutoencoder.from_state_dict(HookPoint(), given, assign=True)
    assert copied.bias.dtype == torch.float16
    for name, tensor in given.items():
        assert assigned.get_parameter(name).data_ptr() == tensor.data_ptr()
        assert copied.get_parameter(name).data_ptr() != tensor.data_ptr()
        assert torch.equal(copied.get_parameter(name), tensor)
    assert copied.directions.is_contiguous() and copied.latent_total_act.shape == (5,)
