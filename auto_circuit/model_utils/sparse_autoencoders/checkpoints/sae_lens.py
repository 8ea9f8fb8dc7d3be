"""SAELens' layout (version 6): `cfg.json` and `sae_weights.safetensors` in one folder.

Architectures: standard, topk, jumprelu (what BatchTopK and Matryoshka are published as), gated.
Tensors, with n latents and d inputs: `W_enc [d, n]`, `W_dec [n, d]`, `b_dec [d]`, and `b_enc [n]`
(gated instead: `b_gate`, `b_mag`, `r_mag`, all `[n]`), `threshold [n]` (jumprelu).

To the canonical form:

- `apply_b_dec_to_input = false`: the encoder's bias becomes `b_enc + W_encᵀ·b_dec`.
- `rescale_acts_by_decoder_norm`: encoder rows and biases are multiplied by the decoder rows' norms, and
  the decoder rows divided by them, which is the same function.
- `normalize_activations`: `none`, `layer_norm` and `constant_norm_rescale` are carried. SAELens does not
  apply `expected_average_only_in` when it runs, so a file that still names it is not folded: refused.
- The latents of a pruned SAE keep their published ids in `metadata.latent_ids`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from auto_circuit.errors import CheckpointError, listed, nearest
from auto_circuit.files import write_json, write_tensors
from auto_circuit.model_utils.sparse_autoencoders.checkpoints.checkpoint_format import CheckpointFormat
from auto_circuit.model_utils.sparse_autoencoders.input_scaling import (
    ConstantNormScaling,
    LayerNormScaling,
)
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")

_BIASES = {
    "standard": {"b_enc"},
    "topk": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_gate", "b_mag", "r_mag"},
}


def recognises(folder: Path) -> bool:
    """Whether the folder holds the two files, and the config looks like SAELens'."""
    if not ((folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()):
        return False
    try:
        cfg = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # the file is there but damaged: reading it says so
    return isinstance(cfg, dict) and "d_sae" in cfg and "d_in" in cfg


def site(folder: Path) -> str | None:
    """Return the hook that the config names."""
    name = _config(folder).get("metadata", {}).get("hook_name")
    return name if isinstance(name, str) else None


def read(folder: Path) -> SparseAutoencoder:
    """Read the folder's SAE into the canonical form.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    cfg = _config(folder)
    architecture = _known_settings(folder, cfg)
    tensors = _tensors(folder, cfg, architecture)
    encode = tensors["W_enc"].T
    rows = tensors["W_dec"]
    bias = tensors["b_dec"]
    latent_bias = tensors.get("b_enc", torch.zeros_like(rows[:, 0]))
    if not cfg.get("apply_b_dec_to_input", True):
        latent_bias = latent_bias + encode @ bias
    if architecture == "topk" and cfg.get("rescale_acts_by_decoder_norm", False):
        norm = rows.norm(dim=-1).clamp(min=1e-8)
        encode, latent_bias, rows = encode * norm[:, None], latent_bias * norm, rows / norm[:, None]
    state = {"bias": bias, "latent_bias": latent_bias, "encode_weight": encode, "decode_weight": rows.T}
    if architecture == "topk":
        state["activation.k"] = torch.tensor(cfg["k"])
    elif architecture == "jumprelu":
        state["activation.threshold"] = tensors["threshold"]
    elif architecture == "gated":
        state["activation.gate_bias"] = tensors["b_gate"]
        state["activation.r_mag"] = tensors["r_mag"]
        state["activation.mag_bias"] = tensors["b_mag"]
    if cfg.get("normalize_activations", "none") == "layer_norm":
        state["scaling.eps"] = torch.tensor(1e-5)
    elif cfg.get("normalize_activations", "none") == "constant_norm_rescale":
        state["scaling.norm"] = torch.tensor(float(cfg["d_in"]) ** 0.5)
    ids = cfg.get("metadata", {}).get("latent_ids")
    if ids is not None:
        state["latent_ids"] = torch.tensor(ids, dtype=torch.long)
    try:
        sae = SparseAutoencoder.from_state_dict(HookPoint(), state, assign=True)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    sae.metadata = {"format": "sae_lens", "path": str(folder), "cfg": cfg}
    return sae


def check(name: str, sae: SparseAutoencoder) -> None:
    """Refuse what this layout cannot hold: per-position weights, and pruned TopK SAEs."""
    if sae.seq_len is not None:
        raise CheckpointError(
            f"{name}: SAELens' layout has no weights by position (this SAE has {sae.seq_len} positions). "
            f"Prune with per_position=False, or save sae.state_dict()."
        )
    if sae.selector_idxs is not None:
        raise CheckpointError(
            f"{name}: a pruned TopK SAE selects among all its latents, for which SAELens' layout has no "
            f"place. Save the SAE before pruning, or save sae.state_dict()."
        )
    norms = {LayerNormScaling: 1e-5, ConstantNormScaling: sae.n_inputs**0.5}
    scaling = sae.scaling
    for kind, value in norms.items():
        if scaling is not None and isinstance(scaling, kind):
            own = float(scaling.get_buffer(kind.setting))
            if abs(own - value) > 1e-6 * value:
                raise CheckpointError(
                    f"{name}: SAELens always takes {kind.setting} = {value:g} for {kind.kind}; this SAE has "
                    f"{own:g}. Save sae.state_dict() instead."
                )
    broken = [key for key, tensor in sae.named_parameters() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"{name}: {listed(broken)} have values that are not finite; nothing was saved.")
    if sae.activation.kind not in ("relu", "topk", "jumprelu", "gated") or type(sae) is not SparseAutoencoder:
        raise CheckpointError(f"{name}: SAELens' layout has no {type(sae).__name__} ({sae.activation.kind}).")


def write(folder: Path, name: str, sae: SparseAutoencoder) -> None:
    """Write the SAE so that SAELens loads it (`SAE.load_from_disk`)."""
    check(name, sae)
    kind = sae.activation.kind
    tensors = {
        "W_enc": sae.encode_weight.T,
        "W_dec": sae.directions,
        "b_dec": sae.bias,
        "b_enc": sae.latent_bias,
    }
    if kind == "jumprelu":
        tensors["threshold"] = sae.activation.get_parameter("threshold")
    if kind == "gated":
        # SAELens' gated SAEs have no b_enc: what ours holds is added to both of its biases.
        b_enc, r_mag = tensors.pop("b_enc"), sae.activation.get_parameter("r_mag")
        tensors["b_gate"] = sae.activation.get_parameter("gate_bias") + b_enc
        tensors["b_mag"] = sae.activation.get_parameter("mag_bias") + b_enc * r_mag.exp()
        tensors["r_mag"] = r_mag
    write_tensors(folder / WEIGHTS, {key: tensor.cpu() for key, tensor in tensors.items()})
    write_json(folder / CONFIG, _written_config(name, sae))


def _written_config(name: str, sae: SparseAutoencoder) -> dict[str, Any]:
    before = sae.metadata.get("cfg", {}) if sae.metadata.get("format") == "sae_lens" else {}
    metadata = {**before.get("metadata", {}), "hook_name": name}
    # The layout's version: without it SAELens takes the file for one of before 6 and drops the metadata.
    metadata.setdefault("sae_lens_version", "6.0.0")
    metadata.pop("latent_ids", None)
    if "latent_ids" in sae.state_dict():
        metadata["latent_ids"] = sae.latent_ids.tolist()
    normalize = "none"
    if isinstance(sae.scaling, LayerNormScaling):
        normalize = "layer_norm"
    elif isinstance(sae.scaling, ConstantNormScaling):
        normalize = "constant_norm_rescale"
    is_z = name.endswith(("attn.hook_z", "attn.o.hook_in"))
    cfg: dict[str, Any] = {
        "architecture": {"relu": "standard"}.get(sae.activation.kind, sae.activation.kind),
        "d_in": sae.n_inputs,
        "d_sae": sae.n_latents,
        "dtype": str(sae.bias.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": normalize,
        "reshape_activations": before.get("reshape_activations", "hook_z" if is_z else "none"),
        "metadata": metadata,
    }
    if sae.activation.kind == "topk":
        cfg |= {"k": int(sae.activation.get_buffer("k")), "rescale_acts_by_decoder_norm": False}
    return cfg


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error
    if not isinstance(cfg, dict) or not isinstance(cfg.get("metadata", {}), dict):
        raise CheckpointError(f"{path} must hold a JSON object, `metadata` included; given other JSON.")
    return cfg


def _known_settings(folder: Path, cfg: dict[str, Any]) -> str:
    """Return the architecture; refuse settings that would make another function."""
    path = folder / CONFIG
    architecture = cfg.get("architecture")
    if architecture not in ARCHITECTURES:
        close = listed(nearest(str(architecture), ARCHITECTURES))
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is not one that can be loaded; expected {close}. "
            f"(Configs of SAELens before version 6 have no `architecture` of these kinds: load and save "
            f"the SAE once with SAELens 6.)"
        )
    normalize = cfg.get("normalize_activations", "none")
    if normalize == "expected_average_only_in":
        raise CheckpointError(
            f"{path}: normalize_activations = 'expected_average_only_in' is not applied when SAELens runs, "
            f"so this SAE still waits for its scaling factor. Fold it with SAELens "
            f"(sae.fold_activation_norm_scaling_factor(factor)) and save it again."
        )
    if normalize not in NORMALIZATIONS:
        raise CheckpointError(
            f"{path}: normalize_activations {normalize!r} is not one that can be loaded; expected "
            f"{listed(NORMALIZATIONS)}."
        )
    for key in ("activation_fn", "activation_fn_str"):
        if cfg.get(key, "relu") != "relu" and architecture == "standard":
            raise CheckpointError(
                f"{path}: a standard SAE with {key} {cfg[key]!r} is not a ReLU SAE; load and save it once "
                f"with SAELens 6."
            )
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(cfg.get(key, True), bool):
            raise CheckpointError(f"{path}: {key} must be true or false; given {cfg[key]!r}.")
    k, width = cfg.get("k"), cfg.get("d_sae")
    if architecture == "topk" and not (type(k) is int and type(width) is int and 1 <= k <= width):
        raise CheckpointError(f"{path}: a topk SAE needs a whole number k from 1 to {width}; given {k!r}.")
    ids = cfg.get("metadata", {}).get("latent_ids")
    fine = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) and len(set(ids)) == width
    if ids is not None and not (fine and len(ids) == width):
        raise CheckpointError(f"{path}: metadata.latent_ids must be {width} different whole numbers from 0.")
    return architecture


def _tensors(folder: Path, cfg: dict[str, Any], architecture: str) -> dict[str, Tensor]:
    """Read the weights; refuse missing, extra, misshapen and non-finite ones."""
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error
    d, n = cfg.get("d_in"), cfg.get("d_sae")
    shapes = {"W_enc": (d, n), "W_dec": (n, d), "b_dec": (d,)}
    shapes |= {name: (n,) for name in _BIASES[architecture]}
    missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or extra:
        raise CheckpointError(
            f"{path}: a {architecture} SAE has the tensors {sorted(shapes)}; missing: {missing}; "
            f"extra: {extra}."
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}; {CONFIG} (d_in = {d}, "
                f"d_sae = {n}) makes it {shape}."
            )
        if tensors[name].dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise CheckpointError(
                f"{path}: {name} has dtype {tensors[name].dtype}; expected a float of 16, 32 or 64 bits."
            )
        if not torch.isfinite(tensors[name]).all():
            count = int((~torch.isfinite(tensors[name])).sum())
            raise CheckpointError(f"{path}: {name} has {count} values that are not finite.")
    return tensors


SAE_LENS = CheckpointFormat(
    name="sae_lens",
    description=f"{CONFIG} + {WEIGHTS}",
    recognises=recognises,
    site=site,
    read=read,
    check=check,
    write=write,
)
