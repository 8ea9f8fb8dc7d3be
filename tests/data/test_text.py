"""Token sources against contexts that are cut here, from text that is joined here."""

import copy
import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from conftest import _save_tokenizer, make_prompts
from transformers import AutoTokenizer

from auto_circuit.data import documents as documents_module
from auto_circuit.data.text import MixedTokens, PromptTokens, TokenSource, special_ids, token_source
from auto_circuit.errors import InputError

BOS, EOS = 0, 1  # of the tests' tokenizer; "w0" is 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    _save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return SimpleNamespace(tokenizer=copy.deepcopy(tokenizer), cfg=SimpleNamespace(n_ctx=32))


def words(n: int, seed: int = 0) -> str:
    return " ".join(f"w{i}" for i in torch.randint(0, 57, (n,), generator=_generator(seed)).tolist())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(text: str) -> list[int]:
    return [int(word[1:]) + 3 for word in text.split()]


def contexts(documents: list[str], n_epochs: int, length: int, bos: bool = True, eos: bool = True) -> Any:
    """Cut the joined documents into contexts, as the module's description says."""
    joined = [token for text in documents if text.split() for token in [*ids(text), *([EOS] * eos)]]
    stream, size = joined * n_epochs, length - bos
    rows = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
    return torch.tensor([[BOS] * bos + row for row in rows])


def read(source: TokenSource, n_rows: int, length: int, rows_at_once: int = 1) -> torch.Tensor:
    batches: list[torch.Tensor] = []
    while len(batches) * rows_at_once < n_rows:
        batches.append(source.next_batch(rows_at_once * length))
        assert batches[-1].shape == (rows_at_once, length) and batches[-1].dtype == torch.int64
    return torch.cat(batches)[:n_rows]


def check(source: TokenSource, documents: list[str], length: int = 8, **kind: bool) -> None:
    expected = contexts(documents, 3, length, **kind)
    assert torch.equal(read(source, len(expected), length), expected)


DOCUMENTS = [words(37), words(3, 1), words(120, 2), "w5"]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_bytes(content.encode())
    return path


def as_json_lines(documents: list[str]) -> str:
    return "\n\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(documents)) + "\n"


def _folder(root: Path) -> Path:
    """A folder whose documents, in the order of their paths, are DOCUMENTS."""
    write(root / "a.md", DOCUMENTS[0].replace(" ", "\n", 5))
    write(root / "b" / "a.txt.gz", DOCUMENTS[1])
    write(root / "b" / "c" / "x.jsonl", as_json_lines(DOCUMENTS[2:3]))
    write(root / "c.txt", "\r\n" + DOCUMENTS[3] + "\r\n")
    write(root / "c.py", "w9")
    return root


class Again:
    """Records that can be iterated again."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter([{"text": text} for text in DOCUMENTS])


def _iterable_dataset() -> Any:
    return datasets.Dataset.from_list([{"text": text} for text in DOCUMENTS]).to_iterable_dataset()


KINDS: dict[str, Callable[[Path], Any]] = {
    "jsonl": lambda tmp: write(tmp / "x.jsonl", as_json_lines(DOCUMENTS)),
    "jsonl of strings": lambda tmp: write(tmp / "x.jsonl", "\n".join(map(json.dumps, DOCUMENTS))),
    "jsonl.gz": lambda tmp: write(tmp / "x.jsonl.gz", as_json_lines(DOCUMENTS)),
    "jsonl with a mark": lambda tmp: write(tmp / "x.jsonl", "\ufeff" + as_json_lines(DOCUMENTS)),
    "folder": lambda tmp: _folder(tmp / "texts"),
    "folder as a string": lambda tmp: str(_folder(tmp / "texts")),
    "strings": lambda tmp: DOCUMENTS,
    "tuple": lambda tmp: tuple(DOCUMENTS),
    "records": lambda tmp: [{"text": text} for text in DOCUMENTS],
    "own iterable": lambda tmp: Again(),
    "dataset": lambda tmp: datasets.Dataset.from_list([{"text": text, "x": 1} for text in DOCUMENTS]),
    "iterable dataset": lambda tmp: _iterable_dataset(),
    "hub": lambda tmp: "owner/name",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the hub; returns what it was asked."""
    asked: list[Any] = []

    def load_dataset(name: str, **settings: Any) -> Any:
        asked.append((name, settings))
        if name != "owner/name":
            raise ValueError(f"Dataset '{name}' doesn't exist on the Hub.\nSecond line")
        return _iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


