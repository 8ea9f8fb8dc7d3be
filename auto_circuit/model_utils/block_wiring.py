"""How the blocks of a model read and write the residual stream, as plain linear algebra.

Every block reads the stream twice (attention, MLP) through a norm, and writes to it twice. With `x` the
stream and `x_c` the stream as the norm centres it, the norm gives `y = r·w ⊙ x_c + b`, where `r` is one
number for each token; a head's query is `y W_Q + b_Q` (before q/k norms and rotary embedding), and a head
writes `z W_O`. A post-norm (Gemma 2 and 3) scales what the component writes: `z W_O ⊙ w·r`, with its own
run's `r`.

Nothing here is taken on trust: `check_blocks` runs a few tokens through the model and compares every
read and write with what these formulas say, so that an architecture that works otherwise is refused by
name instead of being patched wrongly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auto_circuit.errors import InputError, listed
from auto_circuit.model_utils.hooked_model import HookedModel


@dataclass(frozen=True)
class Norm:
    """A norm `y = r·w ⊙ x_c + b`, or nothing at all (`call` is None).

    Attributes:
        call: computes it, without the model's hooks.
        weight, bias: `w, b [d_model]`.
        centred: whether `x_c = x − mean(x)` rather than `x`.
        module: stands in the model, where it is called.
    """

    call: Callable[[Tensor], Tensor] | None
    weight: Tensor | None
    bias: Tensor | None
    centred: bool
    module: nn.Module | None

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise `x [..., d_model]`."""
        return x if self.call is None else self.call(x)

    def centre(self, x: Tensor) -> Tensor:
        """Return `x_c`."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `r [..., 1]` of a token that came in as `x` and went out as `y`."""
        if self.weight is None or self.bias is None:
            return torch.ones_like(x[..., :1])
        basis = self.centre(x) * self.weight
        return ((y - self.bias) * basis).sum(-1, keepdim=True) / (basis * basis).sum(-1, keepdim=True).clamp(
            min=torch.finfo(torch.float32).tiny
        )


@dataclass(frozen=True)
class Projection:
    """Queries, keys or values of a layer.

    Attributes:
        weight: `[heads, d_model, d_head]`; key/value heads under GQA.
        bias: `[heads, d_head]`.
        hook: the hook point that carries the result `[batch, seq, heads, d_head]`.
    """

    weight: Tensor
    bias: Tensor
    hook: nn.Module

    def __call__(self, y: Tensor, heads: Tensor) -> Tensor:
        """Project `y [heads, batch, seq, d_model]`, one input for each head of `heads`."""
        out = torch.einsum("hbsd,hde->bshe", y, self.weight[heads].to(y.dtype))
        return out + self.bias[heads].to(y.dtype)


