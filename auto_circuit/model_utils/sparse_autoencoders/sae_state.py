"""From a state dict to an SAE: which kind it is, and whether every tensor is there and fits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from auto_circuit.errors import CheckpointError
from auto_circuit.model_utils.sparse_autoencoders.input_scaling import scaling_from_tensors
from auto_circuit.model_utils.sparse_autoencoders.latent_activations import activation_from_tensors

PARAMETERS = ("bias", "latent_bias", "encode_weight", "decode_weight")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SELECTOR = ("selector_encode_weight", "selector_latent_bias", "selector_idxs")


def sae_from_state_dict(
    cls: Any,
    wrapped_hook: HookPoint,
    state_dict: Mapping[str, Tensor],
    assign: bool,
) -> Any:
    """Build an SAE of class `cls` (see `SparseAutoencoder.from_state_dict`)."""
    state = dict(state_dict)
    missing = [name for name in PARAMETERS if name not in state]
    if missing:
        raise CheckpointError(
            f"An SAE's state dict needs {list(PARAMETERS)}; missing: {missing}; given: {sorted(state)}."
        )
    shape = state["encode_weight"].shape
    if len(shape) not in (2, 3) or 0 in (shape[0], shape[-1]) and shape[-2] != 0:
        raise CheckpointError(f"encode_weight must be [(seq,) n_latents, n_inputs]; given {tuple(shape)}.")
    dtypes = {str(state[name].dtype) for name in PARAMETERS}
    if len(dtypes) > 1 or not all(state[name].dtype in _DTYPES for name in PARAMETERS):
        raise CheckpointError(
            f"An SAE's tensors must share one floating-point dtype of {[str(d) for d in _DTYPES]}; given "
            f"{sorted(dtypes)}. Convert them first."
        )
    _check_shapes(state)
    with torch.device("meta"):
        sae = cls(wrapped_hook, max(shape[-2], 1), shape[-1])
    sae.activation = activation_from_tensors(_part(state, "activation."))
    sae.scaling = scaling_from_tensors(_part(state, "scaling."))
    for name in PARAMETERS:
        kept = state[name] if assign else _copy_of(name, state[name])
        setattr(sae, name, nn.Parameter(kept.detach()))
    sae.forget_pruning()
    for name in ("latent_ids", *SELECTOR):
        if name in state:
            sae.register_buffer(name, state[name] if assign else state[name].clone())
    known = set(sae.state_dict())
    if set(state) != known:
        raise CheckpointError(
            f"Tensors that no {sae.activation.kind} SAE has: {sorted(set(state) - known)}; "
            f"missing: {sorted(known - set(state))}. Expected exactly {sorted(known)}."
        )
    sae.reset_activated_latents(seq_len=sae.seq_len)
    return sae


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.detach().clone()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def _copy_of(name: str, tensor: Tensor) -> Tensor:
    """Copy a parameter; the decoder so that its directions lie row after row."""
    if name == "decode_weight":
        return tensor.mT.clone(memory_format=torch.contiguous_format).mT
    return tensor.clone()


def _check_shapes(state: Mapping[str, Tensor]) -> None:
    """Check the shape of every tensor of an SAE's state dict against `encode_weight`."""
    *seq, n_latents, n_inputs = state["encode_weight"].shape
    expected: dict[str, list[int]] = {
        "bias": [n_inputs],
        "latent_bias": [*seq, n_latents],
        "decode_weight": [*seq, n_inputs, n_latents],
    }
    for name, tensor in state.items():
        if name.startswith("activation.") and name != "activation.k":
            expected[name] = [*(seq if tensor.ndim == 2 else []), n_latents]
        if name in ("latent_ids", "selector_idxs"):
            expected[name] = [*(seq if tensor.ndim == 2 else []), n_latents]
    present = [name for name in SELECTOR if name in state]
    if present and len(present) < len(SELECTOR):
        raise CheckpointError(f"A pruned TopK SAE needs all of {SELECTOR}; given only {present}.")
    if present:
        *full_seq, full, _ = state["selector_encode_weight"].shape
        expected["selector_encode_weight"] = [*full_seq, full, n_inputs]
        expected["selector_latent_bias"] = [*full_seq, full]
        if n_latents and not 0 <= int(state["selector_idxs"].max()) < full:
            raise CheckpointError(
                f"selector_idxs reach {int(state['selector_idxs'].max())}; the selector has "
                f"latents 0 to {full - 1}."
            )
    wrong = {
        name: f"{list(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if list(state[name].shape) != shape
    }
    if wrong:
        raise CheckpointError(
            f"Misshapen tensors for an SAE of {n_latents} latents and {n_inputs} inputs: {wrong}."
        )
