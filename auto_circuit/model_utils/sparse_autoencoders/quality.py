"""How good SAEs are on some text: sparsity, reconstruction, what the model loses, unused and doubled latents.

1. One pass of the plain model, up to the last site. Every SAE stands in its place and is run, and hands on
   its input unchanged: latents, reconstruction and activation are of the same pass.
2. With losses, a second round over the same tokens: the plain model, then for each site, alone, its
   activation replaced by the SAE's reconstruction, by zeros, by its mean of step 1. The mean must be known
   first, hence the second round; of the first, token ids are kept (10 bytes a token) and nothing else that
   grows with their number. Logits live for one batch.
3. Near copies among the decoder's directions.

What counts. A position counts when its token is not excluded (and is among the first `n_tokens` such).
Positions that do not count are in no sum, and *keep their activation* in every replaced run, as in SAELens'
evaluation: SAEs are rarely trained on BOS, whose activation can be a thousand times larger than others and
on which attention rests. A prediction counts when its position counts and the token that follows is there
and not excluded. Pad on the right, with an excluded token.

Formulas, with sums over counted tokens, `x` the activation, `x̂` the reconstruction, `r = x − x̂`:

- `FVU = Σ‖r‖² / Σ‖x − x̄‖²`, with `x̄` the mean over *all* counted tokens; explained variance is `1 − FVU`.
- Not the mean over tokens (or batches) of `1 − ‖r‖²/‖x − x̄_batch‖²`, which SAEBench published and SAELens
  keeps as `explained_variance_legacy`: it weighs tokens by the inverse of their variance, and depends on
  how tokens are put into batches.
- Nor `1 − Σ‖r − r̄‖²/Σ‖x − x̄‖²` (dictionary_learning), which forgives a constant offset of every
  reconstruction. That is `1 − FVU·(1 − residual_bias)` in what is reported here.
- `loss recovered = (ablated − spliced) / (ablated − plain)`, of mean cross-entropies;
  `KL recovered = 1 − KL(plain ‖ spliced) / KL(plain ‖ ablated)`. Neither is given where its denominator is
  noise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from auto_circuit.errors import InputError, listed
from auto_circuit.graph.circuit_graph import refuse_dropout
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
    AutoencoderTransformer,
    SaesBySite,
    sae_model,
)
from auto_circuit.model_utils.sparse_autoencoders.quality_results import RunLoss, SiteLosses, SiteQuality
from auto_circuit.model_utils.sparse_autoencoders.quality_sums import (
    Moments,
    ReferenceLogits,
    SiteSums,
    near_copies,
)
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder

#: What stands in the place of a site's activation, one run each.
_RUNS = ("spliced", "zero", "mean")

Edit = Callable[[Tensor, Tensor], Tensor]


def sae_quality(
    model: Any,
    saes: SaesBySite,
    tokens: Iterable[Tensor],
    *,
    excluded: Iterable[int] | None = None,
    n_tokens: int | None = None,
    losses: bool = True,
    duplicates_above: float = 0.9,
    dense_above: float = 0.1,
    progress: bool = True,
) -> dict[str, SiteQuality]:
    """Measure SAEs on tokens: each at its own site, in the plain model (formulas: module docstring).

    Args:
        model: a `TransformerBridge`, or (TransformerLens 3) a `HookedTransformer`; given back as it was.
        saes: site → SAE, as `load_saes` returns; also what else `sae_model` takes.
        tokens: batches of token ids, each `[rows, seq]`, the rows of a batch of one length. Larger batches
            are faster, and need memory for logits `[rows, seq, vocab]` twice. Read once.
        excluded: token ids whose positions do not count and keep their activation; None: all special ids of
            the model's tokenizer, where it has one. `()` counts, and replaces, every position.
        n_tokens: stop after so many counted tokens; None: use all.
        losses: measure what the model loses too: 1 + 3·sites further passes.
        duplicates_above: the cosine above which two directions are near copies, from 0 up to below 1.
        dense_above: the share of tokens above which a latent is dense, from 0 up to below 1.
        progress: show bars.

    Returns:
        Site → its quality, in the order in which sites run.

    Raises:
        UnknownNameError: for a site that does not exist.
        InputError: for an SAE that does not fit its site or has other latents at each position, tokens of
            another shape or outside the vocabulary, none that counts, activations or losses that are not
            finite (naming the site), or a model in training mode with dropout.
        SpliceError: when the model is spliced already.
    """
    for name, share in {"duplicates_above": duplicates_above, "dense_above": dense_above}.items():
        if not 0 <= share < 1:  # NaN too
            raise InputError(f"{name} must be at least 0 and below 1; given {share}.")
    if n_tokens is not None and n_tokens < 1:
        raise InputError(f"n_tokens must be at least 1, or None for all; given {n_tokens}.")
    spliced = sae_model(model, saes, error_nodes=False)
    for name, sae in spliced.saes.items():
        if sae.seq_len is not None:
            raise InputError(
                f"The SAE at {name} has latents of its own at each of {sae.seq_len} positions, so that "
                f"frequencies and copies of a latent are not defined. Measure it before pruning per position."
            )
    refuse_dropout(model)
    ids = _excluded_ids(model, excluded)
    batches = _batches(tokens, ids, n_tokens, model.cfg.d_vocab)
    with torch.inference_mode(False), torch.no_grad(), spliced:
        sums, seen = _activations(spliced, batches, losses, n_tokens, progress)
        n_counted = next(iter(sums.values())).inputs.n
        if n_counted == 0:
            raise InputError(
                f"No token counts: none was given, or all are among the excluded ids "
                f"({listed([str(i) for i in ids.tolist()])}). Give more tokens, or excluded=()."
            )
        measured = _losses(spliced, seen, sums, progress) if losses else {}
        return {
            name: _result(sae, sums[name], measured.get(name), duplicates_above, dense_above)
            for name, sae in spliced.saes.items()
        }


# ---- tokens ---------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """Tokens `[rows, seq]`, the positions that count, and those whose token is not excluded."""

    tokens: Tensor
    counted: Tensor
    allowed: Tensor

    def to(self, device: torch.device) -> "_Batch":
        return _Batch(*(tensor.to(device) for tensor in self))

    @property
    def predicted(self) -> Bool[Tensor, "rows seq"]:
        """Positions that count and are followed by a token that is not excluded."""
        follows = self.allowed.roll(-1, 1)
        follows[:, -1] = False
        return self.counted & follows


def _excluded_ids(model: Any, excluded: Iterable[int] | None) -> Int[Tensor, " n"]:
    special = getattr(getattr(model, "tokenizer", None), "all_special_ids", None) or ()
    ids = special if excluded is None else excluded
    return torch.tensor(sorted({int(i) for i in ids}), dtype=torch.long)


def _batches(
    tokens: Iterable[Tensor], excluded: Tensor, n_tokens: int | None, d_vocab: int
) -> Iterator[_Batch]:
    """Yield batches on the CPU, without rows that do not count, until `n_tokens` positions counted."""
    left = n_tokens
    for given in tokens:
        batch = _checked(given, d_vocab).cpu()
        allowed = ~torch.isin(batch, excluded)
        counted = allowed
        if left is not None:
            counted = allowed & (allowed.flatten().cumsum(0).view_as(allowed) <= left)
            left -= int(counted.sum())
        rows = counted.any(1)
        if rows.any():
            yield _Batch(batch[rows], counted[rows], allowed[rows])
        if left == 0:
            return


def _checked(batch: Any, d_vocab: int) -> Tensor:
    if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.dtype != torch.long:
        what = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise InputError(
            f"tokens is an iterable of int64 batches [rows, seq]; one of them is {what}. Of one tensor "
            f"[rows, seq], make batches with tokens.split(8)."
        )
    if batch.numel() and not 0 <= int(batch.min()) <= int(batch.max()) < d_vocab:
        raise InputError(
            f"Token ids go from 0 to {d_vocab - 1}; a batch has ids from {int(batch.min())} to "
            f"{int(batch.max())}. Were they made by another model's tokenizer?"
        )
    return batch


# ---- first round: activations ---------------------------------------------------------------------


class _Probe:
    """Adds up what one SAE reads, makes and writes, and hands its input on."""

    def __init__(self, name: str) -> None:
        self.sums = SiteSums(name)
        self.counted = torch.empty(0)
        self._latents = torch.empty(0)

    def keep_latents(self, _module: Any, _args: Any, latents: Tensor) -> None:
        """Forward hook of the SAE's `latents`."""
        self._latents = latents

    def edit(self, x: Float[Tensor, "*batch d"], out: Float[Tensor, "*batch d"]) -> Tensor:
        """Edit of the SAE's output, which comes after its latents."""
        # Neurons as latents are active below zero too.
        self.sums.add(x[self.counted], out[self.counted], (self._latents != 0)[self.counted])
        self._latents = torch.empty(0)
        return x


