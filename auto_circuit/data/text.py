"""Tokens to run a model on without prompt pairs: text in contexts of one length, and prompts as they are.

A token source yields batches `[rows, length]` for ever, starting again when its text ends, and can be put
back to where it was (`state`, `restore`), so that an interrupted run goes on with the very next batch.

- Each text file is one document, and so is each record of JSON lines and of datasets. Documents are read and
  tokenised piece by piece; each ends with the tokenizer's EOS where it has one, and those without a token are
  left out. The stream of tokens is cut into contexts, each with BOS first where the tokenizer has one.
- Prompts are batches of one length, clean and corrupt, in an order that is drawn anew each time round.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from auto_circuit.data.documents import Documents, documents_of
from auto_circuit.data.prompts import PromptDataset
from auto_circuit.errors import InputError

#: Tokens of a context, where the model reads as many.
_CONTEXT = 128


@runtime_checkable
class TokenSource(Protocol):
    """Batches of tokens in an order that can be resumed."""

    def next_batch(self, n_tokens: int) -> Tensor:
        """Return the next token ids, `[rows, length]`, about `n_tokens` of them, at least one row."""
        ...

    def state(self) -> dict[str, Any]:
        """Return where the source is, for JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be where `state()` was taken."""
        ...

    def description(self) -> dict[str, Any]:
        """Say what is read, for JSON: equal descriptions give equal batches.

        Datasets are told apart by their names or fingerprints, other iterables only by their type.
        """
        ...


def special_ids(model: Any) -> list[int]:
    """Return the ids of the tokenizer's special tokens (BOS, EOS, padding, …), sorted; none without one."""
    return sorted(set(getattr(getattr(model, "tokenizer", None), "all_special_ids", None) or []))


def token_source(model: Any, text: Any, *, context_length: int | None = None, seed: int = 0) -> TokenSource:
    """Make a token source of text, prompts, or both.

    Args:
        model: what tokenises; its tokenizer is used.
        text: a text file, a folder of them (`TEXT_FILES`), the name of a dataset on the Hugging Face hub
            (its `train` split, streamed), an iterable of strings or of records with a `text` (such as a
            `datasets.Dataset`) that can be iterated again, a `PromptDataset`, or a list of sources or
            of (source, share of the tokens) pairs. A list of strings is text itself: files are named in a
            list by `Path`s or in pairs.
        context_length: tokens of a context of text, BOS included; None: 128, or what the model reads if less.
        seed: of the order of prompts.

    Raises:
        InputError: when there is no such file, no tokenizer, or a context that does not fit; and from
            `next_batch`, when text cannot be read or there is none.
    """
    if isinstance(text, TokenSource):
        return text
    if isinstance(text, PromptDataset):
        return PromptTokens(text, seed)
    parts = _parts(text)
    if parts is not None:
        sources = [token_source(model, part, context_length=context_length, seed=seed) for part, _ in parts]
        return sources[0] if len(sources) == 1 else MixedTokens(sources, [share for _, share in parts])
    longest = getattr(getattr(model, "cfg", None), "n_ctx", None)
    if context_length is None:
        context_length = _CONTEXT if longest is None else min(_CONTEXT, longest)
    if longest is not None and context_length > longest:
        raise InputError(
            f"context_length is {context_length}; this model reads at most {longest} tokens: give those."
        )
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("This model has no tokenizer to read text with; give prompts or token batches.")
    documents, named = documents_of(text)
    return TextTokens(documents, tokenizer, context_length, named)


def token_batches(
    model: Any, text: Any, *, batch_tokens: int = 1_024, context_length: int | None = None, seed: int = 0
) -> Iterator[Tensor]:
    """Yield batches of token ids `[rows, length]` of text, prompts or both, without end.

    Args:
        model: what tokenises.
        text: see `token_source`.
        batch_tokens: about how many tokens a batch has.
        context_length: tokens of a context of text, BOS included; None: 128, or what the model reads if less.
        seed: of the order of prompts.

    Raises:
        InputError: see `token_source`.
    """
    source = token_source(model, text, context_length=context_length, seed=seed)
    return iter(lambda: source.next_batch(batch_tokens), None)


