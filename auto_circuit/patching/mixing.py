"""What a reader's input becomes when some of the edges into it carry the patch: plan, then apply.

A row reads `x + Σ_s m_s (p_s − c_s)`, with `c_s` what source s wrote in the current run, `p_s` the patch and
`m_s` how much of it the edge carries (0 current, 1 patch). The work follows the smaller side:

1. Rows with the same masks are computed once, rows without any patch not at all.
2. A row whose edges are mostly patched starts from the patch's stream instead of `x`.
3. Heads, MLPs, the start and the totals of SAE sites are few: their differences are written out once in a
   run, `[n_few, batch, seq, d_model]`, and all rows of a place are one product with them.
4. A site whose edges are mostly patched adds the difference of its total, and takes back what is not:
   `Σ_i m_i Δ_i + m_e Δ_e = b·Δ_total + Σ_i (m_i − b) Δ_i + (m_e − b) Δ_e`, b = 0 or 1.
5. What is left are products `(w ⊙ Δc) @ D` over the latents with `w ≠ 0` and `Δc ≠ 0` somewhere.

Masks that require gradients are taken as they are (b = 0), so that every edge has its gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_circuit.graph.edge_ends import SourceGroup
from auto_circuit.graph.edge_layout import EdgeLayout
from auto_circuit.patching.sources import Source, SourceValues, wide
from auto_circuit.patching.stream_run import StreamRun

#: Rows are mixed in chunks of about this many numbers.
CHUNK = 2**25
#: Rows times latents from which rows with few latents in common are worth a product each.
ALONE = 2**13


class Differences:
    """What the patch would write minus what the current run writes, group by group, as it runs.

    Args:
        run: the current run, or what was recorded of it.
        sources: the graph's sources, in order.
        patch: what would be written instead.
        in_place: whether differences may be written into one buffer (not where they have gradients).
    """

    def __init__(
        self,
        run: StreamRun | SourceValues,
        sources: Mapping[str, Source],
        patch: SourceValues,
        *,
        in_place: bool = False,
    ) -> None:
        self.run, self.sources, self.patch = run, sources, patch
        self.in_place = in_place
        self._totals: dict[str, Tensor] = {}
        self._columns: dict[str, Tensor] = {}
        self._remainders: dict[str, Tensor] = {}
        self._few: Tensor | None = None
        self._n_few = 0
        self._groups = 0

    def total(self, group: str) -> Tensor:
        """Difference of a group's total, `[batch, seq, d_model]`."""
        if group not in self._totals:
            self._totals[group] = self.patch.total(group) - self.run.total(group)
        return self._totals[group]

    def columns(self, group: str) -> Tensor:
        """Difference of a group's coefficients, `[batch, seq, n_columns]`."""
        if group not in self._columns:
            self._columns[group] = self.patch.coefficients(group) - self.run.coefficients(group)
        return self._columns[group]

    def remainder(self, group: str) -> Tensor:
        """Difference of what the latents of a group do not account for, `[batch, seq, d_model]`."""
        if group not in self._remainders:
            source, columns = self.sources[group], self.columns(group)
            idx = active(columns)
            some = len(idx) < columns.shape[-1] // 2
            columns, directions = (
                (columns.index_select(-1, idx), source.picked(idx))
                if some
                else (columns, source.picked(None))
            )
            self._remainders[group] = self.total(group) - source.write(columns, directions)
        return self._remainders[group]

    def few(self, groups: Sequence[str], like: Tensor) -> Tensor:
        """Differences of the sources that are few, `[n_few of these groups, *like.shape]` (see `n_few`).

        Args:
            groups: a prefix of all groups, all of which have run.
            like: a tensor `[batch, seq, d_model]` of their shape and dtype.
        """
        if not self.in_place:
            return torch.cat([self._written(self.sources[group], like) for group in groups])
        if self._few is None:
            total = sum(n_few(source.group) for source in self.sources.values())
            self._few = like.new_empty(total, *like.shape)
        for group in groups[self._groups :]:
            written = self._written(self.sources[group], like)
            self._few[self._n_few : self._n_few + len(written)] = written
            self._n_few += len(written)
            self._groups += 1
        return self._few[: sum(n_few(self.sources[group].group) for group in groups)]

    def _written(self, source: Source, like: Tensor) -> Tensor:
        """Return one group's differences written out: each head's, or its total."""
        if source.group.kind != "heads":
            return self.total(source.name).to(like.dtype).expand_as(like)[None]
        z = self.columns(source.name).unflatten(-1, (-1, source.width))
        z = z.expand(*like.shape[:2], *z.shape[2:]).permute(2, 0, 1, 3)
        weight = source.picked(None).unflatten(0, (-1, source.width))
        return torch.einsum("hbse,hed->hbsd", z, weight)


