"""Scores of all edges from readers' gradients and sources' differences, as matrix products.

With `Δ_s = c_s − p_s` (current minus patch) and `g_r` the gradient at reader r, an edge's score is
`Σ_tokens ⟨g_r, Δ_s⟩`. Heads, MLPs, errors and the start are few: their differences are written out,
`[n_dense, tokens, d_model]`, and all their scores into a reader are one product. Latents are many and stay
coefficients times directions. Into an MLP or the end:

    X = Δcᵀ g   [n_latents, d_model],      score = Σ_d X ⊙ D

Into heads, through the norm `y = r·w ⊙ x_c` (block_wiring.py) and a projection `W`, whose gradient `g` is
held in `d_head`, the derivative of what the head reads along D is `r·(w⊙D)W − (r³/d)⟨x_c, D⟩·(w⊙x_c)W`, so

    X = Δcᵀ (r·g)   [n_latents, heads·d_head],   P = D_c (w⊙W),   κ = (r³/d)⟨g, (w⊙x_c)W⟩
    score = Σ_e X ⊙ P − (Δc ⊙ x_c Dᵀ)ᵀ κ

which costs `2·(tokens + d_model)·d_head` for an edge rather than `2·tokens·d_model`: tokens of several
batches are contracted together. Per position every position has sums of its own, and `⟨g_r, D⟩` is taken
token by token. Latents that do not differ anywhere are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.edge_ends import END, Destination
from auto_circuit.model_utils.block_wiring import Block
from auto_circuit.patching.mixing import Differences, active
from auto_circuit.patching.sources import Source, wide
from auto_circuit.prune_algos.reader_gradients import ReaderGradients

#: Numbers in one working tensor.
CHUNK = 2**24


@dataclass(frozen=True)
class _Reader:
    """The rows of one reading place, over the tokens that are contracted.

    Attributes:
        destinations: the modules whose rows these are, in order.
        full: gradients at the rows' inputs, `[rows, tokens, d_model]`.
        scaled: `r·g [tokens, rows, width]`; None for an MLP or the end.
        weight: `centred(w⊙W) [rows, d_model, width]`.
        kappa: `κ [tokens, rows]`.
        stream: `x_c [tokens, d_model]`.
    """

    destinations: Sequence[Destination]
    full: Tensor
    scaled: Tensor | None = None
    weight: Tensor | None = None
    kappa: Tensor | None = None
    stream: Tensor | None = None


@dataclass(frozen=True)
class _Record:
    """One run's gradients and differences, `[batch·seq, …]`."""

    gradients: dict[str, Tensor]
    totals: dict[str, Tensor]
    columns: dict[str, Tensor]
    remainders: dict[str, Tensor]
    batch: int


