"""Against inputs, latents and reconstructions that SAELens itself computed, and against SAELens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformer_lens.hook_points import HookPoint

from auto_circuit import SparseAutoencoder, load_saes, save_saes
from auto_circuit.errors import CheckpointError, UnknownNameError
from auto_circuit.model_utils.sparse_autoencoders.input_scaling import ConstantNormScaling, LayerNormScaling
from auto_circuit.model_utils.sparse_autoencoders.latent_activations import Gated, JumpReLU, TopK

ONES = ("standard", "jumprelu", "topk_rescale", "standard_layernorm")


@pytest.mark.parametrize("name", ONES)
def test_equals_what_saelens_computed(fixtures: Path, name: str) -> None:
    folder = fixtures / "checkpoints" / "sae_lens" / name
    (sae,) = load_saes(folder).values()
    io = load_file(folder / "io.safetensors")
    torch.testing.assert_close(sae.encode(io["x"]), io["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(io["x"]), io["recon"], rtol=1e-5, atol=1e-5)
    assert (io["latents"] > 0).any()


def random_sae(kind: str, scaling: str = "none") -> SparseAutoencoder:
    torch.manual_seed(0)
    activation: dict[str, Any] = {
        "standard": None, "topk": TopK(3), "jumprelu": JumpReLU(torch.rand(12)),
        "gated": Gated(torch.randn(12), 0.2 * torch.randn(12), torch.randn(12)),
    }  # fmt: skip
    scale = {"none": None, "layer_norm": LayerNormScaling(1e-5), "constant_norm": ConstantNormScaling(6**0.5)}
    sae = SparseAutoencoder(HookPoint(), 12, 6, activation=activation[kind], scaling=scale[scaling])
    with torch.no_grad():
        sae.bias.normal_()
        sae.latent_bias.normal_()
    return sae


CASES = [
    (k, s) for k in ("standard", "topk", "jumprelu", "gated") for s in ("none", "layer_norm", "constant_norm")
]


@pytest.mark.parametrize(("kind", "scaling"), CASES)
def test_there_and_back(tmp_path: Path, kind: str, scaling: str) -> None:
    sae, x = random_sae(kind, scaling), torch.randn(4, 6)
    (folder,) = save_saes({"blocks.1.hook_mlp_out": sae}, tmp_path)
    loaded = load_saes(tmp_path)["blocks.1.hook_mlp_out"]
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    torch.testing.assert_close(loaded(x), sae(x))
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    if kind != "topk":
        loaded.prune_latents(torch.tensor([5, 2]))
        save_saes({"blocks.1.hook_mlp_out": loaded}, tmp_path)
        again = load_saes(tmp_path)["blocks.1.hook_mlp_out"]
        assert again.latent_ids.tolist() == [5, 2]
        torch.testing.assert_close(again.encode(x), sae.encode(x)[:, [5, 2]])


@pytest.mark.parametrize(("kind", "scaling"), CASES)
@pytest.mark.parametrize("site", ["blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"])
def test_saelens_loads_what_we_save(tmp_path: Path, kind: str, scaling: str, site: str) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="needs sae-lens (the TransformerLens 3.9 environment)")
    sae, x = random_sae(kind, scaling), torch.randn(4, 5, 6)
    (folder,) = save_saes({site: sae}, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(str(folder))
    assert theirs.cfg.metadata.hook_name == site
    heads = x.reshape(4, 5, 2, 3) if site.endswith("hook_z") else x
    torch.testing.assert_close(theirs.encode(heads), sae.encode(x), rtol=1e-5, atol=1e-5)
    recon = theirs(heads)
    torch.testing.assert_close(recon.reshape(x.shape), sae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_we_load_what_saelens_saves(tmp_path: Path, kind: str, normalize: str, apply_b_dec: bool) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="needs sae-lens (the TransformerLens 3.9 environment)")
    cfg = dict(architecture=kind, d_in=6, d_sae=12, dtype="float32", device="cpu")
    cfg |= dict(normalize_activations=normalize, apply_b_dec_to_input=apply_b_dec)
    if kind == "topk":
        cfg |= dict(k=3, rescale_acts_by_decoder_norm=True)
    theirs = sae_lens.SAE.from_dict(cfg)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) if name == "threshold" else torch.randn_like(parameter)
            )
    theirs.save_model(str(tmp_path / "one"))
    (ours,) = load_saes(tmp_path / "one").values()
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def damaged(tmp_path: Path, cfg: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    (folder,) = save_saes({"blocks.1.hook_mlp_out": random_sae("standard")}, tmp_path)
    settings = json.loads((folder / "cfg.json").read_text()) | (cfg or {})
    (folder / "cfg.json").write_text(json.dumps(settings))
    weights = load_file(folder / "sae_weights.safetensors") | tensors
    save_file({k: t for k, t in weights.items() if t is not None}, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize(
    ("cfg", "tensors", "words"),
    [
        ({"architecture": "jumpreluu"}, {}, "Nearest|expected jumprelu"),
        ({"architecture": "temporal"}, {}, "'temporal' is not one that can be loaded"),
        ({"architecture": "jumprelu"}, {}, r"missing: \['threshold'\]"),
        ({"architecture": "topk"}, {}, "whole number k"),
        ({"normalize_activations": "expected_average_only_in"}, {}, "fold_activation_norm_scaling_factor"),
        ({"normalize_activations": "covariance_whitening"}, {}, "expected none, layer_norm"),
        ({"activation_fn": "topk"}, {}, "not a ReLU SAE"),
        ({"activation_fn_str": "topk"}, {}, "not a ReLU SAE"),
        ({"apply_b_dec_to_input": "false"}, {}, "must be true or false"),
        ({"architecture": "topk", "k": True}, {}, "whole number k"),
        ({"architecture": "topk", "k": 10**30}, {}, "from 1 to 12"),
        ({"metadata": {"latent_ids": ["a"] * 12}}, {}, "12 different whole numbers"),
        ({"metadata": {"latent_ids": [0] * 12}}, {}, "12 different whole numbers"),
        ({}, {"b_dec": torch.zeros(6, dtype=torch.long)}, "b_dec has dtype torch.int64"),
        ({}, {"b_dec": torch.zeros(6, dtype=torch.float64)}, "one floating-point dtype"),
        ({"d_in": 7}, {}, r"shape \(6, 12\); cfg.json \(d_in = 7"),
        ({}, {"threshold": torch.zeros(12)}, r"extra: \['threshold'\]"),
        ({}, {"b_dec": None}, r"missing: \['b_dec'\]"),
        ({}, {"b_enc": torch.full((12,), torch.nan)}, "b_enc has 12 values that are not finite"),
    ],
)
def test_what_would_run_and_be_wrong_is_refused(tmp_path: Path, cfg: Any, tensors: Any, words: str) -> None:
    folder = damaged(tmp_path, cfg, **tensors)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_saes(tmp_path)
    assert str(folder) in str(caught.value)


def test_folders_and_sites(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        load_saes(tmp_path / "none")
    with pytest.raises(CheckpointError, match="No SAE was found.*holds nothing"):
        load_saes(tmp_path)
    names = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    save_saes({name: random_sae("standard") for name in names}, tmp_path / "deep" / "er")
    assert list(load_saes(tmp_path)) == names
    assert list(load_saes(tmp_path, sites=names[1:])) == names[1:]
    with pytest.raises(UnknownNameError, match="Nearest: blocks.1.hook_mlp_out"):
        load_saes(tmp_path, sites=["blocks.1.hook_mlp_ou"])
    save_saes({names[0]: random_sae("topk")}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="Two SAEs for blocks.0.hook_mlp_out"):
        load_saes(tmp_path)
    half = load_saes(tmp_path / "other", dtype=torch.float16)[names[0]]
    assert half.bias.dtype == torch.float16
    (folder,) = save_saes({names[1]: half}, tmp_path / "half")
    assert load_saes(tmp_path / "half")[names[1]].encode_weight.dtype == torch.float16
    (folder / "cfg.json").write_text("{")
    with pytest.raises(CheckpointError, match="Cannot read .*cfg.json"):
        load_saes(tmp_path / "half")
    (folder / "cfg.json").write_text(json.dumps({"d_in": 6, "d_sae": 12, "architecture": "standard"}))
    (folder / "sae_weights.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="Cannot read .*sae_weights"):
        load_saes(tmp_path / "half")


def test_what_the_layout_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    topk, position = random_sae("topk"), random_sae("standard")
    topk.prune_latents(torch.tensor([1, 2]))
    position.prune_latents(torch.tensor([[1, 2], [3, 4]]))
    for sae, words in ((topk, "selects among all"), (position, "2 positions")):
        with pytest.raises(CheckpointError, match=words):
            save_saes({"a": random_sae("standard"), "b": sae}, tmp_path / "out")
    broken = random_sae("standard")
    broken.bias.data[0] = torch.nan
    odd = random_sae("standard")
    odd.scaling = LayerNormScaling(0.5)
    for sae, words in ((broken, "bias have values that are not finite"), (odd, "always takes eps = 1e-05")):
        with pytest.raises(CheckpointError, match=words):
            save_saes({"a": sae}, tmp_path / "out")
    with pytest.raises(CheckpointError, match="folder's name"):
        save_saes({"../a": random_sae("standard")}, tmp_path / "out")
    with pytest.raises(UnknownNameError, match="Nearest: sae_lens"):
        save_saes({}, tmp_path, format="saelens")
    assert not (tmp_path / "out").exists()
