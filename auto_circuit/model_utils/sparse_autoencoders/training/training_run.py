"""One training run: its coders, optimisers and data, step by step to the published SAEs."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from auto_circuit.errors import InputError, TrainingError
from auto_circuit.model_utils.sparse_autoencoders.checkpoints import save_saes
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
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
    mean_over,
    n_processes,
    process_index,
    total_over,
)
from auto_circuit.model_utils.sparse_autoencoders.training.published import published
from auto_circuit.model_utils.sparse_autoencoders.training.run_folder import TrainingFolder

Metrics = dict[str, Any]

#: Batches that initial values are computed from.
_FIRST = 8

#: Activations that published SAEs are measured on, and BatchTopK's threshold is set on.
_MEASURED = 16_384


class TrainingRun:
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
        self.local_steps = config.n_steps
        if config.loss != "local":
            share = 1.0 if config.loss == "end_to_end" else config.end_to_end_share
            self.local_steps = config.n_steps - round(share * config.n_steps)
        # End-to-end training needs some rows too, for initial values.
        total = max(self.local_steps, _FIRST) * config.batch_size
        self.buffer = ShuffleBuffer(
            rows, min(max(config.buffer_tokens, config.batch_size), total), self.generator, total
        )
        self.device = torch.device("cpu") if model is None else next(model.parameters()).device
        self.coders = {site: make_coder(width, config).to(self.device) for site, width in rows.widths.items()}
        self.optimisers = {site: _adam(coder) for site, coder in self.coders.items()}
        self._text_start = rows.state()
        self.step = 0
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
            first = self.buffer.first(self.config.batch_size * _FIRST)
            for site, coder in self.coders.items():
                _check_finite(site, first[site])
                coder.start(first[site].to(self.device), self.generator)
            return
        missing = [part for part in ("coders", "optimisers", "buffer") if part not in state]
        if missing:
            raise TrainingError(f"The checkpoint has no {', '.join(missing)}. Delete it to start again.")
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
            raise TrainingError(
                f"The loss of {site} is not finite at step {self.step + 1} of {self.config.n_steps}. "
                f"{self._kept()} Give a lower learning_rate (it is {self._rate_text()}), or look for NaN "
                f"in the model's activations."
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
        """Return the SAEs as published, measured on activations of the training text, and write them."""
        rows = self._last_rows()
        saes: dict[str, SparseAutoencoder] = {}
        final: Metrics = {name: value for name, value in metrics.items() if "/" not in name}
        for site, coder in self.coders.items():
            broken = [name for name, p in coder.named_parameters() if not p.isfinite().all()]
            if broken:
                raise TrainingError(
                    f"After the last step {', '.join(broken)} of {site} are not finite. {self._kept()} "
                    f"Give a lower learning_rate (it is {coder.rate:g})."
                )
            saes[site], measured = published(site, coder, rows[site].to(self.device), self.identity)
            final |= {f"{site}/{name}": value for name, value in measured.items()}
        if self.folder is not None:
            save_saes(saes, self.folder.path)
            self.folder.finish(final)
        return saes

    def _last_rows(self) -> dict[str, Tensor]:
        """Return some thousand activations of the training text."""
        if self.local_steps == self.config.n_steps:
            return self.buffer.first(_MEASURED)
        return {site: own[:_MEASURED] for site, own in self.rows.next_rows().items()}

    def _kept(self) -> str:
        return "Nothing was saved." if self.folder is None else self.folder.last_good()


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