# ---- contexts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [5, 64, 16_384])
@pytest.mark.parametrize("kind", KINDS)
def test_contexts_of_every_kind_are_those_of_the_joined_text(
    kind: str, piece: int, model: Any, tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "PIECE", piece)
    check(token_source(model, KINDS[kind](tmp_path), context_length=8), DOCUMENTS)
    assert hub == ([("owner/name", {"split": "train", "streaming": True})] if kind == "hub" else [])


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.txt.gz", "no_ending"])
def test_a_text_file_is_one_document(name: str, model: Any, tmp_path: Path) -> None:
    lines = [words(30, seed) for seed in range(50)] + ["", words(20_000, 9)]  # also a line of many pieces
    path = write(tmp_path / name, "\ufeff" + "\n".join(lines))
    check(token_source(model, path, context_length=32), [" ".join(lines)], 32)


@pytest.mark.parametrize("rows_at_once", [1, 3, 50])
def test_how_many_rows_come_at_once_changes_nothing(rows_at_once: int, model: Any) -> None:
    source = token_source(model, DOCUMENTS, context_length=8)
    expected = contexts(DOCUMENTS, 30, 8)[:100]
    assert torch.equal(read(source, 100, 8, rows_at_once), expected)
    assert source.next_batch(1).shape == (1, 8)  # at least a row
    assert source.next_batch(31).shape == (3, 8)  # and no more tokens than wanted


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_tokenizers_without_bos_or_eos(bos: bool, eos: bool, model: Any) -> None:
    model.tokenizer.bos_token = "<s>" if bos else None
    model.tokenizer.eos_token = "</s>" if eos else None
    check(token_source(model, DOCUMENTS, context_length=5), DOCUMENTS, 5, bos=bos, eos=eos)


def test_documents_without_tokens_are_left_out(model: Any, tmp_path: Path) -> None:
    documents = ["", "w1 w2", " \n ", "w3", "", ""]
    check(token_source(model, documents, context_length=4), documents, 4)
    for i, text in enumerate(documents):
        write(tmp_path / f"{i}.txt", text)
    check(token_source(model, tmp_path, context_length=4), documents, 4)


def test_an_end_that_is_a_piece_of_its_own_ends_the_document(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "PIECE", 6)
    documents = ["w1 w2\n", "w3 w4\n\n\n\n\n\n\n", "w5"]
    for i, text in enumerate(documents):
        write(tmp_path / f"{i}.txt", text)
    check(token_source(model, tmp_path, context_length=4), documents, 4)


def test_words_are_not_cut_where_there_is_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    monkeypatch.setattr(documents_module, "PIECE", 10)

    def pieces(text: str) -> list[str]:
        found = list(documents_module._pieces(StringIO(text).read))
        assert [ends for _, ends in found] == [False] * (len(found) - 1) + [True]
        assert "".join(piece for piece, _ in found) == text
        assert all(len(piece) <= 20 for piece, _ in found)
        return [piece for piece, _ in found]

    assert pieces("one two three four") == ["one two", " three", " four"]
    assert pieces("one\ntwo three four") == ["one\n", "two three", " four"]
    assert pieces("nospaceatallhere") == ["nospaceata", "llhere"]
    assert pieces(" " + "x" * 25)[0] == " xxxxxxxxx"
    assert pieces("") == [""] and pieces("short") == ["short"]


def test_a_large_file_is_not_held_in_memory(model: Any, tmp_path: Path) -> None:
    model.tokenizer = _Letters()
    for name, content in (("one_line.txt", "w1 " * 2_000_000), ("lines.txt", "w1 w2\n" * 1_000_000)):
        path = write(tmp_path / name, content)
        source = token_source(model, path, context_length=32)
        tracemalloc.start()
        for _ in range(20):
            source.next_batch(2_048)
        source.restore(json.loads(json.dumps(source.state())))
        source.next_batch(2_048)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_500_000 < path.stat().st_size / 3, peak