@dataclass(frozen=True)
class Writer:
    """What a layer's attention or MLP writes to the stream.

    Attributes:
        out: the hook point that carries what is written (after a post-norm), `[batch, seq, d_model]`.
        inner: the hook point before the output projection, `[batch, seq, n_inner]`.
        weight: the output projection with the post-norm's weight, `[n_inner, d_model]`; None where the
            component is not of that form (a mixture of experts, say).
        constant: what is written whatever is read, `[d_model]`: output biases.
        post: the post-norm; without `module` where there is none.
    """

    out: nn.Module
    inner: nn.Module | None
    weight: Tensor | None
    constant: Tensor
    post: Norm


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        layer: its index.
        parallel: whether attention and MLP read the same stream.
        stream: the hook point at its start, `[batch, seq, d_model]`.
        attn_norm, mlp_norm: what attention and MLP read through.
        q, k, v: projections.
        attn: what attention writes.
        mlp: what the MLP writes; None without one.
        mlp_reader: the module whose input is the stream that the MLP reads (its norm, or itself).
        mlp_reads_stream: whether that module's input is the stream; else it is the norm's output.
    """

    layer: int
    parallel: bool
    stream: nn.Module
    attn_norm: Norm
    mlp_norm: Norm
    q: Projection
    k: Projection
    v: Projection
    attn: Writer
    mlp: Writer | None
    mlp_reader: nn.Module | None
    mlp_reads_stream: bool

    @property
    def n_heads(self) -> int:
        """Number of (query) heads."""
        return self.q.weight.shape[0]


def read_blocks(hooked: HookedModel) -> list[Block]:
    """Read every block's wiring, unchecked.

    Raises:
        InputError: naming the block and the part that is of another form than this package knows.
    """
    return [_read_block(hooked, layer) for layer in range(hooked.n_layers)]


def _read_block(hooked: HookedModel, layer: int) -> Block:
    model, hooks = hooked.model, hooked.hook_points()
    name = f"blocks.{layer}"
    d_head, n_heads = model.cfg.d_head, model.cfg.n_heads
    no_norm = Norm(None, None, None, False, None)
    attn_norm = _norm(hooked, layer, "ln1") or no_norm
    own = _norm(hooked, layer, "ln2")
    projections: dict[str, Projection] = {}
    for part in ("q", "k", "v"):
        linear = hooked.linear(layer, f"attn.{part}")
        width = 0 if linear is None else linear[0].shape[1]
        hook = hooks.get(f"{name}.attn.hook_{part}")
        fits = width == n_heads * d_head if part == "q" else width > 0 and width % d_head == 0
        if linear is None or hook is None or not fits:
            raise _unknown(
                hooked,
                f"{name}.attn has no {part} projection to {n_heads} heads of {d_head} ({part}: "
                f"{width or 'no'} outputs; gated or latent attention, perhaps)",
            )
        weight = linear[0].unflatten(1, (-1, d_head)).permute(1, 0, 2)
        bias = linear[1] if linear[1] is not None else weight.new_zeros(width)
        projections[part] = Projection(weight.detach(), bias.detach().unflatten(0, (-1, d_head)), hook)
    mlp = getattr(hooked.block(layer), "mlp", None)
    parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
    reads_stream = own is not None or attn_norm.call is None
    if mlp is not None and not reads_stream and not parallel:
        raise _unknown(hooked, f"{name}.mlp has no norm of its own (ln2)")
    return Block(
        layer=layer,
        parallel=parallel,
        stream=hooks[f"{name}.hook_resid_pre"],
        attn_norm=attn_norm,
        mlp_norm=own or attn_norm,
        **projections,
        attn=_writer(hooked, layer, "attn", hooks),
        mlp=None if mlp is None else _writer(hooked, layer, "mlp", hooks),
        mlp_reader=None if mlp is None else (own.module if own is not None else mlp),
        mlp_reads_stream=reads_stream,
    )


def _writer(hooked: HookedModel, layer: int, component: str, hooks: dict[str, Any]) -> Writer:
    name = f"blocks.{layer}"
    is_attn = component == "attn"
    post = _norm(hooked, layer, "ln1_post" if is_attn else "ln2_post") or Norm(None, None, None, False, None)
    linear = hooked.linear(layer, "attn.o" if is_attn else "mlp.out")
    inner = hooks.get(f"{name}.attn.hook_z" if is_attn else f"{name}.mlp.hook_post")
    if is_attn and (linear is None or inner is None):
        raise _unknown(hooked, f"{name}.attn has no output projection of heads")
    bias = None if linear is None else linear[1]
    weight = None if linear is None else linear[0].detach()
    d_model = hooked.model.cfg.d_model
    parameter = next(hooked.model.parameters())
    constant = parameter.new_zeros(d_model) if bias is None else bias.detach()
    if post.weight is not None and post.bias is not None:
        if post.centred or bool(constant.any()):
            raise _unknown(hooked, f"{name}.{component} has a post-norm that centres, or one after a bias")
        weight = None if weight is None else weight * post.weight
        constant = post.bias
    return Writer(hooks[f"{name}.hook_{component}_out"], inner, weight, constant, post)


@torch.no_grad()
def _norm(hooked: HookedModel, layer: int, name: str) -> Norm | None:
    """Read a norm's weight, bias and kind from what it does, whatever its class."""
    found = hooked.norm(layer, name)
    if found is None:
        return None
    module, call = found
    parameter = next(hooked.model.parameters())
    # Away from zero and of mean zero: one token tells the weight of a centring norm and of the others.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, hooked.model.cfg.d_model, generator=generator)
    probe = probe + probe.sign()
    probe = (probe - probe.mean(-1, keepdim=True)).to(parameter)
    bias = call(torch.zeros_like(probe[:1]))[0]
    flat = (call(torch.ones_like(probe[:1]) * 3)[0] - bias).abs().max()
    centred = bool(flat <= 1e-3 * (call(probe) - bias).abs().max())
    std = probe.float().square().mean(-1, keepdim=True).sqrt()
    weights = ((call(probe) - bias).float() * std / probe.float()).double()
    weight = weights.mean(0).to(parameter)
    norm = Norm(call, weight, bias, centred, module)
    other = (probe.flip(0) * 2 + 1 if not centred else probe.flip(0) * 2).to(parameter)
    says = norm.scale(other, call(other)) * norm.centre(other) * weight + bias
    if not _close(says, call(other), parameter.dtype):
        raise _unknown(
            hooked, f"blocks.{layer}.{name} ({type(module).__name__}) is no affine RMS or layer norm"
        )
    return norm