def _activations(
    spliced: AutoencoderTransformer,
    batches: Iterable[_Batch],
    keep: bool,
    n_tokens: int | None,
    progress: bool,
) -> tuple[dict[str, SiteSums], list[_Batch]]:
    """Run the plain model up to the last site; return what was summed, and the batches where asked."""
    probes = {name: _Probe(name) for name in spliced.saes}
    handles = [
        sae.latents.register_forward_hook(probes[name].keep_latents) for name, sae in spliced.saes.items()
    ]
    seen: list[_Batch] = []
    try:
        with (
            spliced.edits({name: probe.edit for name, probe in probes.items()}),
            tqdm(total=n_tokens, desc="activations", unit="token", disable=not progress) as bar,
        ):
            for batch in batches:
                if keep:
                    seen.append(batch)
                for probe in probes.values():
                    probe.counted = batch.counted.to(spliced.device)
                spliced.model(batch.tokens.to(spliced.device), **spliced.only_needed_layers())
                bar.update(int(batch.counted.sum()))
    finally:
        for handle in handles:
            handle.remove()
    return {name: probe.sums for name, probe in probes.items()}, seen


# ---- second round: losses -------------------------------------------------------------------------


class _RunSums:
    """What one kind of run adds up to: by how much each loss rises, and the KL."""

    def __init__(self) -> None:
        self.rise = Moments()
        self.kl = 0.0


