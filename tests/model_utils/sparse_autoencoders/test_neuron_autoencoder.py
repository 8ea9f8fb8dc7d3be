import copy

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from auto_circuit import neuron_saes, sae_model
from auto_circuit.errors import InputError
from auto_circuit.model_utils.sparse_autoencoders.neuron_autoencoder import NeuronAutoencoder


@pytest.mark.parametrize("per_position", [False, True])
def test_equals_an_identity_dictionary(per_position: bool) -> None:
    x = torch.randn(2, 4, 6)
    sae = NeuronAutoencoder(HookPoint(), 6)
    assert torch.equal(sae.encode(x), x) and torch.equal(sae(x), x)
    idxs = (
        torch.tensor([[4, 0, 5], [1, 2, 3], [0, 1, 2], [5, 4, 3]])
        if per_position
        else torch.tensor([4, 0, 5])
    )
    for error_nodes in (False, True):
        pruned = copy.deepcopy(sae)
        pruned.error_nodes = error_nodes
        pruned.prune_latents(idxs)
        index = idxs.expand(2, 4, 3)
        assert torch.equal(pruned.encode(x), x.gather(-1, index))
        expected = x if error_nodes else torch.zeros_like(x).scatter(-1, index, x.gather(-1, index))
        assert torch.equal(pruned(x), expected)
        assert torch.equal(pruned.directions, torch.eye(6)[idxs])
        pruned.latents.add_hook(lambda z, hook: z * 2)
        assert torch.allclose(
            pruned(x), expected + x.gather(-1, index).unsqueeze(-2).matmul(torch.eye(6)[idxs]).squeeze(-2)
        )
        pruned.prune_latents(torch.tensor([2, 0]))
        assert torch.equal(pruned.latent_ids, idxs[..., [2, 0]])


def test_neurons_of_a_model(shared_model, tokens) -> None:
    model = shared_model("llama")
    saes = neuron_saes(model, [2, 0])
    assert list(saes) == ["blocks.2.mlp.hook_post", "blocks.0.mlp.hook_post"]
    with sae_model(model, saes, error_nodes=False) as spliced:
        out = spliced(tokens)
    assert torch.equal(out, model(tokens))
    for layers, words in (([3], "0 to 2"), ([1, 1], "each once"), ([], "at least one")):
        with pytest.raises(InputError, match=words):
            neuron_saes(model, layers)
    with pytest.raises(InputError, match="have no mlp.hook_post"):
        neuron_saes(shared_model("native_attn_only"))
