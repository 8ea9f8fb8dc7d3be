"""`SparseAutoencoder`: a sparse dictionary wrapped round a TransformerLens hook point.

With input `x`, encoder rows `E`, decoder rows (directions) `D`, biases `b`, `b'`:

1. `x = wrapped_hook(x)`: user hooks of the site see the SAE's input.
2. latents `z = activation(E·(x̂ − b) + b')`, where `x̂` is `x` or its scaled form (`input_scaling`).
3. coefficients `c = z·scale`; the scale is 1 unless the SAE scales its input token by token.
4. Without error nodes the output is `Σ cᵢDᵢ + b` (scaling undone). With error nodes it is
   `x + (c′ − c)·D + (e′ − e)`, where `c` and the error `e = x − Σ cᵢDᵢ − b` come from the clean encode
   of the current input and the primes are what hooks return. Nothing hooked: `x` itself.

Memory: a contribution per latent, `[…, n_latents, n_inputs]`, exists only while something is attached
to `latent_outs`. Directions are stored row after row, so that `decode_weight` (their transpose) is a
view and reading single directions is cheap.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from auto_circuit.errors import InputError, SpliceError
from auto_circuit.model_utils.sparse_autoencoders.hook_attachment import is_attached, through
from auto_circuit.model_utils.sparse_autoencoders.input_scaling import InputScaling
from auto_circuit.model_utils.sparse_autoencoders.latent_activations import LatentActivation, ReLU
from auto_circuit.model_utils.sparse_autoencoders.latent_dictionary import LatentDictionary, times
from auto_circuit.model_utils.sparse_autoencoders.sae_state import sae_from_state_dict

#: What a HookPoint answers to; asked of the SAE in its place, passed on to the wrapped hook.
HOOK_POINT_NAMES = frozenset(
    "add_hook add_perma_hook has_hooks remove_hooks clear_context enable_reshape layer name ctx fwd_hooks "
    "bwd_hooks hook_conversion backward_scale pos_dim".split()
)


class SparseAutoencoder(LatentDictionary):
    """A sparse autoencoder at a hook point.

    Parameters `bias [n_inputs]`, `latent_bias [(seq,) n_latents]`,
    `encode_weight [(seq,) n_latents, n_inputs]`, `decode_weight [(seq,) n_inputs, n_latents]`;
    `state_dict()` has exactly these four keys for a ReLU SAE as published. Other activations add
    `activation.*`, scalings `scaling.*`, pruning `latent_ids`, and pruned TopK SAEs `selector_*`.

    Hooks: `latents` sees `[…, n_latents]`, `latent_outs` each latent's contribution
    `[…, n_latents, n_inputs]`, `error_out` the error `[…, n_inputs]` (only with error nodes).

    Args:
        wrapped_hook: the hook point that the SAE stands in for.
        n_latents: number of latents.
        n_inputs: width of the activation.
        activation: what makes latents of pre-activations; ReLU unless given.
        scaling: how each token is scaled before encoding; not at all unless given.

    Attributes:
        error_nodes: whether the error is added back (see the module's docstring).
        edit: None, or what computes the output from (input, output), both `[…, n_inputs]`; for the
            algorithms of this package, which patch many nodes at once without hooks.
        counting: whether `forward` adds the latents to `latent_total_act`.
        latent_ids: published index of each latent, `[n_latents]`, or `[seq, n_latents]` after
            pruning per position.
        latent_total_act: float32 sum of the latents seen, `[(batch,) (seq,) n_latents]`.
        metadata: what the checkpoint said of itself (model, site, …); free-form.
    """

    latent_total_act: Tensor

    def __init__(
        self,
        wrapped_hook: HookPoint,
        n_latents: int,
        n_inputs: int,
        *,
        activation: LatentActivation | None = None,
        scaling: InputScaling | None = None,
    ) -> None:
        super().__init__()
        self._set_up(wrapped_hook, activation or ReLU(), scaling)
        self.init_params(n_latents, n_inputs)

    def _set_up(
        self, wrapped_hook: HookPoint, activation: LatentActivation, scaling: InputScaling | None
    ) -> None:
        """Make everything but the parameters."""
        self.register_state_dict_post_hook(_contiguous_decoder)
        self.wrapped_hook = wrapped_hook
        self.latents = HookPoint()
        self.latent_outs = HookPoint()
        self.error_out = HookPoint()
        self.activation = activation
        self.scaling = scaling
        self.error_nodes = False
        self.counting = True
        self.spliced_at: str | None = None
        self.branch_only = False
        self.edit: Callable[[Tensor, Tensor], Tensor] | None = None
        self.n_calls = 0
        self._branch_change: Tensor | None = None
        self.metadata: dict[str, Any] = {}

    @classmethod
    def from_state_dict(
        cls, wrapped_hook: HookPoint, state_dict: Mapping[str, Tensor], *, assign: bool = False
    ) -> "SparseAutoencoder":
        """Build an SAE from `state_dict()` of another, in the dtype and on the device of its tensors.

        Args:
            wrapped_hook: the hook point that the SAE stands in for.
            state_dict: the four tensors of the class docstring, and what the kind of SAE adds.
            assign: keep these very tensors instead of copying them.

        Raises:
            CheckpointError: for missing, extra or misshapen tensors, naming each.
        """
        return sae_from_state_dict(cls, wrapped_hook, state_dict, assign)

    # ---- encoding and decoding ------------------------------------------------------------------

    def decode(self, z: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_inputs"]:
        """Sum the contributions of latents `z`, each through the hook `latent_outs`, and add `bias`.

        For an SAE that scales its input this is the reconstruction of the scaled input.
        """
        if not is_attached(self.latent_outs) and self.seq_len is None:
            return F.linear(z, self.decode_weight, self.bias)
        return self._hooked_write(z) + self.bias

    def _contributions(self, coefficients: Tensor) -> Tensor:
        return coefficients.unsqueeze(-1) * self.directions

    def _hooked_write(self, coefficients: Tensor) -> Tensor:
        if is_attached(self.latent_outs):
            return self.latent_outs(self._contributions(coefficients)).sum(-2)
        return self.write(coefficients)

    @property
    def where(self) -> str:
        """What errors call this SAE: by its place."""
        return f"The SAE at {self.spliced_at or getattr(self.wrapped_hook, 'name', None) or '?'}"

    # ---- forward --------------------------------------------------------------------------------

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Run the wrapped hook, then encode and decode (see the module's docstring).

        Args:
            x: `[… (seq,) n_inputs]`, or `[… (seq,) heads, d_head]` with heads·d_head = n_inputs.

        Returns:
            A tensor of the shape and dtype of `x`; `x` itself with error nodes and nothing hooked.
        """
        x = self.wrapped_hook(x)
        self.n_calls += 1
        self._branch_change = None
        flat = x
        if x.shape[-1] != self.n_inputs and x.ndim > 2 and x.shape[-2:].numel() == self.n_inputs:
            flat = x.flatten(-2)
        out = self._with_error(flat) if self.error_nodes else self._without_error(flat)
        if self.edit is not None:
            out = self.edit(flat, out)
        if out is flat:
            return x
        out = out.reshape(x.shape).contiguous()  # models call .view on what a hook point returns
        self._branch_change = out - x if self.branch_only else None
        return out

    def take_branch_change(self) -> Tensor | None:
        """Return, once, what the last forward changed (only where `branch_only`); None: nothing."""
        change, self._branch_change = self._branch_change, None
        return change

    def _without_error(self, x: Tensor) -> Tensor:
        scaled, scaling = self._scaled(x.to(self.bias.dtype))
        z = self._encode_scaled(scaled)
        self._count(z)
        if is_attached(self.latents):
            z = self.latents(z.clone())
        if scaling is None:
            return self.decode(z).to(x.dtype)
        out = self._hooked_write(times(z, scaling)) + self.bias * scaling.scale + scaling.shift
        return out.to(x.dtype)

    def _with_error(self, x: Tensor) -> Tensor:
        hooked = [is_attached(h) for h in (self.latents, self.latent_outs, self.error_out)]
        if not any(hooked):
            if self.counting:
                with torch.no_grad():
                    self._count(self.encode(x.to(self.bias.dtype)))
            elif x.shape[-1] != self.n_inputs:
                self._scaled(x)  # which says that the width is wrong
            return x
        own = x.to(self.bias.dtype)
        scaled, scaling = self._scaled(own)
        z = self._encode_scaled(scaled)
        self._count(z)
        coefs = times(z, scaling)
        delta = torch.zeros((), dtype=own.dtype, device=own.device)
        if hooked[0] or hooked[1]:
            changed, new_z = through(self.latents, z) if hooked[0] else (False, z)
            new_coefs = times(new_z, scaling) if changed else coefs
            if hooked[1]:
                contributions = self._contributions(coefs)
                new = self.latent_outs(self._contributions(new_coefs).clone())
                delta = delta + (new - contributions).sum(-2)
            elif changed:
                delta = delta + self.write(new_coefs - coefs)
        if hooked[2]:
            error = own - self.write(coefs) - self.constant_bias
            changed, new_error = through(self.error_out, error)
            if changed:
                delta = delta + (new_error - error)
        return x if delta.ndim == 0 else x + delta.to(x.dtype)

    # ---- counting -------------------------------------------------------------------------------

    def _count(self, z: Tensor) -> None:
        """Add detached latents to `latent_total_act`, summed to its shape, in float32."""
        if not self.counting:
            return
        by_batch, by_position = self._counted
        kept = {z.ndim - 1} | ({0} if by_batch else set()) | ({z.ndim - 2} if by_position else set())
        dims = [dim for dim in range(z.ndim) if dim not in kept]
        total = z.detach().sum(dims, dtype=torch.float32) if dims else z.detach()
        if total.shape != self.latent_total_act.shape:
            raise InputError(
                f"{self.where}: latents of shape {tuple(z.shape)} do not sum to latent_total_act "
                f"{tuple(self.latent_total_act.shape)}. Call reset_activated_latents(batch_len, "
                f"seq_len) with the sizes of your prompts, or set counting = False."
            )
        self.latent_total_act += total

    def reset_activated_latents(self, batch_len: int | None = None, seq_len: int | None = None) -> None:
        """Zero `latent_total_act`, with shape `[(batch_len,) (seq_len,) n_latents]`."""
        shape = [size for size in (batch_len, seq_len) if size is not None] + [self.n_latents]
        self._counted = (batch_len is not None, seq_len is not None)
        with torch.inference_mode(False):  # so that later runs outside of it can count too
            total = torch.zeros(shape, device=self.bias.device, dtype=torch.float32)
        self.register_buffer("latent_total_act", total, persistent=False)

    # ---- standing in for a hook point, and staying whole while spliced ---------------------------

    def __getattr__(self, name: str) -> Any:
        if name in HOOK_POINT_NAMES:
            return getattr(super().__getattr__("wrapped_hook"), name)
        return super().__getattr__(name)

    def _apply(self, *args: Any, **kwargs: Any) -> "SparseAutoencoder":
        self._refuse_while_spliced("moved or converted")
        super()._apply(*args, **kwargs)
        self.latent_total_act = self.latent_total_act.float()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._refuse_while_spliced("copied or pickled")
        return super().__reduce_ex__(protocol)

    def _refuse_while_spliced(self, what: str) -> None:
        if self.spliced_at is not None:
            raise SpliceError(
                f"{self.where} is part of a model now; a spliced model or SAE cannot be {what}. "
                f"Leave the `with` block (or call .unsplice()) first."
            )

    def extra_repr(self) -> str:
        """Say the sizes and what is special."""
        position = f", seq_len={self.seq_len}" if self.seq_len else ""
        return f"n_latents={self.n_latents}, n_inputs={self.n_inputs}{position}"


def _contiguous_decoder(_sae: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Give `decode_weight` out in its own layout, which safetensors needs; ours is row after row."""
    name = f"{prefix}decode_weight"
    if isinstance(state.get(name), Tensor):
        state[name] = state[name].contiguous()
