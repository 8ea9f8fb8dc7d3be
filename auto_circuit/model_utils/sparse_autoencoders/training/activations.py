"""Activations of many sites from one forward pass, and the buffer that mixes them.

Rows are token positions: row `i` of every site is the same token of the same text. Special tokens
(BOS, padding, …) are left out. With several processes each runs its own passes and all get all rows, in
the order in which one process would make them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from auto_circuit.data.text import TokenSource, special_ids
from auto_circuit.errors import InputError
from auto_circuit.model_utils.hooked_model import hooked_model
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import AutoencoderTransformer
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.model_utils.sparse_autoencoders.training.processes import (
    gathered,
    n_processes,
    process_index,
)

#: Passes in a row without a single row before giving up.
_EMPTY_PASSES = 100


@runtime_checkable
class RowSource(Protocol):
    """Rows of activations in an order that can be resumed.

    Attributes:
        widths: site → width.
    """

    widths: dict[str, int]

    def next_rows(self) -> dict[str, Tensor]:
        """Return the next rows of every site, `[m, width]` float32 each, as many as come at once."""
        ...

    def state(self) -> dict[str, Any]:
        """Return where the source is, for JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be where `state()` was taken."""
        ...

    def description(self) -> dict[str, Any]:
        """Say what is read, for JSON: equal descriptions give equal rows."""
        ...


def at_sites(model: Any, sites: Sequence[str]) -> AutoencoderTransformer:
    """Put stand-ins of one latent at sites, which let `edits` see and set what passes there.

    Raises:
        UnknownNameError: for a site that does not exist.
        InputError: for no sites, or one twice.
    """
    hooked = hooked_model(model)
    names = [sites] if isinstance(sites, str) else list(sites)
    device = next(model.parameters()).device
    stand_ins = {}
    for name in names:
        site = hooked.site(name)
        if site.name in stand_ins:
            raise InputError(f"{name} was given twice (as {site.name}); give each site once.")
        shapes = {"bias": (site.width,), "latent_bias": (1,)}
        shapes |= {"encode_weight": (1, site.width), "decode_weight": (site.width, 1)}
        zeros = {part: torch.zeros(shape, device=device) for part, shape in shapes.items()}
        stand_ins[site.name] = SparseAutoencoder.from_state_dict(HookPoint(), zeros)
    if not stand_ins:
        raise InputError("No sites were given. `auto-circuit hooks` lists those of a model.")
    return AutoencoderTransformer(model, stand_ins)


class ModelActivations:
    """Activations from forward passes of the model, stopping after the last site.

    Args:
        model: a TransformerLens model.
        sites: names or aliases of sites.
        tokens: where tokens come from.
        tokens_per_pass: about how many tokens a pass has.
        excluded: token ids whose positions are left out; None: the tokenizer's special tokens.
    """

    def __init__(
        self,
        model: Any,
        sites: Sequence[str],
        tokens: TokenSource,
        tokens_per_pass: int = 4_096,
        excluded: Sequence[int] | None = None,
    ) -> None:
        self._placed = at_sites(model, sites)
        self.tokens, self._tokens_per_pass = tokens, tokens_per_pass
        self.excluded = special_ids(model) if excluded is None else sorted(excluded)
        self.widths = {name: site.width for name, site in self._placed.sites.items()}
        self._seen: dict[str, Tensor] = {}

    def next_rows(self) -> dict[str, Tensor]:
        """See `RowSource`."""
        processes = n_processes()
        for _ in range(_EMPTY_PASSES):
            batches = [self.tokens.next_batch(self._tokens_per_pass) for _ in range(processes)]
            mine = self.run(batches[process_index()])
            rows = {name: gathered(own) for name, own in mine.items()}
            if len(next(iter(rows.values()))) > 0:
                return rows
        raise InputError(
            f"{_EMPTY_PASSES} passes of the text had nothing but special tokens ({self.excluded}), which are "
            f"left out. Check the text and the tokenizer."
        )

    @torch.no_grad()
    def run(self, tokens: Int[Tensor, "rows seq"]) -> dict[str, Tensor]:
        """Return the activations at the counted positions of `tokens`, `[m, width]` for each site."""
        tokens = tokens.to(self._placed.device)
        counted = is_counted(tokens, self.excluded)
        with self._placed.edits({name: partial(self._look, name) for name in self.widths}):
            self._placed.model(tokens, **self._placed.only_needed_layers())
        seen, self._seen = self._seen, {}
        return {name: seen[name].flatten(0, 1)[counted.flatten()].float() for name in self.widths}

    def _look(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        self._seen[name] = x
        return out

    def state(self) -> dict[str, Any]:
        """See `RowSource`."""
        return self.tokens.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `RowSource`."""
        self.tokens.restore(state)

    def description(self) -> dict[str, Any]:
        """See `RowSource`."""
        return {
            "tokens": self.tokens.description(),
            "excluded": self.excluded,
            "tokens_per_pass": self._tokens_per_pass,
        }


