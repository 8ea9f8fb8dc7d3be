"""A dictionary of latents: its parameters, encoding, directions, and pruning.

What an SAE is by itself, wherever it stands. `SparseAutoencoder` puts it in the place of a hook point.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from auto_circuit.errors import InputError
from auto_circuit.model_utils.sparse_autoencoders.input_scaling import InputScaling, Scaled
from auto_circuit.model_utils.sparse_autoencoders.latent_activations import LatentActivation
from auto_circuit.model_utils.sparse_autoencoders.latent_index import checked_idxs, take_latents
from auto_circuit.model_utils.sparse_autoencoders.sae_state import SELECTOR


class LatentDictionary(nn.Module):
    """Latents with encoder rows, decoder rows (directions) and biases.

    Attributes:
        activation: what makes latents of pre-activations.
        scaling: how each token is scaled before encoding; None: not at all.
        latent_ids: published index of each latent, `[n_latents]`, or `[seq, n_latents]` after
            pruning per position.
    """

    activation: LatentActivation
    scaling: InputScaling | None
    latent_ids: Tensor
    selector_encode_weight: Tensor
    selector_latent_bias: Tensor
    selector_idxs: Tensor | None
    _counted: tuple[bool, bool]

    def reset_activated_latents(self, batch_len: int | None = None, seq_len: int | None = None) -> None:
        """Forget what was counted; called whenever the number of latents changes."""
        raise NotImplementedError

    @property
    def where(self) -> str:
        """What errors call this dictionary."""
        return "The SAE"

    # ---- parameters -----------------------------------------------------------------------------

    def init_params(self, n_latents: int, n_inputs: int, seq_len: int | None = None) -> None:
        """Draw Kaiming-uniform weights and zero biases.

        Args:
            n_latents: number of latents.
            n_inputs: width of the activation.
            seq_len: give the weights a leading sequence dimension, equal at every position.

        Raises:
            InputError: for sizes below 1, or another width than the activation's tensors have.
        """
        if n_latents < 1 or n_inputs < 1 or (seq_len is not None and seq_len < 1):
            raise InputError(
                f"SparseAutoencoder needs sizes of at least 1; given n_latents = {n_latents}, "
                f"n_inputs = {n_inputs}, seq_len = {seq_len}."
            )
        if self.activation.width not in (None, n_latents):
            raise InputError(
                f"The {self.activation.kind} activation is for {self.activation.width} latents; "
                f"given n_latents = {n_latents}."
            )
        encode = torch.empty(n_latents, n_inputs)
        decode = torch.empty(n_latents, n_inputs).T
        nn.init.kaiming_uniform_(encode)
        nn.init.kaiming_uniform_(decode)
        seq = [] if seq_len is None else [seq_len]
        self.bias = nn.Parameter(torch.zeros(n_inputs))
        self.latent_bias = nn.Parameter(torch.zeros(*seq, n_latents))
        self.encode_weight = nn.Parameter(encode.expand(*seq, *encode.shape).clone())
        self.decode_weight = nn.Parameter(decode.T.expand(*seq, *encode.shape).clone().mT)
        self.forget_pruning()
        self.reset_activated_latents()

    def forget_pruning(self) -> None:
        """Give latents the ids 0 … n_latents − 1, outside the state dict."""
        ids = torch.arange(self.n_latents, device=self.bias.device)
        self.register_buffer("latent_ids", ids, persistent=False)
        for name in SELECTOR:
            self.register_buffer(name, None)

    @property
    def n_latents(self) -> int:
        """Number of latents (per position, when weights differ by position)."""
        return self.encode_weight.shape[-2]

    @property
    def n_inputs(self) -> int:
        """Width of the activation."""
        return self.bias.shape[-1]

    @property
    def seq_len(self) -> int | None:
        """Number of positions when weights differ by position, else None."""
        return self.encode_weight.shape[0] if self.encode_weight.ndim == 3 else None

    @property
    def directions(self) -> Float[Tensor, "*seq n_latents n_inputs"]:
        """The decoder's rows: what a coefficient of 1 writes. A view of `decode_weight`."""
        return self.decode_weight.mT

    @property
    def constant_bias(self) -> Float[Tensor, " n_inputs"]:
        """What the SAE writes at every token whatever it reads; zero when it scales its input."""
        return torch.zeros_like(self.bias) if self.scaling is not None else self.bias

    # ---- encoding, and what latents write ---------------------------------------------------------

    def encode(self, x: Float[Tensor, "*batch n_inputs"]) -> Float[Tensor, "*batch n_latents"]:
        """Return the latents of `x [… (seq,) n_inputs]`, in published units.

        Raises:
            InputError: when the width, or the length for weights by position, does not fit.
        """
        return self._encode_scaled(self._scaled(x)[0])

    def coefficients(self, x: Float[Tensor, "*batch n_inputs"]) -> Float[Tensor, "*batch n_latents"]:
        """Return the coefficients of `x`: `Σ coefficient·direction + constant_bias + error = x`."""
        scaled, scaling = self._scaled(x)
        return times(self._encode_scaled(scaled), scaling)

    def write(self, coefficients: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch d"]:
        """Return `Σ coefficient·direction`, without hooks and without bias."""
        return self._contract(coefficients, self.decode_weight)

    def read(self, gradient: Float[Tensor, "*batch n_inputs"]) -> Float[Tensor, "*batch n_latents"]:
        """Return `⟨gradient, direction⟩` for every latent: the transpose of `write`."""
        return self._contract(gradient, self.directions)

    def _scaled(self, x: Tensor) -> tuple[Tensor, Scaled | None]:
        if x.shape[-1] != self.n_inputs:
            raise InputError(
                f"{self.where} reads activations of width {self.n_inputs}; given {tuple(x.shape)}."
            )
        if self.scaling is None:
            return x, None
        scaled = self.scaling(x)
        return scaled.x, scaled

    def _encode_scaled(self, x: Tensor) -> Tensor:
        if self.selector_idxs is None:
            pre = self._contract(x - self.bias, self.encode_weight, self.latent_bias)
            return self.activation(pre)
        # TopK latents compete with those that were pruned: select among all, then keep ours.
        pre = self._contract(x - self.bias, self.selector_encode_weight, self.selector_latent_bias)
        all_latents = self.activation(pre)
        idxs = self.selector_idxs
        if idxs.ndim == 1:
            return all_latents[..., idxs]
        self._check_length(x, len(idxs))
        return all_latents.gather(-1, idxs.expand(*all_latents.shape[:-1], -1))

    def _contract(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Contract the last dimension of `x` with that of `weight [(seq,) out, in]`, and add."""
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        self._check_length(x, len(weight))
        out = torch.einsum("...si,soi->...so", x, weight)
        return out if bias is None else out + bias

    def _check_length(self, x: Tensor, expected: int) -> None:
        given = x.shape[-2] if x.ndim > 1 else None
        if given != expected:
            raise InputError(
                f"{self.where} has weights for each of {expected} positions; the input has "
                f"{given} (shape {tuple(x.shape)}). Give prompts of {expected} tokens, or prune "
                f"with idxs of shape [k], which is the same at every position."
            )

    # ---- pruning --------------------------------------------------------------------------------

    def prune_latents(self, idxs: Tensor) -> None:
        """Keep only the latents `idxs`, in that order; `latent_ids` keeps their published ids.

        Exact for every kind of SAE: a pruned TopK keeps its full encoder as `selector_*` and selects
        among all latents. With error nodes, what pruned latents wrote moves into the error.

        Args:
            idxs: current indices `[k]`, or `[seq, k]` for other latents at each position.

        Raises:
            InputError: for indices out of range, repeated, not whole numbers, or for another number
                of positions than the weights have.
        """
        idxs = checked_idxs(torch.as_tensor(idxs), self.n_latents, self.seq_len, self.where)
        idxs = idxs.to(self.bias.device)
        ids = take_latents(self.latent_ids, idxs, self.latent_ids.ndim == 2)
        with torch.no_grad():
            self._keep(idxs)
        self.register_buffer("latent_ids", ids, persistent=True)
        self.reset_activated_latents(seq_len=self.seq_len)

    def _keep(self, idxs: Tensor) -> None:
        """Replace the parameters by those of the latents `idxs`."""
        per_position = self.seq_len is not None
        if self.activation.competes:
            self._keep_selector(idxs)
        else:
            self.activation = self.activation.pruned(idxs)
        for name in ("latent_bias", "encode_weight", "decode_weight"):
            old = getattr(self, name)
            rows = old.mT if name == "decode_weight" else old
            kept = take_latents(rows, idxs, per_position)
            kept = kept.mT if name == "decode_weight" else kept
            setattr(self, name, nn.Parameter(kept, requires_grad=old.requires_grad))

    def _keep_selector(self, idxs: Tensor) -> None:
        if self.selector_idxs is None:
            self.register_buffer("selector_encode_weight", self.encode_weight.detach())
            self.register_buffer("selector_latent_bias", self.latent_bias.detach())
            self.register_buffer("selector_idxs", idxs)
        else:
            old = self.selector_idxs
            self.register_buffer("selector_idxs", take_latents(old, idxs, old.ndim == 2))

    def snapshot(self) -> dict[str, Any]:
        """Return what pruning changes, for `restore`; tensors are shared, not copied."""
        return {
            "_parameters": dict(self._parameters),
            "_buffers": dict(self._buffers),
            "_modules": dict(self._modules),
            "_non_persistent_buffers_set": set(self._non_persistent_buffers_set),
            "_counted": self._counted,
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Be as when the snapshot was taken."""
        self.__dict__.update({key: copy(value) for key, value in snapshot.items()})


def times(z: Tensor, scaling: Scaled | None) -> Tensor:
    """Return the coefficients of latents `z`: times the scale, where tokens are scaled."""
    return z if scaling is None else z * scaling.scale
