"""The circuit graph of a model: which sources write to the stream, which destinations read it.

Sources: the stream's start, each head, each MLP, and in the place of a component that carries an SAE its
latents and what they leave over (the error). Destinations: the query, key and value input of each head
(keys and values of each key/value head under GQA), each MLP's input, the final stream. Every source has an
edge to every later destination. Constants (output biases, decoder biases) belong to no node.

An SAE may stand at `hook_mlp_out` or `mlp.hook_post` (in place of the MLP), or at `hook_attn_out` or
`attn.hook_z` (in place of the layer's heads, which stay destinations). SAEs on the residual stream itself
cut it: there only circuits of nodes are defined (`node_attribution`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from auto_circuit.errors import InputError, listed
from auto_circuit.graph.edge_ends import END, START, Destination, Edge, SourceGroup, readers
from auto_circuit.graph.edge_layout import EdgeLayout
from auto_circuit.model_utils.block_wiring import Block, check_blocks, read_blocks
from auto_circuit.model_utils.hooked_model import Site, hooked_model
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import AutoencoderTransformer
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.model_utils.splice import refuse_if_spliced

#: Kinds of site whose SAE stands for a component: kind → (component, whether before its output projection).
_COMPONENT = {
    "hook_mlp_out": ("mlp", False),
    "mlp.hook_post": ("mlp", True),
    "hook_attn_out": ("attn", False),
    "attn.hook_z": ("attn", True),
}


class CircuitGraph:
    """Sources, destinations and edges of a model with SAEs, or of a plain one.

    Edges are never held as objects: `layout` knows their number and names.

    Args:
        model: what `sae_model` returned, or a plain TransformerLens model.
        per_position: number of tokens of the prompts, for edges of their own at each position; None: an
            edge is the same at every position.
        separate_qkv: destinations for a head's query, key and value apart; else one for all three (under
            GQA one for each group of heads that share a key and value).

    Attributes:
        model: the TransformerLens model.
        spliced: it with its SAEs; None for a plain model.
        blocks: how its blocks read and write the stream.
        layout: which edges there are.

    Raises:
        InputError: for SAEs on the residual stream, two SAEs in series on one component, SAEs pruned per
            position in a graph that is not, or an architecture whose edges are not known.
    """

    def __init__(self, model: Any, *, per_position: Any = None, separate_qkv: bool = True) -> None:
        if per_position is not None and (
            not isinstance(per_position, int) or isinstance(per_position, bool) or per_position < 1
        ):
            raise InputError(
                f"per_position is the number of tokens of the prompts, such as prompts.lengths[0], or None; "
                f"given {per_position!r}."
            )
        self.spliced = model if isinstance(model, AutoencoderTransformer) else None
        self.model: Any = model.model if isinstance(model, AutoencoderTransformer) else model
        self.separate_qkv = separate_qkv
        self.hooked = hooked_model(self.model)
        if self.spliced is None:
            refuse_if_spliced(self.model)
        self._ids = {name: sae.latent_ids for name, sae in self.saes.items()}
        self._sites = _component_sites(self.spliced)
        self._check_positions(per_position)
        #: Whether errors are nodes (a plain model has none to leave out).
        self.error_nodes = self.spliced is None or self.spliced.error_nodes
        self._inside = False
        refuse_dropout(self.model)
        self.blocks: list[Block] = read_blocks(self.hooked)
        self._seen = self._state()
        with self.running(), self._with_errors():
            check_blocks(self.hooked, self.blocks, self.model)
        self.layout = EdgeLayout(tuple(self._groups()), (), per_position)
        self.layout = EdgeLayout(self.layout.groups, tuple(self._destinations()), per_position)

    # ---- what it is made of ----------------------------------------------------------------------

    @property
    def saes(self) -> dict[str, SparseAutoencoder]:
        """The SAEs by site."""
        return {} if self.spliced is None else self.spliced.saes

    @property
    def seq_len(self) -> int | None:
        """Number of positions when edges are per position, else None."""
        return self.layout.seq_len

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return self.layout.n_edges

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    def edge(self, index: int) -> Edge:
        """Return the edge with a number."""
        return self.layout.edge(index)

    def edge_name(self, index: int) -> str:
        """Return the name of the edge with a number."""
        return self.layout.edge_name(index)

    def edge_index(self, name: str) -> int:
        """Return the number of the edge called `name`; unknown names say which are near."""
        return self.layout.edge_index(name)

    def sources_of(self, destination: str) -> list[str]:
        """Return the names of a destination's sources."""
        return self.layout.sources_of(destination)

    def site_of(self, layer: int, component: str) -> tuple[Site, bool] | None:
        """Return the site whose SAE stands for a component, and whether it is before the projection out."""
        return self._sites.get((layer, component))

    # ---- running ---------------------------------------------------------------------------------

    @contextmanager
    def running(self, edits: dict[str, Any] | None = None) -> Iterator[None]:
        """Have the SAEs in place, uncounted, with edits at some (see `AutoencoderTransformer.edits`).

        Raises:
            SpliceError: for a plain model that somebody spliced meanwhile.
            InputError: for a model in training mode with dropout, or where weights, hooks, error nodes or
                latents changed after this graph was made.
        """
        outermost, self._inside = not self._inside, True
        try:
            if outermost:
                self._check_unchanged()
            if self.spliced is None:
                yield
                return
            with self.spliced.edits(edits or {}):
                yield
        finally:
            self._inside = not outermost

    def _check_unchanged(self) -> None:
        """Refuse a model that is not as it was when the graph was made."""
        refuse_dropout(self.model)
        for name, sae in self.saes.items():
            if sae.latent_ids is not self._ids[name] and not torch.equal(sae.latent_ids, self._ids[name]):
                raise InputError(
                    f"The SAE at {name} was pruned after this graph was made; make the graph again."
                )
        if self.spliced is None:
            refuse_if_spliced(self.model)
        else:
            now = [sae.error_nodes for sae in self.saes.values()] if self.spliced.is_spliced else []
            if {*now, self.spliced.error_nodes} != {self.error_nodes}:
                raise InputError(
                    f"This graph was made with error_nodes={self.error_nodes}, which the model has not now; "
                    f"make the graph again."
                )
        weights, hooks = self._state()
        if weights != self._seen[0]:
            raise InputError("The model's weights changed after this graph was made; make the graph again.")
        if hooks != self._seen[1]:
            changed = sorted(hooks ^ self._seen[1])
            raise InputError(
                f"Hooks at {listed(changed, 4)} were added or removed after this graph was made, and may "
                f"change what is read and written. Remove them (model.reset_hooks()), or make the graph "
                f"again with them there: it checks whether its edges still hold."
            )

    def _state(self) -> tuple[list[tuple[int, int]], set[str]]:
        """Return what changes with the model's weights, and the names of hook points with user's hooks."""
        weights = [(p.data_ptr(), -1 if p.is_inference() else p._version) for p in self.model.parameters()]
        hooks = {str(h.name) for h in self.hooked.hook_points().values() if h.fwd_hooks or h.bwd_hooks}
        return weights, hooks

    def last_logits(self, tokens: Tensor) -> Tensor:
        """Run `tokens [batch, seq]` in the model as it stands; return the last position's logits."""
        return self.model(tokens)[:, -1]

    def plain_logits(self, tokens: Tensor) -> Tensor:
        """Return the plain model's logits at the last position, `[batch, vocab]`."""
        with torch.no_grad(), self.running(), self._with_errors():
            return self.last_logits(tokens)

    @contextmanager
    def _with_errors(self) -> Iterator[None]:
        if self.spliced is None:
            yield
            return
        with self.spliced.with_error_nodes(True):
            yield

    # ---- making the layout -------------------------------------------------------------------------

    def _check_positions(self, seq_len: int | None) -> None:
        for name, sae in self.saes.items():
            if sae.seq_len is not None and sae.seq_len != seq_len:
                raise InputError(
                    f"The SAE at {name} has other latents at each of {sae.seq_len} positions: set "
                    f"per_position={sae.seq_len}."
                )

    def _groups(self) -> Iterator[SourceGroup]:
        yield SourceGroup(START, "dense", 1, 0)
        for block in self.blocks:
            stage = 2 * block.layer + 1
            yield self._site_group(block, "attn", stage) or SourceGroup(
                f"blocks.{block.layer}.attn", "heads", block.n_heads, stage
            )
            if block.mlp is not None:
                yield self._site_group(block, "mlp", stage + 1) or SourceGroup(
                    f"blocks.{block.layer}.mlp", "dense", 1, stage + 1
                )

    def _site_group(self, block: Block, component: str, stage: int) -> SourceGroup | None:
        placed = self.site_of(block.layer, component)
        if placed is None:
            return None
        site, inner = placed
        sae = self.saes[site.name]
        writer = block.attn if component == "attn" else block.mlp
        if inner and (writer is None or writer.weight is None):
            raise InputError(f"{site.name}: the output projection after it is not known; edges need it.")
        # Without error nodes something is still left over where the bias is scaled token by token.
        scaled = inner and writer is not None and writer.post.module is not None and bool(sae.bias.any())
        token_bias = sae.scaling is not None or scaled
        remainder = "error" if self.error_nodes else "bias" if token_bias else None
        ids = sae.latent_ids.cpu()
        plain = ids.ndim == 1 and torch.equal(ids, torch.arange(len(ids)))
        n = sae.n_latents + (remainder is not None)
        return SourceGroup(site.name, "latents", n, stage, remainder, None if plain else ids)

    def _destinations(self) -> Iterator[Destination]:
        groups = self.layout.groups
        for block in self.blocks:
            name, stage = f"blocks.{block.layer}", 2 * block.layer
            parts = {"q": block.q, "k": block.k, "v": block.v} if self.separate_qkv else {"in": block.k}
            for part, projection in parts.items():
                n = readers(groups, stage)
                yield Destination(f"{name}.attn.{part}", projection.weight.shape[0], n, stage)
            if block.mlp is not None:
                stage = stage if block.parallel else stage + 1
                yield Destination(f"{name}.mlp.in", None, readers(groups, stage), stage)
        last = 2 * len(self.blocks)
        yield Destination(END, None, readers(groups, last), last)


