from typing import Any

import pytest
import torch
from conftest import make_prompts
from transformer_lens.hook_points import HookPoint

import auto_circuit as ac
from auto_circuit.graph.nodes import SiteMask
from auto_circuit.patching.ablations import Ablator, SiteRecorder, site_patches
from auto_circuit.patching.node_patching import run_nodes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "neox"])
def test_all_ablated_is_the_other_run_and_none_ablated_its_own_bitwise(
    make_model: Any, family: str, dtype: torch.dtype
) -> None:
    """At the start of the stream nothing else distinguishes the two runs. The SAE stays in float32."""
    model, prompts = make_model(family, dtype), make_prompts(lengths=(6,))
    sae = ac.SparseAutoencoder(HookPoint(), 16, 24)
    batch, name = next(prompts.batches()), "blocks.0.hook_resid_pre"
    with ac.sae_model(model, {name: sae}) as spliced, torch.no_grad():
        patches = site_patches(Ablator(SiteRecorder(spliced), prompts, "resample").patches(batch))
        for kept, tokens in ((False, batch.corrupt), (True, batch.clean)):
            mask = SiteMask(torch.full((16,), kept), torch.tensor(kept))
            assert torch.equal(run_nodes(spliced, batch, {name: mask}, patches), model(tokens)[:, -1])
        # All latents ablated and the error kept, or the reverse: neither run.
        for latents in (True, False):
            mask = SiteMask(torch.full((16,), latents), torch.tensor(not latents))
            out = run_nodes(spliced, batch, {name: mask}, patches)
            assert not torch.equal(out, model(batch.clean)[:, -1]) and torch.isfinite(out).all()


def test_a_scaled_sae_splits_its_input_too(make_model: Any) -> None:
    """With a layer-normalised SAE the bias follows the token, so it belongs to the error."""
    from auto_circuit.model_utils.sparse_autoencoders.input_scaling import LayerNormScaling

    model, prompts = make_model("llama"), make_prompts(lengths=(6,))
    sae = ac.SparseAutoencoder(HookPoint(), 16, 24, scaling=LayerNormScaling(1e-5))
    torch.nn.init.normal_(sae.bias)
    batch, name = next(prompts.batches()), "blocks.1.hook_resid_post"
    with ac.sae_model(model, {name: sae}) as spliced, torch.no_grad():
        mask = SiteMask(torch.ones(16, dtype=torch.bool), torch.tensor(False))
        patches = site_patches(Ablator(SiteRecorder(spliced), prompts, "zero").patches(batch))
        kept_latents = run_nodes(spliced, batch, {name: mask}, patches)
    with torch.no_grad():
        hook = (name, lambda x, hook: sae.encode(x) * x.std(-1, keepdim=True) @ sae.decode_weight.T)
        expected = model.run_with_hooks(batch.clean, fwd_hooks=[hook])[:, -1]
    torch.testing.assert_close(kept_latents, expected, rtol=1e-4, atol=1e-5)
