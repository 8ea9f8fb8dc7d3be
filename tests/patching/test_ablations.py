from typing import Any

import pytest
import torch
from prune_algos.test_node_attribution import SITES, make_saes, patches_of

import auto_circuit as ac
from auto_circuit.errors import UnknownNameError
from auto_circuit.patching.ablations import Ablation, Ablator, SiteRecorder, site_inputs, site_patches


@pytest.mark.parametrize("ablation", ["resample", "zero", "mean"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_patches_equal_the_definitions(
    shared_model: Any, prompts: Any, ablation: str, batch_size: int
) -> None:
    model, saes = shared_model("gpt2"), make_saes()
    with ac.sae_model(model, saes) as spliced:
        ablator = Ablator(SiteRecorder(spliced), prompts, ablation, batch_size)
        for batch in prompts.batches(batch_size):
            for name, patch in site_patches(ablator.patches(batch)).items():
                c, e = patches_of(model, saes, prompts, batch, ablation)[name]
                torch.testing.assert_close(patch.coefficients, c, rtol=1e-4, atol=1e-5)
                error = patch.x - saes[name].write(patch.coefficients) - saes[name].bias
                torch.testing.assert_close(error, e.expand_as(error), rtol=1e-3, atol=1e-5)


def test_inputs_are_recorded_without_counting_and_without_gradients(shared_model: Any, prompts: Any) -> None:
    saes = make_saes()
    inputs = site_inputs(ac.sae_model(shared_model("gpt2"), saes), next(prompts.batches()).clean)
    assert list(inputs) == list(SITES) and not any(x.requires_grad for x in inputs.values())
    assert all((sae.latent_total_act == 0).all() for sae in saes.values())
    with pytest.raises(UnknownNameError, match="mean"):
        Ablation.named("meen")
