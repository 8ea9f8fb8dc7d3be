import pytest
import torch

from auto_circuit.errors import CheckpointError, InputError
from auto_circuit.model_utils.sparse_autoencoders.latent_activations import (
    ACTIVATIONS,
    Gated,
    JumpReLU,
    TopK,
    activation_from_tensors,
)


def test_hand_computed_cases() -> None:
    pre = torch.tensor([[3.0, -1.0, 0.5, 2.0], [-1.0, -2.0, -3.0, 0.25]])
    assert TopK(2)(pre).tolist() == [[3, 0, 0, 2], [0, 0, 0, 0.25]]
    assert JumpReLU(torch.tensor([3.0, -2.0, 0.4, 1.0]))(pre).tolist() == [[0, 0, 0.5, 2], [0, 0, 0, 0]]
    gated = Gated(torch.tensor([-4.0, 2.0, 0, 0]), torch.zeros(4), torch.tensor([0, 1.5, 1, -3.0]))
    assert gated(pre).tolist() == [[0, 0.5, 1.5, 0], [0, 0, 0, 0]]
    assert TopK(9)(pre).tolist() == pre.clamp(min=0).tolist()


def test_from_tensors_finds_the_kind_or_says_what_there_is() -> None:
    for kind, cls in ACTIVATIONS.items():
        tensors = {name: torch.ones(3) for name in cls.tensors} | (
            {"k": torch.tensor(2)} if kind == "topk" else {}
        )
        assert activation_from_tensors(tensors).kind == kind
    with pytest.raises(CheckpointError, match="threshold"):
        activation_from_tensors({"thresh": torch.ones(3)})
    with pytest.raises(InputError, match="k ≥ 1"):
        TopK(0)
    with pytest.raises(InputError, match="one shape"):
        Gated(torch.ones(3), torch.ones(4), torch.ones(3))


def test_topk_reads_its_size_from_a_state_dict() -> None:
    topk = TopK(2)
    topk.load_state_dict({"k": torch.tensor(1)})
    assert topk(torch.tensor([1.0, 2.0])).tolist() == [0, 2]


def test_topk_equals_sparsify() -> None:
    sparsify = pytest.importorskip("sparsify", reason="needs eai-sparsify (make oracles)")
    from transformer_lens.hook_points import HookPoint

    from auto_circuit import SparseAutoencoder

    torch.manual_seed(0)
    theirs = sparsify.SparseCoder(6, sparsify.SparseCoderConfig(num_latents=12, k=3))
    with torch.no_grad():
        theirs.b_dec.normal_()
        theirs.encoder.bias.normal_()
    state = {
        "bias": theirs.b_dec, "latent_bias": theirs.encoder.bias, "encode_weight": theirs.encoder.weight,
        "decode_weight": theirs.W_dec.T, "activation.k": torch.tensor(3),
    }  # fmt: skip
    ours, x = SparseAutoencoder.from_state_dict(HookPoint(), state), torch.randn(5, 6)
    found = theirs.encode(x)
    dense = torch.zeros(5, 12).scatter(-1, found.top_indices, found.top_acts)
    torch.testing.assert_close(ours.encode(x), dense)
    torch.testing.assert_close(ours(x), theirs(x).sae_out)
