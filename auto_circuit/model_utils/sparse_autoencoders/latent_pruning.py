"""Keep the latents that a dataset uses, and say what it costs to drop the others.

1. One pass over the prompts adds up every latent's absolute activation, stopping at the last site.
2. Each SAE keeps its own active latents, largest total (or largest attribution) first.
3. The SAEs are pruned, all of them or, after an error or an interrupt until the end, none.
4. A second pass measures `KL(unpruned ‖ pruned)` of the logits with the reconstructions in place of the
   activations, that is without error nodes (with them it is zero by construction).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from auto_circuit.data.prompts import PromptDataset
from auto_circuit.errors import InputError
from auto_circuit.graph.nodes import NodeScores
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class SitePruning:
    """What pruning did to one SAE.

    Attributes:
        n_before: latents before.
        n_active: latents that were active anywhere (per position: at that position, the most).
        n_kept: latents now (per position).
        dropped_share: share of the total activation that the dropped latents had.
    """

    n_before: int
    n_active: int
    n_kept: int
    dropped_share: float


@dataclass(frozen=True)
class PruningResult:
    """What pruning did.

    Attributes:
        sites: by site.
        kl: mean over prompts and positions of `KL(unpruned ‖ pruned)` in nats, both without error
            nodes; None when it was not measured.
        n_prompts: how many prompts were run, corrupt ones included.
    """

    sites: dict[str, SitePruning]
    kl: float | None
    n_prompts: int

    def __str__(self) -> str:
        width = max(len(name) for name in self.sites)
        rows = [f"{'site':{width}}  before  active    kept  activation dropped"]
        rows += [
            f"{name:{width}}  {s.n_before:6}  {s.n_active:6}  {s.n_kept:6}  {s.dropped_share:18.2%}"
            for name, s in self.sites.items()
        ]
        kl = "not measured" if self.kl is None else f"{self.kl:.3g} nats"
        return "\n".join([*rows, f"KL(unpruned ‖ pruned) without error nodes: {kl}"])


def prune_latents(
    spliced: Any,
    prompts: PromptDataset,
    max_latents: int | None = None,
    *,
    per_position: bool = False,
    include_corrupt: bool = True,
    order_by: NodeScores | None = None,
    measure_kl: bool = True,
    batch_size: int = 32,
    progress: bool = True,
) -> PruningResult:
    """Prune every SAE of a spliced model, in place, to the latents that the prompts make active.

    Args:
        spliced: an `AutoencoderTransformer`. Latents are counted in the model as it is spliced, with or
            without error nodes.
        prompts: the dataset.
        max_latents: the most that each SAE keeps (at each position); None: all that are active.
        per_position: keep other latents at each token position; prompts of one length only. Positions
            with fewer active latents are filled with inactive ones, by lowest index.
        include_corrupt: count the corrupt prompts too.
        order_by: rank active latents by absolute score instead of total activation; scores of
            `node_attribution` on the same SAEs.
        measure_kl: run the second pass.
        batch_size: prompts in a pass.
        progress: show a bar.

    Raises:
        InputError: for max_latents below 1, prompts of several lengths per position, or scores of other
            SAEs.
    """
    if max_latents is not None and max_latents < 1:
        raise InputError(f"max_latents must be at least 1, or None for no limit; given {max_latents}.")
    lengths = sorted(set(prompts.lengths))
    if per_position and len(lengths) > 1:
        raise InputError(
            f"Pruning per position needs prompts of one length; these have {lengths} tokens. Choose prompts "
            f"of one length (prompts.subset), or prune with per_position=False."
        )
    runs = 2 if include_corrupt else 1
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        spliced.edits({}),
        tqdm(total=len(prompts) * runs * (2 if measure_kl else 1), disable=not progress) as bar,
    ):
        totals = _total_activation(spliced, prompts, per_position, include_corrupt, batch_size, bar)
        kept = {
            name: _kept(name, sae, totals[name], max_latents, order_by) for name, sae in spliced.saes.items()
        }
        sites = {name: _summary(sae, totals[name], kept[name]) for name, sae in spliced.saes.items()}
        whole = {name: sae.snapshot() for name, sae in spliced.saes.items()}
        try:
            for name, sae in spliced.saes.items():
                sae.prune_latents(kept[name])
            kl = _kl(spliced, prompts, whole, include_corrupt, batch_size, bar) if measure_kl else None
        except BaseException:
            for name, sae in spliced.saes.items():
                sae.restore(whole[name])
            raise
    return PruningResult(sites, kl, len(prompts) * runs)


def _tokens(prompts: PromptDataset, include_corrupt: bool, batch_size: int, device: Any) -> Iterator[Tensor]:
    for batch in prompts.batches(batch_size, device):
        yield batch.clean
        if include_corrupt:
            yield batch.corrupt


def _total_activation(
    spliced: Any,
    prompts: PromptDataset,
    per_position: bool,
    include_corrupt: bool,
    batch_size: int,
    bar: Any,
) -> dict[str, Tensor]:
    """Return each SAE's summed absolute latents, `[(seq,) n_latents]`, float64 on the CPU."""
    totals: dict[str, Tensor] = {}

    def counter(name: str, sae: SparseAutoencoder) -> Callable[[Any, Any, Tensor], None]:
        # Weights that differ by position make other latents of each position.
        dims = (0,) if per_position or sae.seq_len is not None else (0, 1)

        def count(_module: Any, _args: Any, z: Tensor) -> None:
            dtype = torch.promote_types(z.dtype, torch.float32)
            summed = torch.linalg.vector_norm(z, 1, dims, dtype=dtype).double().cpu()
            totals[name] = summed if name not in totals else totals[name] + summed

        return count

    with _forward_hooks(spliced, {name: counter(name, sae) for name, sae in spliced.saes.items()}):
        for tokens in _tokens(prompts, include_corrupt, batch_size, spliced.device):
            spliced.model(tokens, **spliced.only_needed_layers())
            bar.update(len(tokens))
    return totals


