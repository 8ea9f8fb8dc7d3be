"""Training SAEs at many sites of a model at once.

1. One forward pass of the model gives the activations of all sites, which a shared buffer mixes.
2. Each step draws a batch, computes every site's loss and gradients, and updates it with Adam; the rate
   rises at first and falls at the end.
3. End-to-end steps run the model with all SAEs in place on a batch of tokens instead (`end_to_end`).
4. Metrics go to the bar, to `metrics.jsonl` and to callbacks; checkpoints hold everything that the next
   step depends on, so that a resumed run ends in the same bits.

Under `torchrun` the processes share each batch and average gradients: the run is that of one process.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from auto_circuit.data.text import token_source
from auto_circuit.errors import InputError
from auto_circuit.model_utils.hooked_model import hooked_model
from auto_circuit.model_utils.sparse_autoencoders.checkpoints import load_saes
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.model_utils.sparse_autoencoders.training.activation_cache import (
    CachedActivations,
    record_activations,
)
from auto_circuit.model_utils.sparse_autoencoders.training.activations import (
    ModelActivations,
    RowSource,
)
from auto_circuit.model_utils.sparse_autoencoders.training.config import TrainingConfig
from auto_circuit.model_utils.sparse_autoencoders.training.processes import (
    from_first,
    join,
    process_index,
)
from auto_circuit.model_utils.sparse_autoencoders.training.run_folder import TrainingFolder
from auto_circuit.model_utils.sparse_autoencoders.training.training_run import Metrics, TrainingRun


def train_saes(
    model: Any,
    sites: Sequence[str] | str | None,
    text: Any,
    config: Any = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    cache: str | Path | None = None,
    cache_tokens: Any = None,
    log_every: Any = 20,
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
        config: how to train, a `TrainingConfig`; the defaults when None.
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
    config = TrainingConfig() if config is None else config
    _check_options(model, config, cache, cache_tokens, log_every)
    device = torch.device("cpu") if model is None else next(model.parameters()).device
    join(device)
    rows = _row_source(model, sites, text, config)
    for width in rows.widths.values():
        config.latents_of(width)
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
    with torch.inference_mode(False):
        run = TrainingRun(model, rows, config, folder, settings["model"])
        return run.run(log_every, checkpoint_seconds, progress, callbacks)


def _check_options(model: Any, config: Any, cache: Any, cache_tokens: Any, log_every: Any) -> None:
    """Refuse what cannot be, before anything is read or written."""
    if not isinstance(config, TrainingConfig):
        raise InputError(f"config must be a TrainingConfig; given {type(config).__name__}.")
    if model is not None:
        hooked_model(model)
    for name, value in {"log_every": log_every, "cache_tokens": cache_tokens}.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (name == "cache_tokens" and value is None):
            raise InputError(f"{name} must be a whole number of at least 1; given {value!r}.")
    if cache_tokens is not None and cache is None:
        raise InputError("cache_tokens says how much goes into the cache; give its folder, cache=DIR, too.")
    if cache is not None and config.loss != "local":
        raise InputError(
            f"End-to-end losses run the model on text; cached activations cannot give them. Leave cache out "
            f"for loss={config.loss!r}."
        )


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
