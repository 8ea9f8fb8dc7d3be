"""How much memory an attribution needs, before it runs.

Counted, in bytes: the scores; what two runs record of the sources (coefficients of every latent, totals) and
their difference; the gradients at the readers; the activations that autograd keeps; working tensors.
Parameters are there already. The estimate is made to err on the high side, by two to three times where the
passes weigh most.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from auto_circuit.errors import InputError
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.prune_algos.contraction import CHUNK

GIB = 2**30
#: Prompts in a pass, unless memory or somebody says otherwise.
USUAL_BATCH = 32


@dataclass(frozen=True)
class Need:
    """What an attribution needs.

    Attributes:
        fixed: bytes however many prompts run together.
        per_prompt: bytes for each prompt of a batch.
        limit: bytes that may be used.
        with_latents: whether there are latents that could be pruned.
        per_position: whether edges are per position.
        seq_len: tokens of the longest prompt.
        n_edges: number of edges.
    """

    fixed: int
    per_prompt: int
    limit: int
    with_latents: bool
    per_position: bool
    seq_len: int
    n_edges: int

    @classmethod
    def of(cls, graph: CircuitGraph, seq_len: int, *, limit: float | int | None = None) -> "Need":
        """Estimate for prompts of `seq_len` tokens.

        Args:
            graph: the graph.
            seq_len: tokens of the longest prompt.
            limit: GiB that may be used; None: four fifths of what is free.
        """
        if limit is not None and not limit > 0:  # NaN too
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
        # Working tensors: a chunk of latents against a place's heads, and what is written out.
        work = 3 * min(CHUNK, latents * 3 * heads) + min(4 * CHUNK, written * d_model * seq_len)
        fixed = graph.n_edges * (width + 8) + 4 * work
        free = _free_bytes(graph.device) * 4 // 5 if limit is None else int(min(limit, 2.0**40) * GIB)
        per_prompt = per_token * seq_len
        by_position = graph.seq_len is not None
        return cls(fixed, per_prompt, free, latents > 0, by_position, seq_len, graph.n_edges)

    def bytes(self, batch_size: int) -> int:
        """Bytes needed with so many prompts in a pass."""
        return self.fixed + batch_size * self.per_prompt

    def tokens_at_once(self, batch_size: int) -> int:
        """How many tokens may wait to be contracted together."""
        spare = max(0, self.limit - self.bytes(batch_size)) // 2
        return min(4096, max(1, int(spare / self.per_prompt * self.seq_len)))


def chosen_batch_size(need: Need, asked: int | None, n_prompts: int | None = None) -> int:
    """Return the batch size to use: what was asked for, or what fits; at most the number of prompts.

    Raises:
        InputError: when not even that fits, with the number of GiB and what would make it fit.
    """
    if asked is not None and (not isinstance(asked, int) or asked < 1):
        raise InputError(f"batch_size must be at least 1; given {asked}.")
    size = min(asked or USUAL_BATCH, n_prompts or USUAL_BATCH if asked is None else n_prompts or asked)
    if asked is None:
        fitting = (need.limit - need.fixed) // max(1, need.per_prompt)
        size = max(1, min(size, fitting))
    if need.bytes(size) <= need.limit:
        return size
    options = ["prune latents first (prune_latents(prompts, max_latents))"] * need.with_latents
    options += ["use a graph without per_position"] * need.per_position
    if need.fixed < need.limit:
        options.append(f"use a batch_size smaller than {size}" if size > 1 else "use shorter prompts")
    options.append("set memory_limit (GiB) if there is more")
    prompts = f"{size} prompts" if size > 1 else "1 prompt"
    raise InputError(
        f"Scoring {need.n_edges:,} edges on {prompts} of {need.seq_len} tokens needs about "
        f"{need.bytes(size) / GIB:.3g} GiB ({need.fixed / GIB:.3g} for scores and work, "
        f"{size * need.per_prompt / GIB:.3g} for the passes); {need.limit / GIB:.3g} GiB may be used. To "
        f"make it fit: {'; '.join(options)}."
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError, IndexError):  # Linux says what is free and what can be freed
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        return found[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not said on this system
        return 8 * GIB
