"""One forward pass of a graph's model, seen from its stream.

`StreamRun` records what every source writes and what every reader sees, and lets a subclass change what
readers read (`read_attention`, `read_mlp`, `read_end`). No TransformerLens flag is set: a head's own input
is made by calling the block's norm and projection on it and writing the result at `q.hook_out` (before
rotary embedding and q/k norms). Hooks are put on for the pass and taken off after it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.edge_ends import START
from auto_circuit.model_utils.block_wiring import Block, Writer, post_scale
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.patching.sources import Source, SourceValues, wide


class StreamRun:
    """One forward pass that records.

    Args:
        graph: the graph.
        sources: its sources, from `sources_of`.
        differentiable: keep what is recorded in the autograd graph; else it is detached.
        replace: group → what turns its output into another, for paths between two runs.
    """

    def __init__(
        self,
        graph: CircuitGraph,
        sources: Mapping[str, Source],
        *,
        differentiable: bool = False,
        replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.graph = graph
        self.sources = sources
        self.differentiable = differentiable
        self.replace = replace or {}
        self.streams: dict[int, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._coefficients: dict[str, Callable[[], Tensor] | Tensor] = {}
        self._inputs: dict[str, Tensor] = {}  # of SAEs before an output projection
        self._handles: list[Any] = []

    # ---- what a subclass changes -----------------------------------------------------------------

    def read_attention(self, block: Block, part: str, projected: Tensor) -> Tensor | None:
        """Return other queries, keys or values (`part`), `[batch, seq, heads, d_head]`; None: these."""
        del block, part, projected
        return None

    def read_mlp(self, block: Block, stage: int, x: Tensor) -> Tensor | None:
        """Return another stream `[batch, seq, d_model]` for the MLP to read; None: this one."""
        del block, stage, x
        return None

    def read_end(self, stage: int, x: Tensor) -> Tensor | None:
        """Return another final stream `[batch, seq, d_model]`; None: this one."""
        del stage, x
        return None

    # ---- what was recorded -----------------------------------------------------------------------

    def total(self, group: str) -> Tensor:
        """What a group wrote together in this run, without constants, `[batch, seq, d_model]`."""
        return self._totals[group]

    def coefficients(self, group: str) -> Tensor:
        """A group's coefficients in this run, `[batch, seq, n_columns]`; encoded when first asked for."""
        held = self._coefficients[group]
        if not isinstance(held, Tensor):
            held = self._kept(held())
            self._coefficients[group] = held
        return held

    def values(self) -> SourceValues:
        """Everything recorded."""
        tensors = {f"{name}:total": self.total(name) for name in self.sources}
        tensors |= {f"{name}:coefficients": self.coefficients(name) for name in self._coefficients}
        tensors |= {f"stream:{stage}": stream for stage, stream in self.streams.items()}
        return SourceValues(tensors)

    # ---- the pass --------------------------------------------------------------------------------

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run `tokens [batch, seq]`; return the last position's logits `[batch, vocab]`."""
        edits: dict[str, Any] = {
            name: partial(self._edit, source, source.sae)
            for name, source in self.sources.items()
            if source.sae is not None
        }
        with self.graph.running(edits):
            try:
                for block in self.graph.blocks:
                    self._watch(block)
                last = len(self.graph.blocks) - 1
                self._after(self.graph.hooked.hook_points()[f"blocks.{last}.hook_resid_post"], self._end)
                return self.graph.last_logits(tokens)
            finally:
                while self._handles:
                    self._handles.pop().remove()

    def _after(self, module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> None:
        """Have `function` see a module's output, and perhaps replace it."""
        self._handles.append(module.register_forward_hook(partial(_output, function)))

    def _before(self, module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> None:
        """Have `function` see a module's first input, and perhaps replace it."""
        hook = partial(_first_input, function)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _watch(self, block: Block) -> None:
        layer = block.layer
        self._after(block.stream, partial(self._stream, 2 * layer))
        for part, projection in (("q", block.q), ("k", block.k), ("v", block.v)):
            self._after(projection.hook, partial(self.read_attention, block, part))
        for component, writer in (("attn", block.attn), ("mlp", block.mlp)):
            placed = self.graph.site_of(layer, component)
            if writer is None or (placed is not None and not placed[1]):
                continue  # nothing there, or its SAE's edit records it
            name = placed[0].name if placed is not None else f"blocks.{layer}.{component}"
            self._watch_writer(self.sources[name], writer)
        if block.mlp_reader is not None:
            stage = 2 * layer if block.parallel else 2 * layer + 1
            self._before(block.mlp_reader, partial(self._mlp, block, stage))

    def _watch_writer(self, source: Source, writer: Writer) -> None:
        seen: dict[str, Tensor] = {}
        if writer.inner is not None and source.group.kind == "heads":
            self._after(writer.inner, lambda z: seen.update(z=z.reshape(*z.shape[:2], -1)))
        if writer.post.module is not None:
            self._before(writer.post.module, lambda x: seen.update(before=x))
        self._after(writer.out, partial(self._written, source, writer, seen))

    def _written(self, source: Source, writer: Writer, seen: dict[str, Tensor], out: Tensor) -> Tensor | None:
        new = self._replaced(source.name, out)
        self._totals[source.name] = self._kept(out if new is None else new) - source.constant
        scale = self._kept(post_scale(writer, seen.get("before"), out))
        if source.group.kind == "heads":
            self._coefficients[source.name] = self._kept(seen["z"]) * scale
        elif source.sae is not None:
            x, sae = self._inputs[source.name], source.sae
            self._coefficients[source.name] = lambda: sae.coefficients(x) * scale
        return new

    # ---- hooks -----------------------------------------------------------------------------------

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value if self.differentiable else value.detach()
        return value.to(wide(value.dtype))

    def _replaced(self, group: str, out: Tensor) -> Tensor | None:
        return self.replace[group](out).to(out.dtype) if group in self.replace else None

    def _edit(self, source: Source, sae: SparseAutoencoder, x: Tensor, out: Tensor) -> Tensor:
        """Record an SAE's input and, unless the site is before the projection, what it puts out."""
        own = (x if self.differentiable else x.detach()).to(sae.bias.dtype)
        if source.inner:
            self._inputs[source.name] = own
            return out
        new = self._replaced(source.name, out)
        out = out if new is None else new
        self._totals[source.name] = self._kept(out) - source.constant
        self._coefficients[source.name] = lambda: sae.coefficients(own)
        return out

    def _stream(self, stage: int, x: Tensor) -> Tensor | None:
        new = None
        if stage == 0:
            new = self._replaced(START, x)
            x = x if new is None else new
            self._totals[START] = self._kept(x) - self.sources[START].constant
        self.streams[stage] = x if self.differentiable else x.detach()
        return new

    def _mlp(self, block: Block, stage: int, given: Tensor) -> Tensor | None:
        if block.mlp_reads_stream:
            self.streams.setdefault(stage, given if self.differentiable else given.detach())
            return self.read_mlp(block, stage, given)
        new = self.read_mlp(block, stage, self.streams[stage])
        return None if new is None else block.mlp_norm(new)

    def _end(self, x: Tensor) -> Tensor | None:
        stage = 2 * len(self.graph.blocks)
        self.streams[stage] = x if self.differentiable else x.detach()
        return self.read_end(stage, x)


def _output(
    function: Callable[[Tensor], Tensor | None], _module: nn.Module, _args: Any, out: Tensor
) -> Tensor | None:
    """Call `function` on a module's output."""
    return function(out)


def _first_input(
    function: Callable[[Tensor], Tensor | None],
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call `function` on a module's first argument, however it was passed; None: it stays."""
    name = None if args else next(iter(kwargs))
    new = function(args[0] if name is None else kwargs[name])
    if new is None:
        return None
    return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})


@torch.no_grad()
def record(graph: CircuitGraph, sources: Mapping[str, Source], tokens: Tensor) -> SourceValues:
    """Run `tokens [batch, seq]` without gradients and return what every source wrote."""
    run = StreamRun(graph, sources)
    run(tokens)
    return run.values()
