"""Indices into latents: picking some of them, and checking what a user gave."""

import torch
from jaxtyping import Int
from torch import Tensor

from auto_circuit.errors import InputError


def take_latents(tensor: Tensor, idxs: Int[Tensor, "*seq k"], per_position: bool) -> Tensor:
    """Pick latents of `tensor [(seq,) n_latents, …]` by `idxs [k]` or `[seq, k]`.

    Args:
        tensor: has a leading sequence dimension exactly when `per_position`.
        idxs: the same latents at every position `[k]`, or each position's own `[seq, k]`.
        per_position: whether `tensor` has a sequence dimension.

    Returns:
        `[k, …]` when neither has a sequence dimension, else `[seq, k, …]`.
    """
    if not per_position:
        return tensor[idxs]
    if idxs.ndim == 1:
        return tensor[:, idxs]
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], idxs]


def checked_idxs(idxs: Tensor, n_latents: int, seq_len: int | None, where: str) -> Tensor:
    """Return `idxs` as int64 when they name latents, each once (per position).

    Args:
        idxs: `[k]` or `[seq, k]`.
        n_latents: how many latents there are.
        seq_len: how many positions have weights of their own; None when they share them.
        where: the SAE, for the message.

    Raises:
        InputError: for another dtype or shape, indices out of range, or repeats.
    """
    if idxs.is_floating_point() or idxs.dtype == torch.bool or idxs.ndim not in (1, 2):
        raise InputError(
            f"prune_latents takes whole numbers of shape [k] or [seq, k]; given {idxs.dtype} "
            f"of shape {tuple(idxs.shape)}. From a mask, use mask.nonzero().squeeze(-1)."
        )
    if idxs.ndim == 2 and seq_len not in (None, len(idxs)):
        raise InputError(
            f"{where} has weights for {seq_len} positions; idxs of shape {tuple(idxs.shape)} "
            f"are for {len(idxs)}."
        )
    idxs = idxs.long()
    out_of_range = idxs[(idxs < 0) | (idxs >= n_latents)]
    if out_of_range.numel():
        raise InputError(
            f"{where} has latents 0 to {n_latents - 1}; idxs has {out_of_range[:5].tolist()}. "
            f"Indices are into the latents it has now, not published ids (see latent_ids)."
        )
    ordered = idxs.sort(-1).values
    repeats = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
    if repeats.numel():
        raise InputError(
            f"idxs has repeats, for example {repeats.unique()[:5].tolist()}; each latent can be "
            f"kept once (per position)."
        )
    return idxs