@contextmanager
def _forward_hooks(spliced: Any, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Have a forward hook on each SAE's `latents`."""
    handles = [spliced.saes[name].latents.register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(
    name: str, sae: SparseAutoencoder, total: Tensor, max_latents: int | None, order_by: NodeScores | None
) -> Tensor:
    """Return the indices to keep, `[k]` or `[seq, k]`, best first."""
    if not total.isfinite().all():
        raise InputError(
            f"Latents at {name} are not finite on these prompts: {int((~total.isfinite()).sum())} are NaN or "
            f"infinity. Check the weights of the model and of the SAE."
        )
    rank = total
    if order_by is not None:
        scored = order_by.sites.get(name)
        if scored is None or scored.latents.shape[-1] != sae.n_latents:
            given = {site: scores.latents.shape[-1] for site, scores in order_by.sites.items()}
            raise InputError(
                f"order_by has no scores for the {sae.n_latents} latents at {name}; it has {given}."
            )
        rank = scored.latents.abs().double()
        if rank.ndim == total.ndim == 2 and len(rank) != len(total):
            raise InputError(
                f"order_by has scores for {len(rank)} positions; these prompts have {len(total)} tokens."
            )
        rank = rank.sum(0) if rank.ndim > total.ndim else rank.expand_as(total)
    active = total > 0
    # Active latents first, by rank; then inactive ones by index (the sort is stable).
    key = torch.where(active, rank, torch.full_like(rank, -1.0))
    order = key.argsort(dim=-1, descending=True, stable=True)
    k = int(active.sum(-1).max())
    return order[..., : k if max_latents is None else min(k, max_latents)]


def _kl(
    spliced: Any,
    prompts: PromptDataset,
    whole: Mapping[str, Any],
    include_corrupt: bool,
    batch_size: int,
    bar: Any,
) -> float:
    """Mean over prompts and positions of KL(unpruned ‖ pruned), without error nodes, in nats.

    Args:
        spliced: with pruned SAEs.
        prompts: the dataset.
        whole: snapshots of the SAEs before pruning.
        include_corrupt: whether corrupt prompts count.
        batch_size: prompts in a pass.
        bar: the progress bar.
    """
    pruned = {name: sae.snapshot() for name, sae in spliced.saes.items()}

    def log_probs(tokens: Tensor, state: Mapping[str, Any]) -> Tensor:
        for name, sae in spliced.saes.items():
            sae.restore(state[name])
        return spliced.model(tokens).float().log_softmax(-1)

    total, n_tokens = 0.0, 0
    with spliced.with_error_nodes(False):
        for tokens in _tokens(prompts, include_corrupt, batch_size, spliced.device):
            before, after = log_probs(tokens, whole), log_probs(tokens, pruned)
            total += float(torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum"))
            n_tokens += tokens.numel()
            bar.update(len(tokens))
    return total / n_tokens


def _summary(sae: SparseAutoencoder, total: Tensor, kept: Tensor) -> SitePruning:
    everything = float(total.sum())
    dropped = everything - float(total.gather(-1, kept).sum())
    return SitePruning(
        n_before=sae.n_latents,
        n_active=int((total > 0).sum(-1).max()),
        n_kept=kept.shape[-1],
        dropped_share=max(dropped, 0.0) / everything if everything else 0.0,
    )