def _untouched(x: Tensor, _out: Tensor) -> Tensor:
    return x


def _replaced(counted: Tensor, value: Tensor | None, x: Tensor, out: Tensor) -> Tensor:
    """Put `value [n_inputs]`, or the SAE's output, in the place of `x` where positions count."""
    new = out if value is None else value.to(x.dtype)
    return torch.where(counted.unsqueeze(-1), new, x)


def _losses(
    spliced: AutoencoderTransformer, batches: list[_Batch], sums: dict[str, SiteSums], progress: bool
) -> dict[str, SiteLosses]:
    """Run the plain model, and each site replaced alone; compare losses and distributions."""
    n_predictions = sum(int(batch.predicted.sum()) for batch in batches)
    if n_predictions == 0:
        raise InputError(
            "No prediction counts: no counted token is followed by one that is not excluded. Give longer "
            "rows, or losses=False."
        )
    plain = Moments()
    runs = {name: {run: _RunSums() for run in _RUNS} for name in spliced.saes}
    total = len(batches) * (1 + len(_RUNS) * len(runs))
    with tqdm(total=total, desc="losses", unit="pass", disable=not progress) as bar:
        for batch in (kept.to(spliced.device) for kept in batches):
            with spliced.with_error_nodes(True):
                logits = _run(spliced, batch, {})
            reference = ReferenceLogits(logits, batch.tokens, batch.counted, batch.predicted)
            plain.add(reference.losses)
            bar.update()
            for name, by_run in runs.items():
                mean = sums[name].inputs.mean
                values = {"spliced": None, "zero": torch.zeros_like(mean), "mean": mean}
                for run, run_sums in by_run.items():
                    run_losses, kl = reference.compare(_replaced_run(spliced, batch, name, values[run]))
                    run_sums.rise.add(run_losses - reference.losses)
                    run_sums.kl += kl
                    bar.update()
    n_counted = next(iter(sums.values())).inputs.n
    return {name: _site_losses(name, plain, by_run, n_counted) for name, by_run in runs.items()}


def _replaced_run(
    spliced: AutoencoderTransformer, batch: _Batch, name: str, value: Tensor | None
) -> Float[Tensor, "rows seq vocab"]:
    """Return logits with one site replaced by `value [n_inputs]`, or (None) by its SAE's reconstruction."""
    with spliced.with_error_nodes(True):
        spliced.saes[name].error_nodes = value is not None  # the other sites' SAEs need not run
        return _run(spliced, batch, {name: partial(_replaced, batch.counted, value)})


def _run(
    spliced: AutoencoderTransformer, batch: _Batch, edits: Mapping[str, Edit]
) -> Float[Tensor, "rows seq vocab"]:
    """Return logits with edits at some sites; whatever is hooked to the other SAEs, they are plain."""
    with spliced.edits({**dict.fromkeys(spliced.saes, _untouched), **edits}):
        return spliced.model(batch.tokens)


def _site_losses(name: str, plain: Moments, runs: dict[str, _RunSums], n_counted: int) -> SiteLosses:
    results = {}
    for run, sums in runs.items():
        loss, kl = float(plain.mean + sums.rise.mean), sums.kl / n_counted
        if not torch.tensor([loss, kl]).isfinite().all():
            raise InputError(
                f"{name}: logits of the {run} run, or of the plain model, are NaN or infinite on these "
                f"tokens. Try a wider dtype, or losses=False."
            )
        n = sums.rise.n
        error = (sums.rise.about_mean / (n * (n - 1))) ** 0.5 if n > 1 else None
        results[run] = RunLoss(loss, error, kl)
    return SiteLosses(n_predictions=plain.n, plain=float(plain.mean), **results)


# ---- results --------------------------------------------------------------------------------------


def _result(
    sae: SparseAutoencoder,
    sums: SiteSums,
    losses: SiteLosses | None,
    duplicates_above: float,
    dense_above: float,
) -> SiteQuality:
    n = sums.inputs.n
    variance, residual = sums.inputs.about_mean, sums.residuals.about_zero
    n_duplicates, largest_cosine = near_copies(sae, duplicates_above)
    return SiteQuality(
        n_tokens=n,
        l0=int(sums.n_active.sum()) / n,
        fvu=residual / variance if variance else None,
        residual_bias=sums.residuals.mean_square / residual if residual else None,
        norm=sums.norm / n,
        norm_ratio=sums.norm_ratio / sums.n_nonzero if sums.n_nonzero else None,
        cosine=sums.cosine / sums.n_nonzero if sums.n_nonzero else None,
        frequency=(sums.n_active.double() / n).cpu(),
        latent_ids=sae.latent_ids.cpu().clone(),
        dense_above=dense_above,
        duplicates_above=duplicates_above,
        n_duplicates=n_duplicates,
        largest_cosine=largest_cosine,
        losses=losses,
    )
