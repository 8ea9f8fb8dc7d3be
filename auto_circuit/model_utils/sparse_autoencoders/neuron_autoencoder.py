"""MLP neurons as latents of an identity dictionary: nothing to train, and no error.

The baseline that people compare SAEs with. Every neuron at `mlp.hook_post` is a latent whose id is the
neuron's index, and whose coefficient (positive or negative) is its activation. No identity matrix is
stored: encoding and writing are indexing.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from auto_circuit.errors import InputError
from auto_circuit.model_utils.hooked_model import hooked_model, parse_layers
from auto_circuit.model_utils.sparse_autoencoders.latent_activations import LatentActivation
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder


class _Itself(LatentActivation):
    """A latent is its pre-activation."""

    kind = "neuron"

    def forward(self, pre: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return pre


class NeuronAutoencoder(SparseAutoencoder):
    """An identity dictionary: latent i is input i. Zero error until latents are pruned.

    Args:
        wrapped_hook: the hook point that it stands in for.
        n_inputs: number of neurons.
    """

    def __init__(self, wrapped_hook: HookPoint, n_inputs: int) -> None:
        nn.Module.__init__(self)
        self._set_up(wrapped_hook, _Itself(), None)
        self.bias = nn.Parameter(torch.zeros(n_inputs), requires_grad=False)
        self.register_buffer("latent_ids", torch.arange(n_inputs), persistent=False)
        self.register_buffer("selector_idxs", None)
        self.reset_activated_latents()

    @property
    def n_latents(self) -> int:
        """Number of neurons kept (per position, after pruning per position)."""
        return self.latent_ids.shape[-1]

    @property
    def seq_len(self) -> int | None:
        """Number of positions when neurons were pruned per position, else None."""
        return self.latent_ids.shape[0] if self.latent_ids.ndim == 2 else None

    @property
    def directions(self) -> Float[Tensor, "*seq n_latents n_inputs"]:
        """One-hot rows, made for this call."""
        return nn.functional.one_hot(self.latent_ids, self.n_inputs).to(self.bias.dtype)

    @property
    def _is_whole(self) -> bool:
        return self.n_latents == self.n_inputs and not self._is_pruned

    @property
    def _is_pruned(self) -> bool:
        return "latent_ids" not in self._non_persistent_buffers_set

    def _encode_scaled(self, x: Tensor) -> Tensor:
        return x.clone() if self._is_whole else self.read(x)

    def decode(self, z: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_inputs"]:
        """Put the neurons back in their places, each through the hook `latent_outs`."""
        return self._hooked_write(z)

    def write(self, coefficients: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch d"]:
        """Put the neurons back in their places; those pruned are 0."""
        if self._is_whole:
            return coefficients
        out = coefficients.new_zeros(*coefficients.shape[:-1], self.n_inputs)
        return out.scatter(-1, self._index(coefficients), coefficients)

    def read(self, gradient: Float[Tensor, "*batch n_inputs"]) -> Float[Tensor, "*batch n_latents"]:
        """Pick the neurons kept."""
        return gradient if self._is_whole else gradient.gather(-1, self._index(gradient))

    def _index(self, like: Tensor) -> Tensor:
        if self.seq_len is not None:
            self._check_length(like, self.seq_len)
        return self.latent_ids.expand(*like.shape[:-1], -1)

    def _keep(self, idxs: Tensor) -> None:
        """Nothing but `latent_ids`, which the caller sets."""


def neuron_saes(model: Any, layers: Iterable[int] | None = None) -> dict[str, SparseAutoencoder]:
    """Make every MLP neuron of some layers a latent, for `sae_model`.

    Args:
        model: a TransformerLens model.
        layers: which layers; None: all.

    Returns:
        Site (`blocks.{layer}.mlp.hook_post`) → identity dictionary, on the model's device, in float32 or
        wider.

    Raises:
        InputError: for a layer that does not exist or has no such site.
    """
    hooked = hooked_model(model)
    wanted = parse_layers(model, layers)
    sites = {site.layer: site for site in hooked.sites() if site.kind == "mlp.hook_post"}
    without = [layer for layer in wanted if layer not in sites]
    if without:
        raise InputError(f"Layers {without} of this model have no mlp.hook_post; layers that do: {[*sites]}.")
    like = next(hooked.model.parameters())
    saes: dict[str, SparseAutoencoder] = {}
    for layer in wanted:
        sae = NeuronAutoencoder(HookPoint(), sites[layer].width)
        # Half precision would round sums over latents; a neuron's value itself is exact in float32.
        dtype = torch.promote_types(like.dtype, torch.float32)
        saes[sites[layer].name] = sae.to(device=like.device, dtype=dtype)
    return saes