def close_enough(dtype: torch.dtype) -> float:
    """Relative error (of norms) that rounding explains in a check."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return bool((a - b).float().norm() <= close_enough(dtype) * b.float().norm() + 1e-6)


def _unknown(hooked: HookedModel, what: str) -> InputError:
    kind = getattr(hooked.model.cfg, "architecture", None) or type(hooked.model).__name__
    hooks = sorted({str(h.name) for h in hooked.hook_points().values() if h.fwd_hooks})
    if hooks:
        return InputError(
            f"{kind}: {what}. There are hooks at {listed(hooks, 4)}; if they change what passes, remove them "
            f"(model.reset_hooks()) and try again."
        )
    return InputError(
        f"{kind}: {what}. Edges between its components are not known to this package; circuits of latents "
        f"and errors are: use node_attribution and node scores."
    )


@torch.no_grad()
def check_blocks(hooked: HookedModel, blocks: list[Block], run: Callable[[Tensor], Any]) -> None:
    """Run a few tokens and compare every read and write of the stream with what the wiring says.

    Args:
        hooked: the model's adapter.
        blocks: its wiring.
        run: runs the plain model on tokens `[batch, seq]`.

    Raises:
        InputError: naming the block and what it does otherwise.
    """
    seen: dict[nn.Module, Tensor] = {}
    handles = []

    def watch(module: nn.Module, *, incoming: bool = False) -> None:
        def output(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            seen[module] = out

        def given(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[module] = args[0] if args else next(iter(kwargs.values()))

        handles.append(
            module.register_forward_pre_hook(given, with_kwargs=True)
            if incoming
            else module.register_forward_hook(output)
        )

    end = hooked.hook_points()[f"blocks.{len(blocks) - 1}.hook_resid_post"]
    try:
        for block in blocks:
            for module in (block.stream, block.q.hook, block.k.hook, block.v.hook, block.attn.out):
                watch(module)
            for writer in (block.attn, block.mlp):
                if writer is not None and writer.inner is not None:
                    watch(writer.inner)
                if writer is not None and writer.post.module is not None:
                    watch(writer.post.module, incoming=True)
            if block.mlp is not None and block.mlp_reader is not None:
                watch(block.mlp.out)
                watch(block.mlp_reader, incoming=True)
        watch(end)
        vocab = hooked.model.cfg.d_vocab
        device = next(hooked.model.parameters()).device
        run(torch.arange(5, device=device).remainder(vocab)[None])
    finally:
        for handle in handles:
            handle.remove()
    for i, block in enumerate(blocks):
        _check_block(hooked, block, seen, blocks[i + 1].stream if i + 1 < len(blocks) else end)


def _check_block(hooked: HookedModel, block: Block, seen: dict[nn.Module, Tensor], after: nn.Module) -> None:
    name = f"blocks.{block.layer}"
    inner = None if block.mlp is None else block.mlp.inner
    needed = [block.stream, block.attn.out, after, block.attn.inner, inner]
    missing = [m for m in needed if m is not None and m not in seen]
    if missing:
        raise _unknown(
            hooked,
            f"{getattr(missing[0], 'name', name)} does not carry what is added to the stream (do its blocks "
            f"scale it?)",
        )
    broken = [m for m in needed if m is not None and not bool(seen[m].isfinite().all())]
    if broken:
        where = getattr(broken[0], "name", name)
        raise InputError(f"The model gives NaN or infinity at {where}. Check its weights, and try float32.")
    dtype, stream = seen[block.stream].dtype, seen[block.stream]
    y = block.attn_norm(stream)
    for part in (block.q, block.k, block.v):
        heads = torch.arange(len(part.weight))
        says = part(y.expand(len(heads), *y.shape), heads)
        if part.hook not in seen or not _close(
            says.flatten(-2), seen[part.hook].reshape(*y.shape[:2], -1), dtype
        ):
            raise _unknown(
                hooked,
                f"{name}: {getattr(part.hook, 'name', 'q, k, v')} does not read the norm of the stream",
            )
    if not _writes(block.attn, seen, dtype):
        raise _unknown(hooked, f"{name}.attn writes something else than the sum of its heads")
    middle = stream + seen[block.attn.out]
    written = seen[block.attn.out]
    if block.mlp is not None:
        if block.mlp_reader not in seen or block.mlp.out not in seen:
            raise _unknown(hooked, f"{name}.mlp is not called as expected")
        reads = stream if block.parallel else middle
        reads = reads if block.mlp_reads_stream else block.mlp_norm(reads)
        if not _close(seen[block.mlp_reader], reads, dtype):
            raise _unknown(
                hooked, f"{name}.mlp does not read the stream{'' if block.parallel else ' after attention'}"
            )
        if not _writes(block.mlp, seen, dtype):
            raise _unknown(hooked, f"{name}.mlp writes something else than the sum of its neurons")
        written = written + seen[block.mlp.out]
    error, size = (seen[after] - stream - written).float().norm(dim=-1), written.float().norm(dim=-1)
    rounding = torch.finfo(dtype).eps * (stream.float().norm(dim=-1) + seen[after].float().norm(dim=-1))
    if not bool((error <= close_enough(dtype) * size + rounding + 1e-6).all()):
        raise _unknown(hooked, f"{name} does not add what attention and MLP write to the stream as it is")


def _writes(writer: Writer, seen: dict[nn.Module, Tensor], dtype: torch.dtype) -> bool:
    """Whether a component writes what its inner activations and output projection say."""
    if writer.inner is None or writer.weight is None:
        return True
    out, post = seen[writer.out], writer.post.module
    inner = seen[writer.inner].reshape(*out.shape[:2], -1)
    before = None if post is None else seen.get(post)
    says = (inner @ writer.weight) * post_scale(writer, before, out) + writer.constant
    return _close(says, out, dtype)


def post_scale(writer: Writer, before: Tensor | None, out: Tensor) -> Tensor | float:
    """Return the post-norm's `r [..., 1]` of a run; 1 where there is none."""
    return 1.0 if before is None else writer.post.scale(before, out)
