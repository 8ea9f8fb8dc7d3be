"""Tokens to run a model on without prompt pairs: text in contexts of one length, and prompts as they are.

A token source yields batches `[rows, length]` for ever, starting again when its text ends, and can be put
back to where it was (`state`, `restore`), so that an interrupted run goes on with the very next batch.

- Each text file is one document, and so is each record of JSON lines and of datasets. Documents are read and
  tokenised piece by piece; each ends with the tokenizer's EOS where it has one, and those without a token are
  left out. The stream of tokens is cut into contexts, each with BOS first where the tokenizer has one.
- Prompts are batches of one length, clean and corrupt, in an order that is drawn anew each time round.
"""

import gzip
import hashlib
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from auto_circuit.data.prompts import PromptDataset
from auto_circuit.errors import InputError, listed

#: Endings of text files that are read in a folder.
TEXT_FILES = (".txt", ".md", ".jsonl", ".txt.gz", ".jsonl.gz")

#: Characters that are read and tokenised at a time, about.
_PIECE = 16_384

#: What names a dataset on the hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+", re.ASCII)

#: Makes an iterator of (text, whether a document ends with it).
Documents = Callable[[], Iterator[tuple[str, bool]]]


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


def token_source(model: Any, text: Any, *, context_length: int = 128, seed: int = 0) -> TokenSource:
    """Make a token source of text, prompts, or both.

    Args:
        model: what tokenises; its tokenizer is used.
        text: a text file, a folder of them (`TEXT_FILES`), the name of a dataset on the Hugging Face hub
            (its `train` split, streamed), an iterable of strings or of records with a `text` (such as a
            `datasets.Dataset`) that can be iterated again, a `PromptDataset`, or a list of sources or
            of (source, share of the tokens) pairs. A list of strings is text itself: files are named in a
            list by `Path`s or in pairs.
        context_length: tokens of a context of text, BOS included.
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
    if longest is not None and context_length > longest:
        raise InputError(f"context_length is {context_length}; this model reads at most {longest} tokens.")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("This model has no tokenizer to read text with; give prompts or token batches.")
    documents, named = _documents(text)
    return TextTokens(documents, tokenizer, context_length, named)


def token_batches(
    model: Any, text: Any, *, batch_tokens: int = 1_024, context_length: int = 128, seed: int = 0
) -> Iterator[Tensor]:
    """Yield batches of token ids `[rows, length]` of text, prompts or both, without end.

    Args:
        model: what tokenises.
        text: see `token_source`.
        batch_tokens: about how many tokens a batch has.
        context_length: tokens of a context of text, BOS included.
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


def _documents(text: Any) -> tuple[Documents, dict[str, Any]]:
    """Return what makes an iterator over (text, whether a document ends there), and its name."""
    if isinstance(text, str | Path):
        return _named_documents(text)
    if not isinstance(text, Iterable) or isinstance(text, Iterator | Mapping | Set | bytes):
        splits = f"; choose one of {listed(sorted(map(str, text)))}" if isinstance(text, Mapping) else ""
        raise InputError(
            f"Text must be a file, a folder, a dataset, or strings that can be iterated again in the same "
            f"order (a list, not a generator, a dict or a set); given {type(text).__name__}{splits}."
        )
    name = {"dataset": str(getattr(text, "_fingerprint", None) or type(text).__name__)}
    if isinstance(text, list | tuple):
        texts = [_text_of(record) for record in text]
        files = [part for part in texts if part.endswith(TEXT_FILES) and _existing(part) is not None]
        if files:
            raise InputError(
                f"A list of strings is text itself, but {listed(files, 4)} is a file. Name files in a list "
                f"by Path(…), or in pairs (file, share)."
            )
        name = {"strings": len(texts), "hash": hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}
    return (lambda: _pieces_of_records(text)), name


def _named_documents(text: str | Path) -> tuple[Documents, dict[str, Any]]:
    """Return the documents of a file, a folder or a dataset of the hub."""
    path = _existing(text)
    if path is not None:
        files = _files(path)
        return (lambda: _pieces_of_files(files)), _described(path, files)
    if isinstance(text, str) and _HUB_NAME.fullmatch(text) and not text.endswith(TEXT_FILES):
        dataset = _hub_dataset(text)
        return (lambda: _pieces_of_records(_read_from_hub(text, dataset))), {"dataset": text}
    raise InputError(
        f"There is no text file or folder {str(text)[:200]!r}. Give one ({listed(TEXT_FILES)}), or a list of "
        f"strings."
    )


def _existing(text: str | Path) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if str(text) and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # a name that is too long, an unknown home, …
        return None


def _hub_dataset(name: str) -> Iterable[Any]:
    try:
        from datasets import load_dataset

        return load_dataset(name, split="train", streaming=True)
    except Exception as error:  # whatever the library or the network raises
        raise InputError(
            f"{name!r} is no file here, and reading it as a dataset of the hub failed: {_first_line(error)} "
            f"Load it with datasets.load_dataset, and give what that returns."
        ) from error


def _read_from_hub(name: str, dataset: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from dataset
    except Exception as error:  # whatever the library or the network raises
        raise InputError(f"Reading the dataset {name!r} of the hub failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _text_of(record: Any, where: str = "A record of a dataset") -> str:
    text = record.get("text") if isinstance(record, Mapping) else record
    if not isinstance(text, str):
        given = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise InputError(f"{where} needs a 'text' that is a string; given {given}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has characters that are no text ({error}).") from error
    return text


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(TEXT_FILES))
    if not found:
        raise InputError(f"{path} has no text files; expected names that end in {listed(TEXT_FILES)}.")
    return found


def _described(path: Path, files: list[Path]) -> dict[str, Any]:
    """Return the names and sizes of files, and a hash of what is in them."""
    sizes: dict[str, int] = {}
    digest = hashlib.sha256()
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        try:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
            sizes[name] = file.stat().st_size
        except OSError as error:
            raise InputError(f"Cannot read text from {file}: {error}.") from error
    return {"files": sizes, "hash": digest.hexdigest()[:16]}


def _pieces_of_files(files: list[Path]) -> Iterator[tuple[str, bool]]:
    for file in files:
        try:
            # utf-8-sig: without the mark that some editors put first
            with (
                gzip.open(file, "rt", encoding="utf-8-sig")
                if file.suffix == ".gz"
                else file.open(encoding="utf-8-sig") as content
            ):
                if file.name.endswith((".jsonl", ".jsonl.gz")):
                    yield from _pieces_of_records(_json_texts(file, content))
                else:
                    yield from _pieces(content.read)
        except InputError:
            raise
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(f"Cannot read text from {file}: {error}.") from error


def _json_texts(file: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"Cannot read text from {file}: line {number} is no JSON: {error}."
                ) from error
            yield _text_of(record, f"{file}, line {number}:")


def _pieces_of_records(records: Iterable[Any]) -> Iterator[tuple[str, bool]]:
    for record in records:
        yield from _pieces(StringIO(_text_of(record)).read)


def _pieces(read: Callable[[int], str]) -> Iterator[tuple[str, bool]]:
    """Cut a document after a line, or else before a space, every some thousand characters."""
    held = ""
    while more := read(_PIECE):
        held += more
        if len(held) < _PIECE:
            continue
        cut = held.rfind("\n") + 1 or max(held.rfind(" "), 0) or len(held)
        yield held[:cut], False
        held = held[cut:]
    yield held, True