def n_few(group: SourceGroup) -> int:
    """How many of a group's differences are written out: its heads, or its total."""
    return group.n if group.kind == "heads" else 1


def active(columns: Tensor) -> Tensor:
    """Indices of the last dimension where anything is not zero."""
    return (columns.detach().reshape(-1, columns.shape[-1]) != 0).any(0).nonzero().flatten()


@dataclass(frozen=True)
class LatentPart:
    """Some latents of one site.

    Attributes:
        group: the site.
        rows: which distinct rows, `[n]`; None: all.
        idx: which latents, `[k]`; None: all.
        weights: `[n, positions or 1, k]`.
    """

    group: str
    rows: Tensor | None
    idx: Tensor | None
    weights: Tensor


@dataclass(frozen=True)
class Mix:
    """A plan for the rows of one reading place (a layer's attention, an MLP, the end).

    Attributes:
        rows: for each row, which of the distinct rows it is, `[n_rows]`.
        touched: which rows read anything but the current stream, `[n_rows]`.
        start: 1 where a distinct row starts from the patch's stream, `[distinct, positions or 1]`.
        groups: the groups that the place reads.
        few: weights of differences that are written out, `[distinct, positions or 1, n_few]`.
        latents: weights of single latents.
        remainders: weights of remainders, `[distinct, positions or 1]`, by group.
    """

    rows: Tensor
    touched: Tensor
    start: Tensor
    groups: tuple[str, ...]
    few: Tensor
    latents: tuple[LatentPart, ...]
    remainders: tuple[tuple[str, Tensor], ...]

    def apply(self, differences: Differences, stage: int, x: Tensor) -> Tensor:
        """Return the distinct rows' inputs, `[distinct, batch, seq, d_model]`, in the dtype of `x`."""
        own = x.to(wide(x.dtype))
        n = self.start.shape[0]
        out = own.expand(n, *own.shape)
        if bool(self.start.any()):
            other = differences.patch.stream(stage).to(own.dtype).expand_as(own)
            out = torch.where(self.start[:, None, :, None] > 0, other, out)
        out = out.clone(memory_format=torch.contiguous_format)
        used = (self.few.detach() != 0).flatten(0, 1).any(0)
        if bool(used.any()) or self.few.requires_grad:
            written, weights = differences.few(self.groups, own), self.few.to(own.dtype)
            if not self.few.requires_grad and int(used.sum()) * 4 < len(used):
                idx = used.nonzero().flatten()
                written, weights = written.index_select(0, idx), weights.index_select(-1, idx)
            if weights.shape[1] == 1:
                out.flatten(1).addmm_(weights[:, 0], written.flatten(1))
            else:
                out += torch.einsum("upc,cbpd->ubpd", weights, written)
        for part in self.latents:
            _add_latents(out, differences, part)
        for group, weights in self.remainders:
            out += weights[:, None, :, None] * differences.remainder(group)
        return out.to(x.dtype)


