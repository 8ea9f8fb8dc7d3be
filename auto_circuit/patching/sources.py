"""What the sources of a graph write, as coefficients times fixed directions.

A group of heads writes `z W_O` (one source for each head), the latents of a site `Σ cᵢDᵢ`, through the
component's output projection where the site is before it. After a post-norm, directions carry its weight
and coefficients its scale `r`, that of their own run. So a group's values are

- `total [batch, seq, d_model]`: what it writes together, without constants;
- `coefficients [batch, seq, n_columns]`: `z` flattened, or the latents' coefficients;
- the remainder `total − coefficients @ directions`: the error.

A tensor of contributions `[n_sources, batch, seq, d_model]` exists for no group of latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.edge_ends import START, SourceGroup
from auto_circuit.model_utils.block_wiring import Writer
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which differences are taken: at least float32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Source:
    """One group of sources.

    Attributes:
        group: its place in the layout.
        writer: the component that it is, or stands for; None for the stream's start.
        sae: the SAE, for latents.
        inner: whether the SAE stands before the component's output projection.
        directions: `[(seq,) n_columns, d_model]`; None for a dense source.
        width: columns of one source: d_head for heads, 1 for latents.
        constant: what is written whatever is read, `[d_model]`.
    """

    group: SourceGroup
    writer: Writer | None
    sae: SparseAutoencoder | None
    inner: bool
    directions: Tensor | None
    width: int
    constant: Tensor

    @property
    def name(self) -> str:
        """The group's name."""
        return self.group.name

    def picked(self, idx: Tensor | None) -> Tensor:
        """Return the directions of some sources (None: all), `[(seq,) k·width, d_model]`."""
        directions = self.directions
        if directions is None:
            raise RuntimeError(f"{self.name} is dense and has no directions")
        if idx is None:
            return directions
        if self.width == 1:
            return directions.index_select(-2, idx)
        return directions.unflatten(0, (-1, self.width))[idx].flatten(0, 1)

    def write(self, coefficients: Tensor, directions: Tensor) -> Tensor:
        """Return `coefficients [..., seq, k] @ directions [(seq,) k, d_model]`."""
        if directions.ndim == 2:
            return coefficients @ directions
        return torch.einsum("...sk,skd->...sd", coefficients, directions)


def sources_of(graph: CircuitGraph) -> dict[str, Source]:
    """Return every group's source, in the order of the layout."""
    components: dict[str, tuple[Writer | None, SparseAutoencoder | None, bool]] = {START: (None, None, False)}
    for block in graph.blocks:
        for component, writer in (("attn", block.attn), ("mlp", block.mlp)):
            placed = graph.site_of(block.layer, component)
            if placed is not None:
                components[placed[0].name] = (writer, graph.saes[placed[0].name], placed[1])
            elif writer is not None:
                components[f"blocks.{block.layer}.{component}"] = (writer, None, False)
    return {group.name: _source(graph, group, *components[group.name]) for group in graph.layout.groups}


def _source(
    graph: CircuitGraph,
    group: SourceGroup,
    writer: Writer | None,
    sae: SparseAutoencoder | None,
    inner: bool,
) -> Source:
    d_model = graph.model.cfg.d_model
    constant = torch.zeros(d_model, device=graph.device) if writer is None else writer.constant
    directions: Tensor | None = None
    width = 1
    if group.kind == "heads" and writer is not None and writer.weight is not None:
        directions = writer.weight.to(wide(writer.weight.dtype))
        width = directions.shape[0] // group.n
    elif sae is not None:
        directions = sae.directions.detach().to(wide(sae.bias.dtype))
        constant_bias = sae.constant_bias.detach()
        if inner and writer is not None and writer.weight is not None:
            weight = writer.weight.to(directions.dtype)
            directions = directions @ weight
            if writer.post.module is None:
                constant = constant + constant_bias.to(weight.dtype) @ weight
        else:
            constant = constant_bias
    return Source(group, writer, sae, inner, directions, width, constant.to(wide(constant.dtype)))


class SourceValues:
    """What every source wrote in some run, or is to write instead.

    Args:
        tensors: by name: `{group}:total`, `{group}:coefficients`, and `stream:{stage}`, the stream that a
            reader of that stage would see; each `[batch or 1, seq or 1, …]`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def total(self, group: str) -> Tensor:
        """What a group writes together, without constants."""
        return self.tensors[f"{group}:total"]

    def coefficients(self, group: str) -> Tensor:
        """A group's coefficients."""
        return self.tensors[f"{group}:coefficients"]

    def stream(self, stage: int) -> Tensor:
        """The stream at a stage."""
        return self.tensors[f"stream:{stage}"]


def no_values(graph: CircuitGraph, sources: Mapping[str, Source]) -> SourceValues:
    """Return the values of sources that write nothing: the stream is what constants make it."""
    tensors: dict[str, Tensor] = {}
    for source in sources.values():
        tensors[f"{source.name}:total"] = torch.zeros_like(source.constant)[None, None]
        if source.directions is not None:
            n = source.directions.shape[-2]
            tensors[f"{source.name}:coefficients"] = source.directions.new_zeros(1, 1, n)
    return completed_values(graph, sources, tensors)


def completed_values(
    graph: CircuitGraph, sources: Mapping[str, Source], tensors: Mapping[str, Tensor]
) -> SourceValues:
    """Return values with what follows from others: totals of sources without remainder, and the streams."""
    whole = {name: tensor for name, tensor in tensors.items() if not name.startswith("stream:")}
    for source in sources.values():
        if source.directions is not None and source.group.remainder is None:
            coefficients = whole[f"{source.name}:coefficients"].to(source.directions.dtype)
            if coefficients.shape[1] == 1 and source.directions.ndim == 3:
                coefficients = coefficients.expand(-1, len(source.directions), -1)
            whole[f"{source.name}:total"] = source.write(coefficients, source.directions)
    for stage in {destination.stage for destination in graph.layout.destinations}:
        before = [s for s in sources.values() if s.group.stage <= stage]
        stream = sum(s.constant for s in before) + torch.zeros(1, 1, 1, device=graph.device)
        for source in before:
            stream = stream + whole[f"{source.name}:total"]
        whole[f"stream:{stage}"] = stream
    return SourceValues(whole)