class _Letters:
    """A tokenizer of letters, fast and without anything of its own."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, text: str, **_settings: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


# ---- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "prompts", "mixed"])
def test_a_restored_source_goes_on_with_the_same_batches(
    kind: str, model: Any, tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "PIECE", 25)
    prompts = make_prompts(7, (6, 5, 9))
    made: dict[str, Any] = {"prompts": lambda: prompts, "mixed": lambda: [prompts, (DOCUMENTS, 2.5)]}
    text = made[kind]() if kind in made else KINDS[kind](tmp_path)

    def new() -> TokenSource:
        return token_source(model, text, context_length=8)

    source, states, batches = new(), [], []
    for _ in range(40):  # some rounds of the text
        states.append(json.dumps(source.state()))
        batches.append(source.next_batch(24))
    assert source.description() == new().description() == json.loads(json.dumps(new().description()))
    epochs = {state["epoch"] for state in map(json.loads, states) if "epoch" in state}
    assert kind == "mixed" or len(epochs) > 2
    for i in range(0, 40, 3):
        for other in (new(), source):  # a fresh one, and one that is somewhere else
            other.restore(json.loads(states[i]))
            assert json.dumps(other.state()) == states[i]
            for expected in batches[i : i + 8]:
                assert torch.equal(other.next_batch(24), expected)


def test_a_restored_source_knows_that_its_document_has_begun(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "PIECE", 3)
    source = token_source(model, ["w1\n\n\n\n\n\n", "w2 w3"], context_length=2)
    assert source.next_batch(2).tolist() == [[BOS, 4]]  # its EOS comes some empty pieces later
    other = token_source(model, ["w1\n\n\n\n\n\n", "w2 w3"], context_length=2)
    other.restore(source.state())
    assert other.next_batch(2).tolist() == [[BOS, EOS]]


def test_a_state_is_a_copy(model: Any) -> None:
    source = token_source(model, [DOCUMENTS, (make_prompts(3), 2)], context_length=8)
    source.next_batch(8)
    state = source.state()
    before = json.dumps(state)
    for _ in range(10):
        source.next_batch(800)
    assert json.dumps(state) == before
    source.restore(state)
    for _ in range(3):
        source.next_batch(800)
    assert json.dumps(state) == before


def test_descriptions_tell_texts_apart(model: Any, tmp_path: Path) -> None:
    def described(text: Any, **settings: Any) -> str:
        return json.dumps(token_source(model, text, **({"context_length": 8} | settings)).description())

    folder = tmp_path / "f"
    write(folder / "a" / "x.txt", "w1 w2")
    write(folder / "b" / "x.txt", "w1 w2")
    named = token_source(model, folder, context_length=8).description()["text"]
    assert named["files"] == {"a/x.txt": 5, "b/x.txt": 5}
    texts = [
        described(folder), described(folder, context_length=9),
        described(DOCUMENTS), described(DOCUMENTS[:3]),
        described(datasets.Dataset.from_list([{"text": "w1"}])),
        described(datasets.Dataset.from_list([{"text": "w2"}])),
        described(make_prompts(4)), described(make_prompts(4, seed=1)), described(make_prompts(4), seed=3),
        described([(DOCUMENTS, 1), (folder, 2)]), described([(DOCUMENTS, 2), (folder, 2)]),
    ]  # fmt: skip
    write(folder / "a" / "x.txt", "w1 w3")  # as long as before
    texts.append(described(folder))
    write(folder / "a" / "x.txt", "w1 w2")
    (folder / "b" / "x.txt").rename(folder / "b" / "y.txt")
    texts.append(described(folder))
    assert len(set(texts)) == len(texts)
    assert described(DOCUMENTS) == described([{"text": text, "other": object()} for text in DOCUMENTS])


# ---- prompts and mixtures -----------------------------------------------------------------------


def test_prompts_come_once_a_round_in_batches_of_one_length() -> None:
    prompts = make_prompts(9, (6, 5, 9))
    all_rows = [tuple(row) for batch in prompts.batches(99) for row in [*batch.clean.tolist()]]
    all_rows += [tuple(row) for batch in prompts.batches(99) for row in [*batch.corrupt.tolist()]]
    source = PromptTokens(prompts, seed=4)
    orders = []
    for epoch in range(3):
        rows: list[tuple[int, ...]] = []
        while len(rows) < len(set(all_rows)):
            batch = source.next_batch(20)
            assert 1 <= len(batch) <= max(1, 20 // batch.shape[1])
            rows += [tuple(row) for row in batch.tolist()]
        assert sorted(rows) == sorted(set(all_rows)) and source.state()["epoch"] == epoch
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]
    again = PromptTokens(prompts, seed=4)
    assert tuple(again.next_batch(20)[0].tolist()) == orders[0][0]
    assert source.next_batch(1).shape[0] == 1


@pytest.mark.parametrize("shares", [(1, 1), (0.9, 0.1), (3, 5), (1, 40)])
def test_a_mixture_keeps_its_shares_of_tokens(shares: tuple[float, float], model: Any) -> None:
    prompts = make_prompts(5, (6, 9))  # small batches beside the large ones of the text
    source = token_source(model, [(["w7 w8"], shares[0]), (prompts, shares[1])], context_length=8)
    assert isinstance(source, MixedTokens)
    given = [0, 0]
    for _ in range(300):
        batch = source.next_batch(64)
        own = set(batch.flatten().tolist()) <= {BOS, EOS, 10, 11}
        given[0 if own else 1] += batch.numel()
        wanted = sum(given) * shares[0] / sum(shares)
        assert abs(given[0] - wanted) <= 64  # a batch
    assert min(given) > 0


def test_lists_are_mixed_with_equal_shares(model: Any, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.txt", "w1"), write(tmp_path / "b.txt", "w2")]
    source = token_source(model, paths, context_length=3)
    batches = [source.next_batch(3)[0].tolist() for _ in range(4)]
    assert batches == [[BOS, 4, EOS], [BOS, 5, EOS]] * 2
    only = token_source(model, [(paths[1], 0.3)], context_length=3)
    assert only.next_batch(3)[0].tolist() == [BOS, 5, EOS] and not isinstance(only, MixedTokens)
    assert token_source(model, source) is source
    nested = token_source(model, [source, ["w3"]], context_length=3)
    assert [nested.next_batch(3)[0].tolist()[1] for _ in range(4)] == [4, 6, 5, 6]


def test_special_ids(model: Any) -> None:
    assert special_ids(model) == [0, 1, 2]
    assert special_ids(SimpleNamespace(tokenizer=None)) == [] and special_ids(object()) == []


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no_such.txt", "no text file or folder 'no_such.txt'"),
        ("no/such.txt", "no text file or folder"),
        ("no/such/folder", "no text file or folder"),
        ("A sentence and/or two.", "list of strings"),
        ("", "no text file or folder ''"),
        ("x" * 5_000, "no text file"),
        ("nul\x00byte", "no text file"),
        ("~no_such_user_here/x", "no text file"),
        ("owner/other", "'owner/other' is no file here.*doesn't exist on the Hub. Load it"),
        (iter(["w1"]), "not a generator"),
        ((word for word in ["w1"]), "given generator"),
        (3, "given int"),
        (None, "given NoneType"),
        (b"w1", "given bytes"),
        ({"w1", "w2"}, "given set"),
        ({"text": "w1"}, "given dict"),
        (datasets.DatasetDict(train=[], other=[]), "DatasetDict; choose one of other, train"),
        ([{"texts": "w1"}], r"needs a 'text' that is a string; given \['texts'\]"),
        ([{"text": 3}], "needs a 'text'"),
        ([{"text": None, 3: 4}], "needs a 'text'"),
        (["w1 \ud800"], "characters that are no text"),
        ([(["w1"], 0), ["w2"]], "share > 0"),
        ([(["w1"], -1.0)], "share > 0"),
        ([(["w1"], float("nan"))], "share > 0"),
        ([(["w1"], float("inf"))], "share > 0"),
        ([(["w1"], True)], "share > 0"),
        ([(["w1"], "1")], "share > 0"),
        ([(["w1"], 1, 2)], "share > 0"),
        ([["w1"], 3], "given int"),
    ],
)
def test_what_is_no_text_is_refused(text: Any, says: str, model: Any, hub: list[Any]) -> None:
    with pytest.raises(InputError, match=says) as found:
        token_source(model, text, context_length=8)
    assert len(str(found.value)) < 500


def test_the_current_folder_is_not_read_unasked(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.txt", "w1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no text file or folder ''"):
        token_source(model, "", context_length=3)
    with pytest.raises(InputError, match=r"a.txt is a file.*Path\(…\)"):
        token_source(model, ["a.txt", "w1"], context_length=3)
    assert token_source(model, Path(), context_length=3).next_batch(3).tolist() == [[BOS, 4, EOS]]


@pytest.mark.parametrize(
    "text", [[], [""], [" "] * 500, [{"text": ""}], datasets.Dataset.from_dict({"text": []})]
)
def test_no_text_is_an_error_and_no_loop(text: Any, model: Any) -> None:
    source = token_source(model, text, context_length=8)
    with pytest.raises(InputError, match="No text was found"):
        source.next_batch(64)


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.jsonl", "x.jsonl.gz", "in/a/folder.txt"])
def test_empty_files_are_an_error_and_no_loop(name: str, model: Any, tmp_path: Path) -> None:
    for content in ("", "\n \n"):
        write(tmp_path / name, content)
        with pytest.raises(InputError, match=Path(name).name):
            token_source(model, tmp_path, context_length=8).next_batch(8)


def test_text_that_ends_for_good_is_an_error(model: Any, tmp_path: Path) -> None:
    class Once:
        def __init__(self) -> None:
            self.rest = iter(["w1 w2"])

        def __iter__(self) -> Iterator[str]:
            return self.rest

    source = token_source(model, Once(), context_length=3)
    assert source.next_batch(3).tolist() == [[BOS, 4, 5]]
    with pytest.raises(InputError, match="read again"):
        source.next_batch(3)
    path = write(tmp_path / "x.txt", "w1 w2")
    source = token_source(model, path, context_length=3)
    source.next_batch(3)
    state = source.state()
    for other in (source, token_source(model, path, context_length=3)):
        other.restore(state)
        write(path, "")
        with pytest.raises(InputError, match="No text was found"):
            other.next_batch(99)
    path.unlink()
    source.restore(state)
    with pytest.raises(InputError, match=r"Cannot read text from .*x\.txt"):
        source.next_batch(99)


def _bad_deflate() -> bytes:
    whole = bytearray(gzip.compress(words(5_000).encode()))
    whole[15:200] = bytes(185)
    return bytes(whole)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.txt.gz", b"w1 w2", "Not a gzipped file"),
        ("x.txt.gz", gzip.compress(words(5_000).encode())[:-200], "ended before"),
        ("x.txt.gz", _bad_deflate(), "Error -3 while decompressing"),
        ("x.txt", b"w1 \xff w2", "can't decode byte 0xff"),
        ("x.jsonl", b'{"text": "w1 \xff"}', "can't decode byte 0xff"),
        ("x.txt.gz", gzip.compress(b"w1 \xff w2"), "can't decode byte 0xff"),
        ("x.jsonl", b'{"text": "w1"}\n\n{"text": "w', "line 3 is no JSON"),
        ("x.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("x.jsonl", b'{"text": "w1"}\n{"texts": "w2"}', r"line 2: needs a 'text'.*\['texts'\]"),
        ("x.jsonl", b"[1, 2]", "line 1: needs a 'text' that is a string; given list"),
        ("x.jsonl", b'{"text": "w1 \\ud800"}', "line 1: has characters that are no text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",
)
def test_damaged_files_are_named(name: str, content: bytes, says: str, model: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    source = token_source(model, tmp_path, context_length=8)
    with pytest.raises(InputError, match=says) as found:
        for _ in range(5_000):
            source.next_batch(8)
    assert str(tmp_path / name) in str(found.value)


def test_folders_without_text_are_refused(model: Any, tmp_path: Path) -> None:
    write(tmp_path / "x.py", "w1")
    with pytest.raises(InputError, match=r"no text files; expected names that end in \.txt"):
        token_source(model, tmp_path, context_length=3)


def test_contexts_that_do_not_fit_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="33; this model reads at most 32"):
        token_source(model, DOCUMENTS, context_length=33)
    assert token_source(model, DOCUMENTS, context_length=32).next_batch(32).shape == (1, 32)
    for length in (1, 0, -3):
        with pytest.raises(InputError, match=f"at least 2, .* given {length}"):
            token_source(model, DOCUMENTS, context_length=length)
    assert token_source(model, DOCUMENTS, context_length=2).next_batch(2).shape == (1, 2)


def test_text_needs_a_tokenizer_and_prompts_do_not() -> None:
    bare = SimpleNamespace(tokenizer=None, cfg=SimpleNamespace(n_ctx=32))
    with pytest.raises(InputError, match="no tokenizer"):
        token_source(bare, DOCUMENTS, context_length=8)
    assert token_source(bare, make_prompts(2)).next_batch(1).shape[0] == 1


def test_errors_of_the_hub_are_told_while_reading(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks:
        def __iter__(self) -> Iterator[Any]:
            yield {"text": "w1 w2"}
            raise ConnectionError("the network is gone\nand more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_settings: Breaks())
    source = token_source(model, "owner/name", context_length=3)
    assert source.next_batch(3).tolist() == [[BOS, 4, 5]]
    with pytest.raises(InputError, match="'owner/name' of the hub failed: the network is gone$"):
        source.next_batch(3)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_settings: [{"label": "w1"}])
    with pytest.raises(InputError, match="needs a 'text'"):
        token_source(model, "owner/name", context_length=3).next_batch(3)


def test_files_that_look_like_hub_names_are_files(
    model: Any, tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner" / "name" / "x.txt", "w1")
    assert token_source(model, "owner/name", context_length=3).next_batch(3).tolist() == [[BOS, 4, EOS]]
    assert hub == []