def _add_latents(out: Tensor, differences: Differences, part: LatentPart) -> None:
    """Add `(w ⊙ Δc) @ D` to the rows of `out [distinct, batch, seq, d_model]`, in place."""
    source = differences.sources[part.group]
    columns = differences.columns(part.group)
    weights, idx = part.weights.to(out.dtype), part.idx
    columns = columns if idx is None else columns.index_select(-1, idx)
    if part.rows is None and columns.shape[-1] > 256:
        changed = active(columns)
        if len(changed) < columns.shape[-1]:
            columns, weights = columns.index_select(-1, changed), weights.index_select(-1, changed)
            idx = changed if idx is None else idx[changed]
    directions = source.picked(idx)
    at_once = max(1, CHUNK // max(1, columns.numel()))
    for start in range(0, len(weights), at_once):
        weighted = weights[start : start + at_once, None] * columns
        weighted = weighted.expand(-1, *out.shape[1:3], -1)
        if part.rows is not None:
            out.index_add_(0, part.rows, source.write(weighted, directions))
        elif directions.ndim == 2:
            rows = out[start : start + at_once]
            rows.flatten(0, 2).addmm_(weighted.flatten(0, 2), directions)
        else:
            out[start : start + at_once] += source.write(weighted, directions)


def plan(masks: Tensor, groups: Sequence[SourceGroup]) -> Mix:
    """Plan the rows of one reading place.

    Args:
        masks: how much of the patch each edge carries, `[n_rows, positions or 1, n_sources]`.
        groups: the sources' groups, in order.
    """
    learning = masks.requires_grad
    if learning:
        rows = torch.arange(len(masks), device=masks.device)
        distinct = masks
    else:
        distinct, rows = torch.unique(masks, dim=0, return_inverse=True)
    few: list[Tensor] = []
    latents: list[LatentPart] = []
    remainders: list[tuple[str, Tensor]] = []
    first = 0
    for group in groups:
        mask = distinct[..., first : first + group.n]
        first += group.n
        if group.kind != "latents":
            few.append(mask)
            continue
        base = torch.zeros_like(mask[..., 0]) if learning else (mask.mean(-1) > 0.5).to(mask.dtype)
        few.append(base[..., None])
        latents += _latent_parts(group.name, mask[..., : group.n_columns] - base[..., None], learning)
        if group.remainder is not None:
            left = mask[..., -1] - base
            if learning or bool((left != 0).any()):
                remainders.append((group.name, left))
    weights = torch.cat(few, -1)
    start = torch.zeros_like(weights[..., 0])
    if not learning:
        start = (weights.mean(-1) > 0.5).to(weights.dtype)
        weights = weights - start[..., None]
    touched = torch.ones_like(rows, dtype=torch.bool) if learning else (masks != 0).flatten(1).any(1)
    names = tuple(group.name for group in groups)
    return Mix(rows, touched, start, names, weights, tuple(latents), tuple(remainders))


def _latent_parts(group: str, weights: Tensor, learning: bool) -> list[LatentPart]:
    """Plan one site's latents: all rows in one product, or row by row where rows have few in common."""
    if learning:
        return [LatentPart(group, None, None, weights)]
    there = (weights != 0).any(1)
    by_row = there.sum(1)
    together = int(there.any(0).sum())
    if together == 0:
        return []
    all_rows = together * int((by_row > 0).sum())
    if all_rows < ALONE or int(by_row.sum()) * 4 >= all_rows:
        idx = there.any(0).nonzero().flatten()
        return [LatentPart(group, None, idx, weights[..., idx])]
    parts: list[LatentPart] = []
    for row in by_row.nonzero().flatten():
        idx = there[row].nonzero().flatten()
        parts.append(LatentPart(group, row[None], idx, weights[row, :, idx][None]))
    return parts


def plan_circuit(layout: EdgeLayout, masks: Mapping[str, Tensor], device: torch.device) -> dict[str, Mix]:
    """Plan every reading place: `blocks.3.attn`, `blocks.3.mlp`, `end`; untouched places are left out.

    Args:
        layout: which edges there are.
        masks: destination → how much of the patch each edge carries, `[(seq,) (heads,) n_sources]`.
        device: where the plan is used.
    """
    places: dict[str, list[Tensor]] = {}
    groups: dict[str, list[SourceGroup]] = {}
    for destination in layout.destinations:
        mask = masks[destination.name]
        mask = mask.to(device, torch.promote_types(mask.dtype, torch.float32))
        if layout.seq_len is None:
            mask = mask[None]
        mask = mask if destination.heads is not None else mask.unsqueeze(1)
        place = destination.name.rpartition(".")[0] or destination.name
        places.setdefault(place, []).append(mask.transpose(0, 1))
        groups[place] = layout.groups_before(destination)
    stacked = {place: torch.cat(parts) for place, parts in places.items()}
    return {
        place: plan(mask, groups[place])
        for place, mask in stacked.items()
        if mask.requires_grad or bool((mask != 0).any())
    }
