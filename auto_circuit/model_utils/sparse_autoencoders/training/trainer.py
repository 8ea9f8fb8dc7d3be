"""Training SAEs at many sites of a model at once.

1. One forward pass of the model gives the activations of all sites, which a shared buffer mixes.
2. Each step draws a batch, computes every site's loss and gradients, and updates it with Adam; the rate
   rises at first and falls at the end.
3. End-to-end steps run the model with all SAEs in place on a batch of tokens instead (`end_to_end`).
4. Metrics go to the bar, to `metrics.jsonl` and to callbacks; checkpoints hold everything that the next
   step depends on, so that a resumed run ends in the same bits.

Under `torchrun` the processes share each batch and average gradients: the run is that of one process.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from auto_circuit.data.text import token_source
from auto_circuit.errors import InputError, TrainingError
from auto_circuit.model_utils.sparse_autoencoders.checkpoints import load_saes, save_saes
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.model_utils.sparse_autoencoders.training.activation_cache import (
    CachedActivations,
    record_activations,
)
from auto_circuit.model_utils.sparse_autoencoders.training.activations import (
    ModelActivations,
    RowSource,
    ShuffleBuffer,
)
from auto_circuit.model_utils.sparse_autoencoders.training.architectures import make_coder
from auto_circuit.model_utils.sparse_autoencoders.training.coder import Coder, Losses
from auto_circuit.model_utils.sparse_autoencoders.training.config import TrainingConfig
from auto_circuit.model_utils.sparse_autoencoders.training.end_to_end import EndToEndLoss
from auto_circuit.model_utils.sparse_autoencoders.training.interruption import interruptible
from auto_circuit.model_utils.sparse_autoencoders.training.processes import (
    any_of,
    average_gradients,
    from_first,
    join,
    mean_over,
    n_processes,
    process_index,
    total_over,
)
from auto_circuit.model_utils.sparse_autoencoders.training.run_folder import TrainingFolder

Metrics = dict[str, Any]


def train_saes(
    model: Any,
    sites: Sequence[str] | str | None,
    text: Any,
    config: TrainingConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    cache: str | Path | None = None,
    cache_tokens: int | None = None,
    log_every: int = 20,
    checkpoint_seconds: float = 120.0,
    progress: bool = True,
    callbacks: Sequence[Callable[[Metrics], None]] = (),
) -> dict[str, SparseAutoencoder]:
    """Train an SAE at each site, all from the same forward passes.

    Args:
        model: a TransformerLens model; given back as it was. None with `CachedActivations` as text.
        sites: names or aliases of sites (`blocks.6.hook_mlp_out`, …). None: all of the cached activations.
        text: what to run the model on: a text file or folder, a dataset, strings, a `PromptDataset`, a
            list of these, also with shares (see `auto_circuit.data.text.token_source`); or
            `CachedActivations`.
        config: how to train; the defaults when None.
        out: folder of the run: settings, metrics, checkpoints, and at the end the SAEs in SAELens' layout
            (`load_saes(out)` reads them). None: nothing is written.
        resume: go on with the run in `out` where there is one; a finished one is loaded.
        cache: folder in which activations are kept: recorded first (or used, if they are there), then
            trained on. Without it they are computed while training and never stored.
        cache_tokens: activations of each site to record, gone round several times where `n_tokens` is more;
            None: `n_tokens`.
        log_every: steps between metrics.
        checkpoint_seconds: seconds between checkpoints; one is also written on an interrupt.
        progress: show a bar.
        callbacks: called with each step's metrics, a flat dict of numbers such as `wandb.log` takes
            (`step`, `tokens`, and for each site `SITE/loss`, `/fvu`, `/l0`, `/dead`).

    Returns:
        Site → SAE, on the CPU in float32; `metadata` says how it was trained.

    Raises:
        InputError: for text, folders or settings that do not fit, naming them.
        UnknownNameError: for a site that does not exist.
        TrainingError: when a loss is not finite, with the step, the site and the last checkpoint.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    config = config or TrainingConfig()
    device = torch.device("cpu") if model is None else next(model.parameters()).device
    join(device)
    rows = _row_source(model, sites, text, config)
    n_cached = None if cache is None else config.n_tokens if cache_tokens is None else cache_tokens
    settings = {
        "config": config.as_dict(),
        "sites": dict(rows.widths),
        "data": {**rows.description(), "cached": n_cached},
        "model": _model_identity(model),
    }
    folder = _folder(out, settings, resume)
    if from_first(folder is not None and folder.is_done):
        return load_saes(Path(out or ""))
    if cache is not None and n_cached is not None and isinstance(rows, ModelActivations):
        made_of = {"model": settings["model"]}
        recorded = record_activations(rows, cache, n_cached, made_of, progress=progress)
        rows = CachedActivations(recorded.folder, list(rows.widths), config.seed)
    run = _Training(model, rows, config, folder, settings["model"])
    return run.run(log_every, checkpoint_seconds, progress, callbacks)


