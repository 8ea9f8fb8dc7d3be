"""What ablated sources and nodes write instead: of another prompt, nothing, a mean, or what is given.

"The other prompts" are the corrupt ones when clean prompts run, and the clean ones when corrupt prompts run
(edge patching). Constants (biases) are written whatever happens.

| ablation | what is written instead |
|---|---|
| `resample` | what the other prompt writes |
| `zero` | nothing |
| `mean` | the mean over the dataset's corrupt prompts of the same length, position by position |
| `mean_clean`, `mean_both` | the same over its clean prompts, over both |
| `mean_batch` | the mean over the other prompts of this batch, position by position |
| `mean_positions` | the mean over the other prompts of this batch and their positions |

The last two depend on how prompts are put into batches. Every ablation is linear in what was recorded,
so the parts of a mean still add up: for a site `x = Σ cᵢDᵢ + b + e`, the mean error is what the mean input
leaves over of the mean coefficients.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from auto_circuit.data.prompts import PromptBatch, PromptDataset
from auto_circuit.errors import InputError, unknown_name
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import AutoencoderTransformer
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.patching.sources import SourceValues, completed_values, no_values, sources_of
from auto_circuit.patching.stream_run import record

Values = Mapping[str, Tensor]


class Ablation(StrEnum):
    """What ablated nodes write (see the module's docstring)."""

    RESAMPLE = "resample"
    ZERO = "zero"
    MEAN = "mean"
    MEAN_CLEAN = "mean_clean"
    MEAN_BOTH = "mean_both"
    MEAN_BATCH = "mean_batch"
    MEAN_POSITIONS = "mean_positions"

    @classmethod
    def named(cls, name: Any) -> "Ablation":
        """Return the ablation called `name`, or an error that lists them."""
        if name not in set(cls):
            raise unknown_name("ablation", str(name), set(cls))
        return cls(name)


#: Which prompts of the dataset a mean is over.
_MEANS = {
    Ablation.MEAN: ("corrupt",),
    Ablation.MEAN_CLEAN: ("clean",),
    Ablation.MEAN_BOTH: ("clean", "corrupt"),
}

#: An ablation, its name, or the values that `record` of a recorder returned.
AnyAblation: TypeAlias = Any


def ablation_name(ablation: AnyAblation) -> str:
    """What files and tables call an ablation."""
    return "given" if isinstance(ablation, SourceValues | Mapping) else str(Ablation.named(ablation))


@runtime_checkable
class Recorder(Protocol):
    """What runs prompts and says what was written, as tensors `[batch, seq, …]` by name."""

    device: torch.device

    def record(self, tokens: Tensor) -> Values:
        """Run `tokens [batch, seq]`."""
        ...

    def nothing(self) -> Values:
        """What is recorded when nothing but constants is written, `[1, 1 or seq, …]`."""
        ...

    def completed(self, values: Values) -> Values:
        """Return given values with everything derived that follows from others."""
        ...


class Ablator:
    """Makes the values that ablated sources or nodes write in each batch.

    Args:
        recorder: what runs prompts.
        prompts: the dataset that means are taken over.
        ablation: an `Ablation`, its name, or values recorded before, written in every batch.
        batch_size: for the passes that take means over the dataset.
    """

    def __init__(
        self, recorder: Recorder, prompts: PromptDataset, ablation: AnyAblation, batch_size: int = 32
    ) -> None:
        self.recorder = recorder
        given: Any = ablation.tensors if isinstance(ablation, SourceValues) else ablation
        self._given: Values | None = given if isinstance(given, Mapping) else None
        self.ablation = None if self._given is not None else Ablation.named(ablation)
        self._means: dict[int, Values] = {}
        if self.ablation is not None and self.ablation in _MEANS:
            self._means = self._take_means(prompts, _MEANS[self.ablation], batch_size)

    @torch.no_grad()
    def patches(self, batch: PromptBatch, other: str = "corrupt") -> Values:
        """Return what is written instead in a batch; `other` names its other prompts."""
        length = batch.clean.shape[1]
        if self._given is not None:
            return self.recorder.completed(_checked_given(self._given, self.recorder.nothing(), batch))
        if self.ablation in _MEANS:
            return self._means[length]
        if self.ablation is Ablation.ZERO:
            return self.recorder.nothing()
        values = self.recorder.record(getattr(batch, other))
        if self.ablation is Ablation.RESAMPLE:
            return values
        dims = [0] if self.ablation is Ablation.MEAN_BATCH else [0, 1]
        return {name: value.mean(dims, keepdim=True) for name, value in values.items()}

    @torch.no_grad()
    def _take_means(
        self, prompts: PromptDataset, which: tuple[str, ...], batch_size: int
    ) -> dict[int, Values]:
        sums: dict[int, dict[str, Tensor]] = {}
        counts: dict[int, int] = {}
        for batch in prompts.batches(batch_size, self.recorder.device):
            length = batch.clean.shape[1]
            for side in which:
                values = self.recorder.record(getattr(batch, side))
                before = sums.get(length, {})
                counts[length] = counts.get(length, 0) + len(batch)
                sums[length] = {name: _add(value, before.get(name)) for name, value in values.items()}
        return {
            length: {name: value / counts[length] for name, value in by_name.items()}
            for length, by_name in sums.items()
        }


def _checked_given(given: Values, expected: Values, batch: PromptBatch) -> Values:
    """Refuse given values of another model, number of prompts or tokens than a batch has.

    Raises:
        InputError: naming the first that does not fit.
    """
    missing = sorted(name for name in expected if name not in given)
    if missing:
        raise InputError(f"The given activations lack {missing[:4]}; record them with the same model.")
    for name, like in expected.items():
        value = given[name]
        if not isinstance(value, Tensor) or value.ndim != like.ndim or value.shape[2:] != like.shape[2:]:
            has = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"The given activation {name}: expected a tensor [batch, seq, {like.shape[-1]}], given "
                f"{has}; record it with the same model."
            )
        if not bool(value.isfinite().all()):
            raise InputError(f"The given activation {name} is not finite.")
        if value.shape[0] not in (1, len(batch)) or value.shape[1] not in (1, batch.clean.shape[1]):
            raise InputError(
                f"The given activation {name} is for {value.shape[0]} prompts of {value.shape[1]} tokens; "
                f"this batch has {len(batch)} of {batch.clean.shape[1]}. Give activations of one prompt, or "
                f"of one batch."
            )
    return given