def is_counted(tokens: Int[Tensor, "rows seq"], excluded: Sequence[int]) -> Tensor:
    """Return which positions count, `[rows, seq]`: those of tokens that are not excluded."""
    return ~torch.isin(tokens, torch.tensor(list(excluded), dtype=tokens.dtype, device=tokens.device))


class ShuffleBuffer:
    """Mixes rows: each batch is drawn at random from those held, and new rows take its places.

    Args:
        rows: where rows come from.
        capacity: rows held.
        generator: of the choice.
        total: rows that will be drawn: no more are asked for, and the buffer empties. None: no end.
    """

    def __init__(
        self, rows: RowSource, capacity: int, generator: torch.Generator, total: int | None = None
    ) -> None:
        self.rows, self.capacity, self._generator = rows, capacity, generator
        self._held: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._free = torch.arange(capacity)  # places that were drawn, in the order in which they are filled
        self._to_come = total

    def next_batch(self, n: int) -> dict[str, Tensor]:
        """Return `n` rows of every site, `[n, width]`."""
        self.fill()
        is_full = torch.ones(self.capacity, dtype=torch.bool)
        is_full[self._free] = False
        full = is_full.nonzero().flatten()
        slots = full[torch.randperm(len(full), generator=self._generator)[:n]]
        self._free = torch.cat([self._free, slots])
        return {name: held[slots.to(held.device)] for name, held in self._held.items()}

    def fill(self) -> None:
        """Fill the free places, as long as rows are to come."""
        while len(self._free) > 0 and self._to_come != 0:
            if not self._pending or len(next(iter(self._pending.values()))) == 0:
                self._pending = self.rows.next_rows()
            n = min(len(self._free), len(next(iter(self._pending.values()))))
            n = n if self._to_come is None else min(n, self._to_come)
            slots, self._free = self._free[:n], self._free[n:]
            for name, new in self._pending.items():
                if name not in self._held:
                    self._held[name] = new.new_zeros(self.capacity, new.shape[1])
                self._held[name].index_copy_(0, slots.to(new.device), new[:n])
            self._pending = {name: new[n:] for name, new in self._pending.items()}
            self._to_come = None if self._to_come is None else self._to_come - n

    def first(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """Return up to `n` rows without taking them: those held, and ones drawn that nothing has replaced."""
        self.fill()
        return {name: held[:n] for name, held in self._held.items()}

    def state(self) -> dict[str, Any]:
        """Return everything that decides the next batches; tensors are shared, not copied."""
        return {
            "held": dict(self._held),
            "pending": {name: rows.clone() for name, rows in self._pending.items()},
            "free": self._free,
            "to_come": self._to_come,
            "generator": self._generator.get_state(),
            "rows": self.rows.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be where `state()` was taken."""
        self._held, self._pending = dict(state["held"]), dict(state["pending"])
        self._free, self._to_come = state["free"], state["to_come"]
        self._generator.set_state(state["generator"])
        self.rows.restore(state["rows"])
