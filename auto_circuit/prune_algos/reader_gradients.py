"""Gradients of an objective at every reader of a graph, from one forward and one backward pass.

At mask value α every edge carries `α·patch + (1 − α)·current`, so every reader of a stage reads
`(1 − α)·x + α·X′`, with `x` the current stream there and `X′` the patch's: no mask of edges is needed. The
gradient of the objective with respect to an edge's mask is then `⟨p_s − c_s, ∂m/∂in_r⟩`, with the gradient
taken at the reader alone: on a view of its own, never on the stream that others read too. A head's reader
keeps its gradient at the queries, keys or values, `[batch, seq, heads, d_head]`.

Only named tensors are differentiated (`torch.autograd.grad`): the parameters' `.grad` stays as it was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_circuit.data.prompts import PromptBatch
from auto_circuit.errors import InputError
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.metrics.objectives import Objective, evaluate
from auto_circuit.model_utils.block_wiring import Block
from auto_circuit.patching.sources import Source, SourceValues
from auto_circuit.patching.stream_run import StreamRun


@dataclass(frozen=True)
class ReaderGradients:
    """Gradients at readers, and what they read.

    Attributes:
        attention: layer → gradients at queries, keys and values, `[batch, seq, heads, d_head]` each.
        attention_inputs: layer → the stream that its heads read, `[batch, seq, d_model]`.
        streams: `blocks.3.mlp.in`, `end` → gradient at that reader's input, `[batch, seq, d_model]`.
        logits: gradient at the last position's logits, `[batch, vocab]`.
    """

    attention: dict[int, dict[str, Tensor]]
    attention_inputs: dict[int, Tensor]
    streams: dict[str, Tensor]
    logits: Tensor


class GradientRun(StreamRun):
    """A forward pass that gives every reader a tensor of its own to differentiate.

    Args:
        graph: the graph.
        sources: its sources.
        mask_value: α, how much of the patch every edge carries.
        patch: what is carried at mask value 1; needed unless α = 0.
        replace: group → what turns its output into another.
    """

    def __init__(
        self,
        graph: CircuitGraph,
        sources: Mapping[str, Source],
        *,
        mask_value: float = 0.0,
        patch: SourceValues | None = None,
        replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        super().__init__(graph, sources, differentiable=mask_value != 0, replace=replace)
        self.mask_value = mask_value
        self.patch = patch
        self._leaves: dict[tuple[int, str], Tensor] = {}
        self._attention_inputs: dict[int, Tensor] = {}
        self._normed: dict[int, Tensor] = {}
        self._streams: dict[str, Tensor] = {}

    def _mixed(self, stage: int, x: Tensor) -> Tensor:
        if self.mask_value == 0 or self.patch is None:
            return x
        other = self.patch.stream(stage).to(x.dtype)
        return x + self.mask_value * (other - x)

    def read_attention(self, block: Block, part: str, projected: Tensor) -> Tensor:
        """Give the heads a view of their own of what they read."""
        layer, stage = block.layer, 2 * block.layer
        if layer not in self._attention_inputs:
            x = self._mixed(stage, self.streams[stage])
            self._attention_inputs[layer] = x.detach()
            if self.mask_value != 0:
                self._normed[layer] = block.attn_norm(x)
        if self.mask_value != 0:
            projection = getattr(block, part)
            heads = torch.arange(len(projection.weight), device=projected.device)
            y = self._normed[layer]
            projected = projection(y.expand(len(heads), *y.shape), heads).reshape(projected.shape)
        own = own_view(projected)
        self._leaves[layer, part] = own
        return own

    def read_mlp(self, block: Block, stage: int, x: Tensor) -> Tensor:
        """Give the MLP a view of its own of what it reads."""
        own = self._streams[f"blocks.{block.layer}.mlp.in"] = own_view(self._mixed(stage, x))
        return own

    def read_end(self, stage: int, x: Tensor) -> Tensor:
        """Give the final norm a view of its own of what it reads."""
        own = self._streams["end"] = own_view(self._mixed(stage, x))
        return own

    def gradients(self, tokens: Tensor, batch: PromptBatch, objective: Objective) -> ReaderGradients:
        """Run `tokens` and differentiate the sum of the objective over the batch.

        Where the batch has no reference logits, this run's own are used: right for the plain clean run.
        """
        with torch.enable_grad():
            logits = self(tokens)
            if batch.reference is None:
                batch = batch.with_reference(logits.detach())
            leaves = [*self._leaves.values(), *self._streams.values()]
            found = iter(gradients_of(objective, logits, batch, leaves))
        attention: dict[int, dict[str, Tensor]] = {}
        for layer, part in self._leaves:
            attention.setdefault(layer, {})[part] = next(found)
        streams = {name: next(found) for name in self._streams}
        return ReaderGradients(attention, self._attention_inputs, streams, next(found))


def gradients_of(
    objective: Objective, logits: Tensor, batch: PromptBatch, leaves: Sequence[Tensor]
) -> list[Tensor]:
    """Differentiate the objective, summed over the batch, and nothing else (no parameter's `.grad` changes).

    Args:
        objective: `(logits, batch) -> [batch]`.
        logits: at the last position, `[batch, vocab]`, in the autograd graph.
        batch: prompts.
        leaves: what to differentiate with respect to.

    Returns:
        The gradient at each leaf (zero where it does not matter), and last that at the logits.

    Raises:
        InputError: for an objective that does not depend on the logits.
    """
    value = evaluate(objective, logits, batch).sum()
    if not value.requires_grad:
        raise InputError("The objective does not depend on the logits, or cuts their gradient off.")
    wanted = [*leaves, logits]
    return list(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))


def own_view(x: Tensor) -> Tensor:
    """Return a view whose gradient is this reader's alone."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
