"""How much memory an attribution needs, before it runs.

Counted, in bytes: the scores; what two runs record of the sources (coefficients of every latent, totals) and
their difference; the gradients at the readers; the activations that autograd keeps; working tensors.
Parameters are there already. The estimate is meant to be right within a factor of two.
"""

import os
from dataclasses import dataclass

import torch

from auto_circuit.errors import InputError
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.prune_algos.contraction import CHUNK

GIB = 2**30
#: Prompts in a pass, unless memory or somebody says otherwise.
USUAL_BATCH = 32
#: Working tensors of the contraction and the mixing, in numbers.
WORK = 8 * CHUNK


@dataclass(frozen=True)
class Need:
    """What an attribution needs.

    Attributes:
        fixed: bytes however many prompts run together.
        per_prompt: bytes for each prompt of a batch.
        limit: bytes that may be used.
        seq_len: tokens of the longest prompt.
        n_edges: number of edges.
    """

    fixed: int
    per_prompt: int
    limit: int
    seq_len: int
    n_edges: int

    @classmethod
    def of(cls, graph: CircuitGraph, seq_len: int, *, limit: float | None = None) -> "Need":
        """Estimate for prompts of `seq_len` tokens.

        Args:
            graph: the graph.
            seq_len: tokens of the longest prompt.
            limit: GiB that may be used; None: four fifths of what is free.
        """
        if limit is not None and limit <= 0:
            raise InputError(f"memory_limit is in GiB and positive; given {limit}.")
        cfg = graph.model.cfg
        d_model, heads = cfg.d_model, cfg.n_heads * cfg.d_head
        latents = sum(g.n_columns for g in graph.layout.groups if g.kind == "latents")
        groups, layers = len(graph.layout.groups), len(graph.blocks)
        d_mlp = getattr(cfg, "d_mlp", None) or 4 * d_model
        recorded = 3 * (latents + groups * (d_model + heads // 2))
        gradients = 2 * layers * (3 * heads + 2 * d_model)
        # Norms, projections, scores, MLP: what a block keeps for its backward pass.
        kept = layers * (10 * d_model + 6 * heads + 6 * d_mlp + 3 * cfg.n_heads * seq_len)
        written = graph.layout.n_sources - latents
        logits = 4 * cfg.d_vocab
        per_token = 4 * (recorded + gradients + kept + written * d_model // 4 + logits)
        width = 8 if graph.n_edges <= 10**7 else 4
        fixed = graph.n_edges * (width + 8) + 4 * WORK
        free = _free_bytes(graph.device) * 4 // 5 if limit is None else int(limit * GIB)
        return cls(fixed, per_token * seq_len, free, seq_len, graph.n_edges)

    def bytes(self, batch_size: int) -> int:
        """Bytes needed with so many prompts in a pass."""
        return self.fixed + batch_size * self.per_prompt

    def tokens_at_once(self, batch_size: int) -> int:
        """How many tokens may wait to be contracted together."""
        spare = max(0, self.limit - self.bytes(batch_size)) // 2
        return min(4096, max(1, int(spare / self.per_prompt * self.seq_len)))


def chosen_batch_size(need: Need, asked: int | None) -> int:
    """Return the batch size to use.

    Raises:
        InputError: when not even that fits, with the number of GiB and what would make it fit.
    """
    if asked is not None and asked < 1:
        raise InputError(f"batch_size must be at least 1; given {asked}.")
    size = asked or USUAL_BATCH
    if asked is None:
        while size > 1 and need.bytes(size) > need.limit:
            size //= 2
    if need.bytes(size) <= need.limit:
        return size
    scores = need.fixed / GIB
    rest = size * need.per_prompt / GIB
    smaller = "batch_size smaller than " + str(size) if size > 1 else "shorter prompts"
    raise InputError(
        f"Scoring {need.n_edges:,} edges on {size} prompts of {need.seq_len} tokens needs about "
        f"{need.bytes(size) / GIB:.1f} GiB ({scores:.1f} for scores and work, {rest:.1f} for the passes); "
        f"{need.limit / GIB:.1f} may be used. Prune latents first (prune_latents(prompts, max_latents)), use "
        f"a graph without per_position, {smaller}, or set memory_limit (GiB) if there is more."
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not said on this system
        return 8 * GIB