def refuse_dropout(model: torch.nn.Module) -> None:
    """Refuse a model whose passes are random: in training mode, with dropout.

    Raises:
        InputError: saying what to call.
    """
    for name, module in model.named_modules():
        p = getattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else 0.0
        p = p or getattr(module, "attention_dropout", 0.0)
        if module.training and isinstance(p, float) and p > 0:
            raise InputError(
                f"The model is in training mode and drops out at random ({name}, p = {p:g}); call "
                f"model.eval()."
            )


def _component_sites(spliced: AutoencoderTransformer | None) -> dict[tuple[int, str], tuple[Site, bool]]:
    """Return which component each SAE stands for.

    Raises:
        InputError: for SAEs on the stream, or two on one component.
    """
    found: dict[tuple[int, str], tuple[Site, bool]] = {}
    for name, site in spliced.sites.items() if spliced is not None else ():
        if site.kind not in _COMPONENT:
            raise InputError(
                f"The SAE at {name} stands on the residual stream and cuts it: edges across it are not "
                f"defined. Use node_attribution for circuits of its latents, or choose SAEs at "
                f"{listed(list(_COMPONENT))}."
            )
        component, inner = _COMPONENT[site.kind]
        before = found.get((site.layer, component))
        if before is not None:
            raise InputError(
                f"Two SAEs in series on one component, {before[0].name} and {name}: both describe what the "
                f"same component writes. Leave one out for edges; node_attribution takes both."
            )
        found[site.layer, component] = (site, inner)
    return found