class EdgeSums:
    """Adds up the scores of all edges.

    Args:
        graph: the graph.
        sources: its sources.
        max_tokens: tokens that are contracted together at most.
    """

    def __init__(self, graph: CircuitGraph, sources: Mapping[str, Source], max_tokens: int) -> None:
        self.graph, self.layout, self.sources = graph, graph.layout, sources
        self.max_tokens = max_tokens
        dtype = torch.float64 if self.layout.n_edges <= 10**7 else torch.float32
        self.sums = {
            d.name: torch.zeros(self.layout.shape(d), dtype=dtype, device=graph.device)
            for d in self.layout.destinations
        }
        self._waiting: list[_Record] = []

    @torch.no_grad()
    def add(
        self,
        gradients: ReaderGradients,
        differences: Differences,
        weight: float = 1.0,
        only: str | None = None,
    ) -> None:
        """Add one run.

        Args:
            gradients: at its readers.
            differences: patch minus current, of its sources.
            weight: factor of its scores.
            only: the one group whose edges are scored; None: all.
        """
        groups = [g for g in self.layout.groups if only is None or g.name == only]
        shape = gradients.streams[END].shape[:2]

        def tokens(x: Tensor) -> Tensor:
            return x.detach().to(wide(x.dtype)).expand(*shape, *x.shape[2:]).flatten(0, 1)

        held = {f"x{layer}": tokens(x) for layer, x in gradients.attention_inputs.items()}
        for layer, parts in gradients.attention.items():
            for part, g in parts.items():
                heads = len(getattr(self.graph.blocks[layer], part).weight)
                held[f"{part}{layer}"] = weight * tokens(g).reshape(shape.numel(), heads, -1)
        held |= {name: weight * tokens(g) for name, g in gradients.streams.items()}
        named = [(g.name, self.sources[g.name]) for g in groups]
        self._waiting.append(
            _Record(
                held,
                {n: tokens(differences.total(n)) for n, s in named if s.directions is None},
                {n: tokens(differences.columns(n)) for n, s in named if s.directions is not None},
                {n: tokens(differences.remainder(n)) for n, s in named if s.group.remainder is not None},
                shape[0],
            )
        )
        if self.layout.seq_len is not None or self._n_waiting() >= self.max_tokens:
            self.flush()

    def _n_waiting(self) -> int:
        return sum(len(record.gradients[END]) for record in self._waiting)

    @torch.no_grad()
    def flush(self) -> None:
        """Contract what waits."""
        if not self._waiting:
            return
        # Runs that score the same groups are contracted together.
        records, self._waiting = self._waiting, []
        together: dict[tuple[str, ...], list[_Record]] = {}
        for record in records:
            together.setdefault((*record.totals, *record.columns), []).append(record)
        for same in together.values():
            self._contract(_joined(same))

    def _contract(self, record: _Record) -> None:
        n_tokens = len(record.gradients[END])
        dense = self._n_dense(record)
        d_model = record.gradients[END].shape[-1]
        at_once = n_tokens
        if self.layout.seq_len is None:
            at_once = max(1, min(n_tokens, 4 * CHUNK // max(1, dense * d_model)))
        written = [
            self._written(record, slice(start, start + at_once)) for start in range(0, n_tokens, at_once)
        ]
        for place in self._places():
            reader = self._reader(place, record)
            names = [g.name for g in self.layout.groups_before(place[0])]
            for start, (outputs, index) in zip(range(0, n_tokens, at_once), written, strict=True):
                n = sum(1 for name, _ in index if name in names)
                self._add_dense(reader, outputs[:n], index[:n], slice(start, start + at_once), record.batch)
            for name in names:
                if name in record.columns and self.sources[name].width == 1:
                    self._add_latents(reader, record, self.sources[name])

    # ---- readers ---------------------------------------------------------------------------------

    def _places(self) -> list[list[Destination]]:
        places: dict[str, list[Destination]] = {}
        for destination in self.layout.destinations:
            place = destination.name.rpartition(".")[0] if ".attn." in destination.name else destination.name
            places.setdefault(place, []).append(destination)
        return list(places.values())

    def _reader(self, place: list[Destination], record: _Record) -> _Reader:
        name = place[0].name
        if name in record.gradients:
            return _Reader(place, record.gradients[name][None])
        block = self.graph.blocks[int(name.split(".")[1])]
        g, weight = _rows(block, record.gradients, joint=len(place) == 1)
        x, norm = record.gradients[f"x{block.layer}"], block.attn_norm
        weight = weight.to(g.dtype)
        if norm.call is None or norm.weight is None:
            return _Reader(place, torch.einsum("trw,rdw->rtd", g, weight), g, weight)
        parameter = next(self.graph.model.parameters())
        r = norm.scale(x, norm(x.to(parameter.dtype)).to(x.dtype))
        stream = norm.centre(x)
        weight = norm.weight.to(g.dtype)[:, None] * weight
        weight = weight - weight.mean(1, keepdim=True) if norm.centred else weight
        scaled = g * r[..., None]
        full = scaled.transpose(0, 1) @ weight.mT
        kappa = torch.einsum("rtd,td->rt", full, stream) * (r.T**2 / x.shape[-1])
        full -= kappa[..., None] * stream
        return _Reader(place, full, scaled, weight, kappa.T, stream)

    # ---- heads, MLPs, errors, the start ------------------------------------------------------------

    def _n_dense(self, record: _Record) -> int:
        heads = sum(self.sources[n].group.n_columns for n in record.columns if self.sources[n].width > 1)
        return len(record.totals) + len(record.remainders) + heads

    def _written(self, record: _Record, part: slice) -> tuple[Tensor, list[tuple[str, int]]]:
        """Return differences written out `[n, tokens, d_model]`, and whose they are (group, source index)."""
        outputs: list[Tensor] = []
        index: list[tuple[str, int]] = []
        for group in self.layout.groups:
            source = self.sources[group.name]
            if group.name in record.totals:
                outputs.append(record.totals[group.name][part][None])
                index.append((group.name, 0))
            elif group.name in record.columns and source.width > 1:
                z = record.columns[group.name][part].unflatten(-1, (-1, source.width)).transpose(0, 1)
                outputs.append(z @ source.picked(None).unflatten(0, (-1, source.width)))
                index += [(group.name, head) for head in range(group.n_columns)]
            if group.name in record.remainders:
                outputs.append(record.remainders[group.name][part][None])
                index.append((group.name, group.n - 1))
        if not outputs:
            return record.gradients[END].new_zeros(0, 1, 1), []
        return torch.cat(outputs), index

    def _add_dense(
        self, reader: _Reader, outputs: Tensor, index: list[tuple[str, int]], part: slice, batch: int
    ) -> None:
        if not index:
            return
        starts = self.layout.group_starts
        columns = torch.tensor([starts[name] + i for name, i in index], device=outputs.device)
        gradient = reader.full[:, part]
        if self.layout.seq_len is None:
            scores = (gradient.flatten(1) @ outputs.flatten(1).T)[None]
        else:
            by_position = [x.unflatten(1, (batch, -1)) for x in (gradient, outputs)]
            scores = torch.einsum("rbsd,nbsd->srn", *by_position)
        self._add(reader, columns, scores)

    # ---- latents ---------------------------------------------------------------------------------

    def _add_latents(self, reader: _Reader, record: _Record, source: Source) -> None:
        columns = record.columns[source.name]
        idx = active(columns)
        if self.layout.seq_len is not None:
            at_once = max(1, CHUNK // max(1, reader.full.shape[0] * len(columns)))
        else:
            at_once = max(256, CHUNK // reader.full.shape[0] // reader.full.shape[2])
        first = self.layout.group_starts[source.name]
        for chosen in idx.split(at_once):
            scores = self._latent_scores(reader, columns, source, chosen, record.batch)
            self._add(reader, chosen + first, scores)

    def _latent_scores(
        self, reader: _Reader, columns: Tensor, source: Source, chosen: Tensor, batch: int
    ) -> Tensor:
        """Return the scores of some latents, `[positions or 1, rows, k]`."""
        whole = len(chosen) == columns.shape[-1]
        c = columns if whole else columns[:, chosen]
        directions = source.picked(None if whole else chosen).to(c.dtype)
        if self.layout.seq_len is not None:
            g = reader.full.unflatten(1, (batch, -1))
            form = "rbsd,kd->rbsk" if directions.ndim == 2 else "rbsd,skd->rbsk"
            return torch.einsum(
                "rbsk,bsk->srk", torch.einsum(form, g, directions), c.unflatten(0, (batch, -1))
            )
        if reader.scaled is None or reader.weight is None:
            return ((c.T @ reader.full[0]) * directions).sum(-1)[None, None]
        n_rows, d_model, width = reader.weight.shape
        x = c.T @ reader.scaled.flatten(1)
        p = directions @ reader.weight.transpose(0, 1).reshape(d_model, -1)
        scores = x.mul_(p).view(-1, n_rows, width).sum(-1)
        if reader.kappa is not None and reader.stream is not None:
            scores -= (reader.stream @ directions.T).mul_(c).T @ reader.kappa
        return scores.T[None]

    def _add(self, reader: _Reader, columns: Tensor, scores: Tensor) -> None:
        """Add `scores [positions or 1, rows, k]` to the sources `columns` of a reader's destinations."""
        row = 0
        for destination in reader.destinations:
            sums = self.sums[destination.name]
            part = scores[:, row : row + destination.rows].reshape(*sums.shape[:-1], -1)
            sums.index_add_(-1, columns, part.to(sums.dtype))
            row += destination.rows


def _rows(block: Block, gradients: Mapping[str, Tensor], *, joint: bool) -> tuple[Tensor, Tensor]:
    """Return a layer's gradients `[tokens, rows, width]` and weights `[rows, d_model, width]`, row by row.

    Rows are the heads of queries, keys and values in turn; jointly, the key/value heads, each with its
    queries, key and value side by side.
    """
    parts = [
        (gradients[f"{part}{block.layer}"], projection.weight)
        for part, projection in (("q", block.q), ("k", block.k), ("v", block.v))
    ]
    if not joint:
        return torch.cat([g for g, _ in parts], 1), torch.cat([w for _, w in parts])
    n_kv = len(block.k.weight)
    g = [g.unflatten(1, (n_kv, -1)).flatten(2) for g, _ in parts]
    w = [w.unflatten(0, (n_kv, -1)).transpose(1, 2).flatten(2) for _, w in parts]
    return torch.cat(g, -1), torch.cat(w, -1)


def _joined(records: Sequence[_Record]) -> _Record:
    if len(records) == 1:
        return records[0]

    def cat(field: str) -> dict[str, Tensor]:
        by_record = [getattr(record, field) for record in records]
        return {name: torch.cat([held[name] for held in by_record]) for name in by_record[0]}

    batch = sum(record.batch for record in records)
    return _Record(cat("gradients"), cat("totals"), cat("columns"), cat("remainders"), batch)
