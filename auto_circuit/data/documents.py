"""Documents of text: from files and folders, datasets, and strings; read piece by piece.

Each text file is one document, and so is each record of JSON lines and of datasets.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from io import StringIO
from pathlib import Path
from typing import Any

from auto_circuit.errors import InputError, listed

#: Endings of text files that are read in a folder.
TEXT_FILES = (".txt", ".md", ".jsonl", ".txt.gz", ".jsonl.gz")

#: Characters that are read and tokenised at a time, about.
PIECE = 16_384

#: What names a dataset on the hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+", re.ASCII)

#: Makes an iterator of (text, whether a document ends with it).
Documents = Callable[[], Iterator[tuple[str, bool]]]


def documents_of(text: Any) -> tuple[Documents, dict[str, Any]]:
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
        except (GeneratorExit, InputError):  # the former may come when nothing else can be looked up any more
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
    while more := read(PIECE):
        held += more
        if len(held) < PIECE:
            continue
        cut = held.rfind("\n") + 1 or max(held.rfind(" "), 0) or len(held)
        yield held[:cut], False
        held = held[cut:]
    yield held, True
