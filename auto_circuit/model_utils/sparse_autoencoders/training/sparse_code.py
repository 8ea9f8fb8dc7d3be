"""Which latents take part in a batch, and encoding and decoding with those alone.

A training step of a sparse autoencoder needs one dense product: every latent's pre-activation, which says
who takes part. Everything after it concerns the entries that do. With `nnz` entries in a batch of `B` rows,
decoding, the gradient of the entries, and the gradients of encoder and decoder take `2·nnz·n_inputs` FLOPs
each, instead of `2·B·n_latents·n_inputs`.

Two classes with the same methods: `SomeLatents` holds entries row by row (compressed sparse rows),
`AllLatents` is the dense batch, faster where a good part of the entries takes part. Values are `[nnz]` or
`[B, n_latents]`; nothing else differs for who uses them.

The gradients are exact for a fixed set of entries (the set itself has no gradient):

- decode `y_b = Σ v_e·D_{l(e)}`:  `∂v_e = ⟨∂y_{b(e)}, D_{l(e)}⟩`, `∂D_l = Σ_{e of l} v_e·∂y_{b(e)}`.
- encode `p_e = ⟨x_{b(e)}, E_{l(e)}⟩ + c_{l(e)}`: `∂E_l = Σ_{e of l} ∂p_e·x_{b(e)}`, `∂c_l = Σ ∂p_e`,
  `∂x_b = Σ_{e of b} ∂p_e·E_{l(e)}`.

All of these are weighted sums of rows, which `embedding_bag` computes without a copy of the rows.
"""

import warnings
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

#: From this share of active entries on, dense products are faster (measured at 576 × 2,048 on two cores).
DENSE_FROM = 0.15


def pre_activations(
    x: Float[Tensor, "batch d"], encode: Float[Tensor, "n d"], bias: Float[Tensor, " n"]
) -> Float[Tensor, "batch n"]:
    """Return `x·Eᵀ + c` outside of the autograd graph: only for choosing who takes part."""
    with torch.no_grad():
        return F.linear(x, encode, bias)


class SomeLatents:
    """The entries (row, latent) of a batch that take part, row by row.

    Args:
        rows: each entry's row, ascending, `[nnz]`.
        latents: each entry's latent, `[nnz]`.
        shape: (number of rows, number of latents).
    """

    def __init__(
        self, rows: Int[Tensor, " nnz"], latents: Int[Tensor, " nnz"], shape: tuple[int, int]
    ) -> None:
        self.rows, self.latents, self.shape = rows, latents, shape
        self.starts = _starts(rows, shape[0])

    @classmethod
    def where(cls, mask: Bool[Tensor, "batch n"]) -> "SomeLatents":
        """Return the entries at which `mask` is true."""
        rows, latents = mask.nonzero(as_tuple=True)
        return cls(rows, latents, (mask.shape[0], mask.shape[1]))

    @classmethod
    def each_row(cls, latents: Int[Tensor, "batch k"], n_latents: int) -> "SomeLatents":
        """Return `k` entries for each row."""
        n_rows, k = latents.shape
        rows = torch.arange(n_rows, device=latents.device).repeat_interleave(k)
        return cls(rows, latents.flatten(), (n_rows, n_latents))

    @property
    def n_entries(self) -> int:
        """Number of entries."""
        return len(self.rows)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries latent by latent: their order, their rows, and where each latent's begin."""
        order = self.latents.argsort(stable=True)
        return order, self.rows[order], _starts(self.latents, self.shape[1])

    def part(self, low: int, high: int) -> tuple["SomeLatents", Tensor]:
        """Return the entries of latents `low` to `high − 1`, and which entries they are."""
        chosen = ((self.latents >= low) & (self.latents < high)).nonzero().flatten()
        return SomeLatents(self.rows[chosen], self.latents[chosen], self.shape), chosen

    def take(self, of_latents: Float[Tensor, " n"]) -> Float[Tensor, " nnz"]:
        """Return a number of each latent for each entry."""
        return of_latents.index_select(0, self.latents)

    def encode(self, x: Tensor, encode: Tensor, bias: Tensor, pre: Tensor | None = None) -> Tensor:
        """Return the entries' pre-activations, `[nnz]`.

        Args:
            x: `[batch, n_inputs]`.
            encode: encoder rows, `[n_latents, n_inputs]`.
            bias: of the latents, `[n_latents]`.
            pre: all pre-activations where they are known, `[batch, n_latents]`.
        """
        return _Encode.apply(x, encode, bias, pre, self)

    def decode(self, values: Tensor, directions: Tensor) -> Tensor:
        """Return `Σ value·direction` of each row, `[batch, n_inputs]`, directions `[n_latents, n_inputs]`."""
        return _Decode.apply(values, directions, self)

    def fired(self, values: Float[Tensor, " nnz"]) -> Bool[Tensor, " n"]:
        """Return which latents have a value above 0 anywhere."""
        found = torch.zeros(self.shape[1], dtype=torch.bool, device=values.device)
        found[self.latents[values > 0]] = True
        return found

    def weighted_rows(self, weights: Tensor, source: Tensor) -> Tensor:
        """Return `Σ weight·source[latent]` of each row's entries."""
        return F.embedding_bag(self.latents, source, self.starts[:-1], per_sample_weights=weights, mode="sum")

    def weighted_latents(self, weights: Tensor, source: Tensor) -> Tensor:
        """Return `Σ weight·source[row]` of each latent's entries."""
        order, rows, starts = self.by_latent
        return F.embedding_bag(rows, source, starts[:-1], per_sample_weights=weights[order], mode="sum")

    def sum_by_latent(self, values: Tensor) -> Tensor:
        """Return the sum of each latent's entries, `[n_latents]`."""
        return torch.zeros(self.shape[1], dtype=values.dtype, device=values.device).index_add_(
            0, self.latents, values
        )

    def products(self, by_row: Tensor, by_latent: Tensor) -> Tensor:
        """Return `⟨by_row[row], by_latent[latent]⟩` of every entry, `[nnz]`."""
        zeros = by_row.new_zeros(self.n_entries)
        with warnings.catch_warnings():  # that sparse tensors are in beta
            warnings.simplefilter("ignore", UserWarning)
            entries = torch.sparse_csr_tensor(
                self.starts, self.latents, zeros, self.shape, check_invariants=False
            )
        return torch.sparse.sampled_addmm(entries, by_row, by_latent.T, beta=0.0).values()


