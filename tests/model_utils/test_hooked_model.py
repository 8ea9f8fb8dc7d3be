from typing import Any

import pytest
from conftest import FAMILIES

from auto_circuit.errors import InputError, UnknownNameError
from auto_circuit.model_utils.hooked_model import SITE_KINDS, hooked_model


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_are_those_of_the_activations(shared_model: Any, family: str, tokens: Any) -> None:
    model = shared_model(family)
    seen: dict[str, Any] = {}
    sites = hooked_model(model).sites()
    hooks = [(s.name, lambda x, hook, n=s.name: seen.update({n: x.shape})) for s in sites]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert list(seen) == sorted(seen, key=[s.name for s in sites].index)
    for site in sites:
        assert seen[site.name][2:].numel() == site.width and seen[site.name][:2] == (2, 7)
        assert hooked_model(model).site(site.canonical) == site == hooked_model(model).site(site.name)


def test_parallel_and_attention_only_blocks_lack_sites(shared_model: Any) -> None:
    kinds = {
        f: {s.kind for s in hooked_model(shared_model(f)).sites()}
        for f in ("gpt2", "neox", "native_attn_only")
    }
    assert kinds["gpt2"] == set(SITE_KINDS)
    assert kinds["gpt2"] - kinds["neox"] == {"hook_resid_mid"}
    assert kinds["gpt2"] - kinds["native_attn_only"] == {"hook_resid_mid", "mlp.hook_post", "hook_mlp_out"}


def test_names_that_are_not_sites(shared_model: Any) -> None:
    hooked = hooked_model(shared_model("gpt2"))
    with pytest.raises(UnknownNameError, match="Nearest: blocks.2.hook_mlp_out"):
        hooked.site("blocks.2.hook_mlpout")
    with pytest.raises(InputError, match="not one where an SAE can stand"):
        hooked.site("blocks.2.ln1.hook_scale")
    with pytest.raises(UnknownNameError, match="resid_delta_mlp"):
        hooked.family("resid_delta_ml")