def _add(value: Tensor, total: Tensor | None) -> Tensor:
    summed = value.sum(0, keepdim=True, dtype=torch.promote_types(value.dtype, torch.float32))
    return summed if total is None else total + summed


class GraphRecorder:
    """Records what the sources of a graph write, by name (`SourceValues.tensors`).

    `{group}:total` is what a group writes together, `{group}:coefficients` heads' `z` or latents'
    coefficients. Given back as an ablation, changed or not, they say what ablated edges carry: totals of
    heads follow from their coefficients, the streams from all totals, and an error is what a site's total
    leaves over of its latents: to change what latents write alone, change the total with them.
    """

    def __init__(self, graph: CircuitGraph) -> None:
        self.graph = graph
        self.sources = sources_of(graph)
        self.device = graph.device

    def record(self, tokens: Int[Tensor, "batch seq"]) -> Values:
        """Run `tokens` without gradients."""
        return record(self.graph, self.sources, tokens).tensors

    def nothing(self) -> Values:
        """Only constants."""
        return no_values(self.graph, self.sources).tensors

    def completed(self, values: Values) -> Values:
        """Derive totals of heads and streams."""
        return completed_values(self.graph, self.sources, values).tensors


@dataclass(frozen=True)
class SitePatch:
    """What a site's nodes become when ablated.

    Attributes:
        coefficients: `[batch or 1, seq or 1, n_latents]`.
        x: the SAE's input made of them, `[batch or 1, seq or 1, n_inputs]`.
    """

    coefficients: Float[Tensor, "batch seq n_latents"]
    x: Float[Tensor, "batch seq n_inputs"]


class SiteRecorder:
    """Records the coefficients and the input of every SAE: `{site}:coefficients`, `{site}:x`."""

    def __init__(self, spliced: AutoencoderTransformer) -> None:
        self.spliced = spliced
        self.device = spliced.device

    def record(self, tokens: Int[Tensor, "batch seq"]) -> Values:
        """Run `tokens` without gradients."""
        inputs = site_inputs(self.spliced, tokens)
        return _site_values({n: (self.spliced.saes[n].coefficients(x), x) for n, x in inputs.items()})

    def nothing(self) -> Values:
        """No latent, no error: the SAEs' constant biases."""
        return _site_values({name: _zero(sae) for name, sae in self.spliced.saes.items()})

    def completed(self, values: Values) -> Values:
        """Nothing follows from anything else here."""
        return values


def site_patches(values: Values) -> dict[str, SitePatch]:
    """Return what each site becomes, from a `SiteRecorder`'s values."""
    sites = [name.removesuffix(":x") for name in values if name.endswith(":x")]
    return {site: SitePatch(values[f"{site}:coefficients"], values[f"{site}:x"]) for site in sites}


def _site_values(by_site: Mapping[str, tuple[Tensor, Tensor]]) -> Values:
    values: dict[str, Tensor] = {}
    for name, (coefficients, x) in by_site.items():
        values |= {f"{name}:coefficients": coefficients, f"{name}:x": x}
    return values


def site_inputs(
    spliced: AutoencoderTransformer, tokens: Int[Tensor, "batch seq"]
) -> dict[str, Float[Tensor, "batch seq n_inputs"]]:
    """Run `tokens` without gradients and return every SAE's input, in the SAE's dtype."""
    inputs: dict[str, Tensor] = {}

    def recorder(name: str, sae: SparseAutoencoder):
        def record_input(x: Tensor, out: Tensor) -> Tensor:
            inputs[name] = x.detach().to(sae.bias.dtype)
            return out

        return record_input

    edits = {name: recorder(name, sae) for name, sae in spliced.saes.items()}
    with torch.no_grad(), spliced.edits(edits):
        spliced.model(tokens, **spliced.only_needed_layers())
    return inputs


def _zero(sae: SparseAutoencoder) -> tuple[Tensor, Tensor]:
    bias = sae.constant_bias.detach()
    shape = (1, sae.seq_len or 1)
    return bias.new_zeros(*shape, sae.n_latents), bias.expand(*shape, -1)