class TextTokens:
    """Contexts of consecutive tokens of documents.

    Args:
        documents: makes an iterator of (text, whether a document ends with it).
        tokenizer: a Hugging Face tokenizer.
        context_length: tokens of a context, BOS included.
        named: what the documents are, for the description.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Any,
        context_length: int,
        named: Mapping[str, Any],
    ) -> None:
        self._documents, self._tokenizer = documents, tokenizer
        self._context_length, self._named = context_length, dict(named)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._first = [] if bos is None else [bos]
        self._between = [] if eos is None else [eos]
        if context_length <= len(self._first):
            raise InputError(
                f"context_length must be at least {len(self._first) + 1}, to have room for text; given "
                f"{context_length}."
            )
        self._epoch, self._n_read, self._is_empty = 0, 0, True
        self._is_open = False  # whether the document that is read has tokens so far
        self._tail: list[int] = []
        self._iterator = documents()

    def next_batch(self, n_tokens: int) -> Tensor:
        """See `TokenSource`."""
        size = self._context_length - len(self._first)
        n_rows = max(1, n_tokens // self._context_length)
        while len(self._tail) < n_rows * size:
            self._tail += self._more()
        rows = [self._first + self._tail[i * size : (i + 1) * size] for i in range(n_rows)]
        self._tail = self._tail[n_rows * size :]
        return torch.tensor(rows)

    def _more(self) -> list[int]:
        """Return the tokens of the next text; start again where there is none."""
        piece = next(self._iterator, None)
        if piece is None:
            if self._is_empty:
                raise InputError(
                    f"No text was found in {str(self._named)[:200]}. Expected files or records with text, "
                    f"which can be read again when they end."
                )
            self._epoch, self._n_read, self._iterator = self._epoch + 1, 0, self._documents()
            self._is_empty = True
            return []
        self._n_read += 1
        text, ends = piece
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        ids = encoded["input_ids"]
        self._is_empty = self._is_empty and not ids
        document_ends = ends and (self._is_open or bool(ids))
        self._is_open = not ends and (self._is_open or bool(ids))
        return [*ids, *(self._between if document_ends else [])]

    def state(self) -> dict[str, Any]:
        """See `TokenSource`."""
        where = {"epoch": self._epoch, "n_read": self._n_read, "is_open": self._is_open}
        return where | {"tail": list(self._tail)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `TokenSource`."""
        self._epoch, self._n_read, self._tail = state["epoch"], state["n_read"], list(state["tail"])
        self._is_open = state["is_open"]
        self._is_empty = False  # it was not, when the state was taken
        self._iterator = islice(self._documents(), self._n_read, None)

    def description(self) -> dict[str, Any]:
        """See `TokenSource`."""
        return {"text": self._named, "context_length": self._context_length}


class PromptTokens:
    """Clean and corrupt prompts, batches of one length, in an order drawn anew each time round.

    Args:
        prompts: the dataset.
        seed: of the order.
    """

    def __init__(self, prompts: PromptDataset, seed: int = 0) -> None:
        self._seed = seed
        batches = prompts.batches(len(prompts))
        by_length = [torch.cat([batch.clean, batch.corrupt]).unique(dim=0) for batch in batches]
        self._rows = {rows.shape[1]: rows for rows in by_length}
        self._epoch, self._used = 0, 0

    def next_batch(self, n_tokens: int) -> Tensor:
        """See `TokenSource`."""
        batches = self._order(n_tokens)
        if self._used >= len(batches):
            self._epoch, self._used = self._epoch + 1, 0
            batches = self._order(n_tokens)
        length, chosen = batches[self._used]
        self._used += 1
        return self._rows[length][torch.tensor(chosen)]

    def _order(self, n_tokens: int) -> list[tuple[int, list[int]]]:
        """Return this round's batches: a length, and indices of prompts of it."""
        shuffled = random.Random(f"{self._seed} {self._epoch}")
        batches: list[tuple[int, list[int]]] = []
        for length in sorted(self._rows):
            order = list(range(len(self._rows[length])))
            shuffled.shuffle(order)
            size = max(1, n_tokens // length)
            batches += [(length, order[i : i + size]) for i in range(0, len(order), size)]
        shuffled.shuffle(batches)
        return batches

    def state(self) -> dict[str, Any]:
        """See `TokenSource`."""
        return {"epoch": self._epoch, "used": self._used}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `TokenSource`."""
        self._epoch, self._used = state["epoch"], state["used"]

    def description(self) -> dict[str, Any]:
        """See `TokenSource`."""
        digest = hashlib.sha256()
        for length in sorted(self._rows):
            digest.update(self._rows[length].numpy().tobytes())
        sizes = {str(length): len(rows) for length, rows in sorted(self._rows.items())}
        return {"prompts": sizes, "hash": digest.hexdigest()[:16], "seed": self._seed}


class MixedTokens:
    """Several sources, each giving its share of the tokens.

    Args:
        sources: the sources.
        shares: of the tokens, any positive numbers.
    """

    def __init__(self, sources: Sequence[TokenSource], shares: Sequence[float]) -> None:
        self._sources, self._shares = list(sources), [float(share) for share in shares]
        self._given = [0] * len(self._sources)

    def next_batch(self, n_tokens: int) -> Tensor:
        """Return a batch of the source that is furthest behind its share."""
        behind = [given / share for given, share in zip(self._given, self._shares, strict=True)]
        which = behind.index(min(behind))
        tokens = self._sources[which].next_batch(n_tokens)
        self._given[which] += tokens.numel()
        return tokens

    def state(self) -> dict[str, Any]:
        """See `TokenSource`."""
        return {"given": list(self._given), "sources": [source.state() for source in self._sources]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `TokenSource`."""
        self._given = list(state["given"])
        for source, own in zip(self._sources, state["sources"], strict=True):
            source.restore(own)

    def description(self) -> dict[str, Any]:
        """See `TokenSource`."""
        return {"mixed": [source.description() for source in self._sources], "shares": self._shares}


def _parts(text: Any) -> list[tuple[Any, float]] | None:
    """Return the sources of a list of them with their shares, or None for a single source."""
    if (
        not isinstance(text, list | tuple)
        or not text
        or all(isinstance(part, str | Mapping) for part in text)
    ):
        return None
    pairs = [part if isinstance(part, tuple) else (part, 1.0) for part in text]
    for pair in pairs:
        share = pair[1] if len(pair) == 2 else None
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < float("inf"):
            raise InputError(
                f"A mixed source is a list of sources or (source, share > 0) pairs; given {pair!r}."
            )
    return [(pair[0], float(pair[1])) for pair in pairs]