def _folder(out: str | Path | None, settings: Mapping[str, Any], resume: bool) -> TrainingFolder | None:
    """Open the run's folder in the first process; all processes raise what it raises."""
    folder, error = None, None
    if out is not None and process_index() == 0:
        try:
            folder = TrainingFolder(out, settings, resume=resume)
        except InputError as found:
            error = str(found)
    error = from_first(error)
    if error is not None:
        raise InputError(error)
    return folder


def _row_source(model: Any, sites: Any, text: Any, config: TrainingConfig) -> RowSource:
    if isinstance(text, CachedActivations):
        wanted = [sites] if isinstance(sites, str) else sites
        return CachedActivations(text.folder, list(text.widths if wanted is None else wanted), config.seed)
    if model is None or sites is None:
        raise InputError("Training on text needs a model and sites; only CachedActivations do without.")
    tokens = token_source(model, text, context_length=config.context_length, seed=config.seed)
    return ModelActivations(model, sites, tokens, config.tokens_per_pass)


def _model_identity(model: Any) -> dict[str, Any]:
    from auto_circuit.runs import fingerprint

    if model is None:
        return {}
    cfg = model.cfg
    return {"name": str(getattr(cfg, "model_name", "")), "fingerprint": fingerprint(model)}


class _Training:
    """One run: coders, optimisers, data, and what a checkpoint holds."""

    def __init__(
        self,
        model: Any,
        rows: RowSource,
        config: TrainingConfig,
        folder: TrainingFolder | None,
        identity: Mapping[str, Any],
    ) -> None:
        self.rows, self.config, self.folder, self.identity = rows, config, folder, identity
        self.generator = torch.Generator().manual_seed(config.seed)
        capacity = max(config.batch_size, min(config.buffer_tokens, config.n_tokens))
        self.buffer = ShuffleBuffer(rows, capacity, self.generator)
        self.device = torch.device("cpu") if model is None else next(model.parameters()).device
        self.coders = {site: make_coder(width, config).to(self.device) for site, width in rows.widths.items()}
        self.optimisers = {site: _adam(coder) for site, coder in self.coders.items()}
        self._text_start = rows.state()
        self.step = 0
        self.local_steps = config.n_steps
        if config.loss != "local":
            share = 1.0 if config.loss == "end_to_end" else config.end_to_end_share
            self.local_steps = config.n_steps - round(share * config.n_steps)
        self._end_to_end: EndToEndLoss | None = None
        if self.local_steps < config.n_steps:
            if not isinstance(rows, ModelActivations):
                raise InputError(
                    "End-to-end losses run the model on text; cached activations cannot give them."
                )
            self._end_to_end = EndToEndLoss(model, self.coders, rows.excluded, config.downstream)
        if config.batch_size % n_processes():
            raise InputError(
                f"batch_size = {config.batch_size} must be a multiple of the {n_processes()} processes."
            )

    # ---- running --------------------------------------------------------------------------------

    def run(
        self,
        log_every: int,
        checkpoint_seconds: float,
        progress: bool,
        callbacks: Sequence[Callable[[Metrics], None]],
    ) -> dict[str, SparseAutoencoder]:
        """Train to the end; return the SAEs."""
        self._begin()
        total = self.config.n_steps
        saved = time.monotonic()
        metrics: Metrics = {}
        shown = progress and process_index() == 0
        with (
            interruptible() as interrupted,
            torch.enable_grad(),
            tqdm(total=total, initial=self.step, disable=not shown, unit="step") as bar,
        ):
            while self.step < total:
                losses, extra = self._one_step()
                self.step += 1
                bar.update()
                if self.step % log_every == 0 or self.step == total:
                    metrics = self._metrics(losses, extra)
                    bar.set_postfix(_summary(metrics, self.coders))
                    if self.folder is not None:
                        self.folder.log(metrics)
                    for callback in callbacks if process_index() == 0 else ():
                        callback(metrics)
                stop = any_of(interrupted.is_set(), self.device)
                due = stop or time.monotonic() - saved > checkpoint_seconds
                if due and self.step < total:
                    self._save()
                    saved = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
        return self._finish(metrics)

    def _begin(self) -> None:
        """Go on from the checkpoint, or set initial values."""
        state = self.folder.load() if self.folder is not None else None
        state = from_first(state)
        if state is None:
            first = self.buffer.first(self.config.batch_size * 8)
            for site, coder in self.coders.items():
                _check_finite(site, first[site])
                coder.start(first[site].to(self.device), self.generator)
            return
        self.step = state["step"]
        for site, coder in self.coders.items():
            coder.load_state_dict(state["coders"][site])
            self.optimisers[site].load_state_dict(state["optimisers"][site])
        if self.step < self.local_steps:
            self.buffer.restore(state["buffer"])
        else:
            self.rows.restore(state["buffer"]["rows"])

    def _one_step(self) -> tuple[dict[str, Losses], Metrics]:
        """Update every coder once; return what the batch cost."""
        rate = self.config.rate_at(self.step)
        for site, optimiser in self.optimisers.items():
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = rate * self.coders[site].rate
        if self.step < self.local_steps:
            losses, extra, n_rows = self._local()
        else:
            losses, extra, n_rows = self._whole()
        for site, own in losses.items():
            average_gradients(self.coders[site].parameters())
            self.optimisers[site].step()
            fired = total_over(own.fired.to(torch.int32)) > 0
            self.coders[site].after_step(float(mean_over(own.l0)), fired, n_rows)
        return losses, extra

    def _local(self) -> tuple[dict[str, Losses], Metrics, int]:
        batch = self.buffer.next_batch(self.config.batch_size)
        losses: dict[str, Losses] = {}
        for site, coder in self.coders.items():
            own = batch.pop(site)[process_index() :: n_processes()].to(self.device)
            losses[site] = coder(own)
            self._check(site, losses[site].total)
            losses[site].total.backward()
        return losses, {}, self.config.batch_size

    def _whole(self) -> tuple[dict[str, Losses], Metrics, int]:
        """Return the losses of an end-to-end step, of about `batch_size` tokens."""
        if self._end_to_end is None or not isinstance(self.rows, ModelActivations):
            raise TypeError("end-to-end steps need a model")
        if self.step == self.local_steps:
            # From the beginning of the text: where the buffer has got to differs with the processes.
            self.rows.restore(self._text_start)
        tokens = self.rows.tokens.next_batch(self.config.batch_size)
        if len(tokens) < n_processes():
            raise InputError(
                f"An end-to-end batch of {self.config.batch_size} tokens has {len(tokens)} rows, too few for "
                f"{n_processes()} processes. Give a larger batch_size."
            )
        found = self._end_to_end(tokens[process_index() :: n_processes()])
        for site, own in found.sites.items():
            self._check(site, own.total)
        self._check("all sites", found.total)
        found.total.backward()
        extra = {"kl": float(mean_over(found.kl)), "downstream": float(mean_over(found.downstream))}
        return found.sites, extra, tokens.numel()

    def _check(self, site: str, loss: Tensor) -> None:
        """Stop at a loss that is not finite."""
        if any_of(not bool(loss.detach().isfinite()), self.device):
            saved = self.folder.checkpoint_step() if self.folder is not None else None
            where = "no checkpoint was saved"
            if self.folder is not None and saved is not None:
                where = f"the last good checkpoint, of step {saved}, is in {self.folder.path}"
            raise TrainingError(
                f"The loss of {site} is not finite at step {self.step + 1} of {self.config.n_steps}; "
                f"{where}. Give a lower learning_rate (it is {self._rate_text()}), or look for NaN in the "
                f"model's activations."
            )

    def _rate_text(self) -> str:
        return ", ".join(sorted({f"{coder.rate:g}" for coder in self.coders.values()}))

    # ---- results --------------------------------------------------------------------------------

    def _metrics(self, losses: Mapping[str, Losses], extra: Metrics) -> Metrics:
        metrics: Metrics = {"step": self.step, "tokens": self.step * self.config.batch_size, **extra}
        for site, own in losses.items():
            coder = self.coders[site]
            metrics[f"{site}/loss"] = float(mean_over(own.total))
            metrics[f"{site}/fvu"] = float(mean_over(own.fvu))
            metrics[f"{site}/l0"] = float(mean_over(own.l0))
            metrics[f"{site}/dead"] = float(coder.dead.float().mean())
        return metrics

    def _save(self) -> None:
        if self.folder is None:
            return
        self.folder.save(
            {
                "step": self.step,
                "coders": {site: coder.state_dict() for site, coder in self.coders.items()},
                "optimisers": {site: optimiser.state_dict() for site, optimiser in self.optimisers.items()},
                "buffer": self.buffer.state(),
            }
        )

    def _finish(self, metrics: Metrics) -> dict[str, SparseAutoencoder]:
        saes = {site: coder.to_sae() for site, coder in self.coders.items()}
        for site, sae in saes.items():
            sae.metadata = {"format": "sae_lens", "cfg": {"metadata": self._card(site, metrics)}}
        if self.folder is not None:
            save_saes(saes, self.folder.path)
            self.folder.finish(metrics)
        return saes

    def _card(self, site: str, metrics: Metrics) -> dict[str, Any]:
        """Return what the SAE's file says of its training."""
        coder = self.coders[site]
        return {
            "model_name": self.identity.get("name", ""),
            "hook_name": site,
            "context_size": self.config.context_length,
            "training_architecture": self.config.architecture,
            "l0": metrics.get(f"{site}/l0"),
            "num_dead_features": int(coder.dead.sum()),
            "auto_circuit": {"config": self.config.as_dict(), "fvu": metrics.get(f"{site}/fvu")},
        }


def _adam(coder: Coder) -> torch.optim.Optimizer:
    """Return Adam for a coder; with the small constant of Gao et al. 2024, since losses are means."""
    return torch.optim.Adam(coder.parameters(), lr=coder.rate, eps=6.25e-10, fused=True)


def _summary(metrics: Metrics, coders: Mapping[str, Coder]) -> dict[str, str]:
    """Return means over sites for the bar."""
    shown = {}
    for name, layout in (("loss", ".4f"), ("l0", ".1f"), ("fvu", ".4f"), ("dead", ".1%")):
        values = [metrics[f"{site}/{name}"] for site in coders]
        shown[name] = format(sum(values) / len(values), layout)
    return shown | {name: f"{metrics[name]:.4f}" for name in ("kl", "downstream") if name in metrics}


def _check_finite(site: str, rows: Tensor) -> None:
    if not rows.isfinite().all():
        raise TrainingError(
            f"The activations at {site} have {int((~rows.isfinite()).sum())} values that are not finite, "
            f"before the first step. Check the model's weights and dtype."
        )