class AllLatents:
    """Every entry of a batch takes part: the dense counterpart of `SomeLatents`."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    @property
    def n_entries(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1]

    def take(self, of_latents: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return a number of each latent, to be broadcast over rows."""
        return of_latents

    def encode(self, x: Tensor, encode: Tensor, bias: Tensor, pre: Tensor | None = None) -> Tensor:
        """Return the pre-activations, `[batch, n_latents]`."""
        return _DenseEncode.apply(x, encode, bias, pre) if pre is not None else F.linear(x, encode, bias)

    def decode(self, values: Tensor, directions: Tensor) -> Tensor:
        """Return `Σ value·direction` of each row, `[batch, n_inputs]`."""
        return values @ directions

    def fired(self, values: Float[Tensor, "batch n"]) -> Bool[Tensor, " n"]:
        """Return which latents have a value above 0 anywhere."""
        return (values > 0).any(0)


Latents = SomeLatents | AllLatents


def where(mask: Bool[Tensor, "batch n"]) -> Latents:
    """Return the entries at which `mask` is true; all of them where that is faster."""
    found = SomeLatents.where(mask)
    return AllLatents(found.shape) if found.n_entries > DENSE_FROM * mask.numel() else found


def _starts(sorted_or_not: Tensor, n: int) -> Tensor:
    """Return where the entries of each of `n` numbers begin once sorted, `[n + 1]`."""
    counts = torch.bincount(sorted_or_not, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class _Encode(torch.autograd.Function):
    """Pre-activations of some entries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encode: Tensor, bias: Tensor, pre: Any, code: SomeLatents) -> Tensor:
        ctx.save_for_backward(x, encode)
        ctx.code = code
        if pre is None:
            return code.products(x, encode) + bias.index_select(0, code.latents)
        return pre[code.rows, code.latents]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, encode = ctx.saved_tensors
        code: SomeLatents = ctx.code
        of_x = code.weighted_rows(grad, encode) if ctx.needs_input_grad[0] else None
        return of_x, code.weighted_latents(grad, x), code.sum_by_latent(grad), None, None


class _DenseEncode(torch.autograd.Function):
    """Pre-activations that are known already, with the gradients of the product that made them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encode: Tensor, bias: Tensor, pre: Tensor) -> Tensor:
        del bias
        ctx.save_for_backward(x, encode)
        return pre.view_as(pre)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, encode = ctx.saved_tensors
        return (grad @ encode if ctx.needs_input_grad[0] else None), grad.T @ x, grad.sum(0), None


class _Decode(torch.autograd.Function):
    """Sums of directions weighted by values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, directions: Tensor, code: SomeLatents) -> Tensor:
        ctx.save_for_backward(values, directions)
        ctx.code = code
        return code.weighted_rows(values, directions)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        values, directions = ctx.saved_tensors
        code: SomeLatents = ctx.code
        of_values = code.products(grad, directions) if ctx.needs_input_grad[0] else None
        of_directions = code.weighted_latents(values, grad) if ctx.needs_input_grad[1] else None
        return of_values, of_directions, None
