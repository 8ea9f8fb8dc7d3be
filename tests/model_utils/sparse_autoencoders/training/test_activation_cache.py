"""Recorded activations: the rows that came, in any number of shards, after any interruption."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import VOCAB
from safetensors.torch import load_file, save_file

from auto_circuit.data.text import TextTokens
from auto_circuit.errors import InputError, UnknownNameError
from auto_circuit.model_utils.sparse_autoencoders.training import activation_cache
from auto_circuit.model_utils.sparse_autoencoders.training.activation_cache import (
    MANIFEST,
    CachedActivations,
    record_activations,
)
from auto_circuit.model_utils.sparse_autoencoders.training.activations import ModelActivations, RowSource

MODEL = {"model": {"name": "m", "fingerprint": "f"}}


class Numbered:
    """Rows that say their own number, 5 and 6 at a time in turn; fails after `fails_after` passes."""

    def __init__(self, sites: str = "ab", source: str = "one", fails_after: int | None = None) -> None:
        self.widths = {site: width for site, width in (("a", 1), ("b", 3)) if site in sites}
        self.n, self.passes, self.source, self.fails_after = 0, 0, source, fails_after

    def next_rows(self) -> dict[str, torch.Tensor]:
        if self.passes == self.fails_after:
            raise KeyboardInterrupt
        self.passes += 1
        size = 5 if self.n % 11 == 0 else 6
        rows = torch.arange(self.n, self.n + size, dtype=torch.float32)
        self.n += size
        both = {"a": rows[:, None], "b": torch.stack([rows, -rows, rows / 3], 1)}
        return {site: both[site] for site in self.widths}

    def state(self) -> dict[str, Any]:
        return {"n": self.n}

    def restore(self, state: Any) -> None:
        self.n = state["n"]

    def description(self) -> dict[str, Any]:
        return {"name": self.source, "pair": (1, 2)}  # a tuple is a list in JSON


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_cache, "_SHARD", 12 * 16)  # 12 rows of 4 numbers


def record(folder: Path, n_rows: int, rows: Any = None, made_of: Any = None) -> CachedActivations:
    return record_activations(
        rows or Numbered(), folder, n_rows, MODEL if made_of is None else made_of, progress=False
    )


def in_order(folder: Path) -> dict[str, torch.Tensor]:
    """Read the shards by themselves, in the order of the manifest."""
    names = [shard["file"] for shard in json.loads((folder / MANIFEST).read_text())["shards"]]
    shards = [load_file(folder / name) for name in names]
    return {site: torch.cat([shard[site] for shard in shards]) for site in shards[0]}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change(folder: Path, **entries: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | entries))


# ---- recording ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 12, 50, 101])
def test_rows_come_back_exactly(n_rows: int, tmp_path: Path) -> None:
    cached = record(tmp_path / "new" / "c", n_rows)
    found = in_order(cached.folder)
    assert isinstance(cached, RowSource) and cached.widths == {"a": 1, "b": 3}
    assert n_rows <= cached.n_rows < n_rows + 6
    numbers = torch.arange(cached.n_rows, dtype=torch.float32)
    assert torch.equal(found["a"], numbers[:, None])
    assert torch.equal(found["b"], torch.stack([numbers, -numbers, numbers / 3], 1))
    manifest = json.loads((cached.folder / MANIFEST).read_text())
    sizes = [shard["rows"] for shard in manifest["shards"]]
    assert all(12 <= size < 18 for size in sizes[:-1])  # whole passes, 12 rows or a little more
    assert sorted(files(cached.folder)) == sorted(
        [MANIFEST, *(shard["file"] for shard in manifest["shards"])]
    )
    rows = [cached.next_rows() for _ in sizes]
    assert sorted(torch.cat([own["a"] for own in rows]).flatten().tolist()) == numbers.tolist()
    assert all(torch.equal(own["a"][:, 0], own["b"][:, 0]) for own in rows)
    assert all(own["a"].dtype == torch.float32 for own in rows)


def test_a_pass_larger_than_a_shard_is_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_cache, "_SHARD", 1)
    cached = record(tmp_path, 11)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and cached.n_rows == 11


def test_an_interrupted_recording_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = record(tmp_path / "whole", 70)
    for fails_after in range(13):
        folder = tmp_path / f"cut {fails_after}"
        with pytest.raises(KeyboardInterrupt):
            record(folder, 70, Numbered(fails_after=fails_after))
        rows = Numbered()
        assert record(folder, 70, rows).n_rows == whole.n_rows
        assert files(folder) == files(whole.folder)
        assert rows.passes == 13 - 3 * (fails_after // 3)  # three passes are a shard; none of those anew


@pytest.mark.parametrize("breaks", ["write_tensors", "write_json"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_recording_that_breaks_while_writing_goes_on(
    breaks: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record(tmp_path / "whole", 70)
    folder, calls, write = tmp_path / "cut", [], getattr(activation_cache, breaks)

    def breaking(path: Path, content: Any) -> None:
        calls.append(path)
        if len(calls) == at:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(activation_cache, breaks, breaking)
        with pytest.raises(KeyboardInterrupt):
            record(folder, 70)
    if at == 1:
        with pytest.raises(InputError, match=r"manifest\.json"):
            CachedActivations(folder)
    else:
        assert CachedActivations(folder).n_rows == len(in_order(folder)["a"]) < 70
    record(folder, 70)
    assert files(folder) == files(whole.folder)


def test_half_a_shard_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    folder = tmp_path / "cut"
    record(folder, 20)
    before = files(folder)

    def half(tensors: Any, path: Path, **_settings: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", half)
        with pytest.raises(KeyboardInterrupt):
            record(folder, 70)
    assert files(folder) == before
    # A machine that stops leaves half a file beside, or a shard of which the manifest knows nothing.
    (folder / ".shard_00002.safetensors.x1").write_bytes(b"half")
    (folder / "shard_00002.safetensors").write_bytes(b"half")
    assert CachedActivations(folder).n_rows == 22
    record(folder, 70)
    numbers = in_order(folder)["a"].flatten()
    assert torch.equal(numbers, torch.arange(len(numbers), dtype=torch.float32)) and len(numbers) >= 70


def test_what_is_recorded_is_used_and_more_is_added(tmp_path: Path) -> None:
    record(tmp_path, 30)
    before = files(tmp_path)
    rows = Numbered(fails_after=0)
    for n_rows in (1, 30):
        assert record(tmp_path, n_rows, rows).n_rows == 33
    assert files(tmp_path) == before
    assert record(tmp_path, 60).n_rows == 60
    assert torch.equal(in_order(tmp_path)["a"].flatten(), torch.arange(60.0))
    after = files(tmp_path)
    assert all(after[name] == content for name, content in before.items() if name != MANIFEST)


def test_a_model_s_activations_are_recorded_and_gone_on_with(
    shared_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = shared_model("gpt2")
    sites = ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]

    class Letters:
        bos_token_id, eos_token_id = 0, 1

        def __call__(self, text: str, **_settings: Any) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(letter) % (VOCAB - 3) for letter in text]}

    def source() -> ModelActivations:
        documents = [("a text of some words", True), ("and another one", True)]
        return ModelActivations(model, sites, TextTokens(lambda: iter(documents), Letters(), 6, {}), 12)

    plain = source()
    expected = [plain.next_rows() for _ in range(8)]
    n_rows = sum(len(rows[sites[0]]) for rows in expected)
    record(tmp_path, n_rows // 3, source())
    record(tmp_path, n_rows, source())
    found = in_order(tmp_path)
    for site in sites:
        assert torch.equal(found[site], torch.cat([rows[site] for rows in expected]))


# ---- other things in the folder -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "made_of", "says"),
    [
        (Numbered(source="other"), MODEL, "source: there {'name': 'one'.*now {'name': 'other'"),
        (Numbered(), {"model": {"name": "m", "fingerprint": "g"}}, "model: there .*'f'.*now .*'g'"),
        (Numbered(), {}, "model: there .* now None"),
        (Numbered(), {**MODEL, "more": 1}, "more: there None, now 1"),
    ],
)
def test_other_activations_are_refused(rows: Any, made_of: Any, says: str, tmp_path: Path) -> None:
    record(tmp_path, 20)
    before = files(tmp_path)
    for n_rows in (5, 70):
        with pytest.raises(InputError, match=f"holds activations of something else.*{says}"):
            record(tmp_path, n_rows, rows, made_of)
    assert files(tmp_path) == before


def test_other_sites_are_refused_and_some_of_the_sites_are_enough(tmp_path: Path) -> None:
    record(tmp_path / "a", 20, Numbered("a"))
    with pytest.raises(InputError, match=r"no activations of b \(width 3\); it has {'a': 1}"):
        record(tmp_path / "a", 20, Numbered("ab"))
    wide = Numbered("a")
    wide.widths = {"a": 2}
    with pytest.raises(InputError, match=r"no activations of a \(width 2\)"):
        record(tmp_path / "a", 20, wide)
    record(tmp_path / "ab", 20)
    before = files(tmp_path / "ab")
    assert record(tmp_path / "ab", 20, Numbered("b")).widths == {"b": 3}
    with pytest.raises(InputError, match=r"22 rows, fewer than are wanted, and also of \['a'\]"):
        record(tmp_path / "ab", 40, Numbered("b"))  # shards of b alone would spoil the folder
    assert files(tmp_path / "ab") == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="Cannot write activations to .*file"):
        record(tmp_path / "file", 5)

    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activation_cache, "write_tensors", full)
    with pytest.raises(InputError, match="No space left"):
        record(tmp_path / "full", 5)


# ---- reading ------------------------------------------------------------------------------------


def test_sites_can_be_chosen(tmp_path: Path) -> None:
    record(tmp_path, 20)
    cached = CachedActivations(tmp_path, ["b"])
    assert cached.widths == {"b": 3} and list(cached.next_rows()) == ["b"]
    assert list(CachedActivations(tmp_path, ["b", "a"]).next_rows()) == ["b", "a"]
    with pytest.raises(UnknownNameError, match="'c'.*Nearest: a, b"):
        CachedActivations(tmp_path, ["a", "c"])
    with pytest.raises(InputError, match="No sites were given; .* has a, b"):
        CachedActivations(tmp_path, [])


def shards_read(cached: CachedActivations, n: int) -> list[float]:
    return [float(cached.next_rows()["a"][0]) for _ in range(n)]


def test_the_order_of_shards_is_that_of_seed_and_round(tmp_path: Path) -> None:
    record(tmp_path, 100)
    n = len(list(tmp_path.glob("*.safetensors")))
    assert n > 5
    first = shards_read(CachedActivations(tmp_path), 3 * n)
    rounds = [first[:n], first[n : 2 * n], first[2 * n :]]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(rounds[2]) and len(set(rounds[0])) == n
    assert rounds[0] != rounds[1] != rounds[2] != sorted(rounds[2])
    assert shards_read(CachedActivations(tmp_path), 3 * n) == first
    assert shards_read(CachedActivations(tmp_path, seed=1), n) != rounds[0]


def test_restored_activations_go_on_with_the_same_shards(tmp_path: Path) -> None:
    record(tmp_path, 60)
    cached = CachedActivations(tmp_path, seed=3)
    states, found = [], []
    for _ in range(17):
        states.append(json.dumps(cached.state()))
        found += shards_read(cached, 1)
    for i in range(12):
        for other in (cached, CachedActivations(tmp_path, seed=3)):
            other.restore(json.loads(states[i]))
            assert shards_read(other, 5) == found[i : i + 5]


def test_activations_that_have_grown_do_not_go_on(tmp_path: Path) -> None:
    record(tmp_path, 30)
    cached = CachedActivations(tmp_path)
    cached.next_rows()
    state = cached.state()
    record(tmp_path, 60)
    with pytest.raises(InputError, match="has 60 rows now; it had 33"):
        CachedActivations(tmp_path).restore(state)


def test_the_description_says_what_was_recorded(tmp_path: Path) -> None:
    record(tmp_path, 20)
    described = CachedActivations(tmp_path).description()
    assert described["cached"] == {"source": {"name": "one", "pair": [1, 2]}, **MODEL}
    assert json.loads(json.dumps(described)) == described == CachedActivations(tmp_path).description()
    assert described != CachedActivations(tmp_path, seed=1).description()
    record(tmp_path, 40)
    assert described != CachedActivations(tmp_path).description()


# ---- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"{}", b"\xff", b'{"format": "other"}'])
def test_a_damaged_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    record(tmp_path, 20)
    (tmp_path / MANIFEST).write_bytes(content)
    for use in (lambda: CachedActivations(tmp_path), lambda: record(tmp_path, 5)):
        with pytest.raises(InputError, match=r"manifest\.json"):
            use()


@pytest.mark.parametrize(
    "entries",
    [
        {"format": "other"},
        {"version": 2},
        {"sites": ["a", "b"]},
        {"sites": {"a": "1", "b": 3}},
        {"made_of": None},
        {"n_rows": 23},
        {"n_rows": None},
        {"shards": None},
        {"shards": {"file": "shard_00000.safetensors"}},
        {"shards": [["shard_00000.safetensors", 22]]},
        {"shards": [{"file": "shard_00000.safetensors"}]},
        {"shards": [{"rows": 22}]},
        {"shards": [{"file": 3, "rows": 22}]},
        {"shards": [{"file": "x" * 5_000, "rows": 22}]},
        {"shards": [{"file": "shard_00000.safetensors", "rows": 11}] * 2},
    ],
)
def test_entries_that_are_wrong_are_refused(entries: Any, tmp_path: Path) -> None:
    record(tmp_path, 20)
    change(tmp_path, **entries)
    for use in (lambda: CachedActivations(tmp_path), lambda: record(tmp_path, 5)):
        with pytest.raises(InputError, match=r"manifest\.json"):
            use()


@pytest.mark.parametrize(
    "name", ["../out/shard_00000.safetensors", "{out}/shard_00000.safetensors", "..", "", "a/.."]
)
def test_files_outside_the_folder_are_not_read(name: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    record(folder, 12)
    shutil.copytree(folder, out)
    for inside_too in (True, False):
        rows = json.loads((folder / MANIFEST).read_text())["n_rows"]
        change(folder, shards=[{"file": name.format(out=out), "rows": rows}])
        with pytest.raises(InputError, match=r"manifest\.json is damaged"):
            CachedActivations(folder)
        if inside_too:
            (folder / "shard_00000.safetensors").unlink()


@pytest.mark.parametrize("next_", [None, {}, {"m": 3}, []])
def test_a_recording_that_does_not_know_where_to_go_on_is_refused(next_: Any, tmp_path: Path) -> None:
    record(tmp_path, 20)
    change(tmp_path, next=next_)
    assert record(tmp_path, 20).n_rows == 22  # nothing more is needed
    with pytest.raises(InputError, match="'next' says not where"):
        record(tmp_path, 40)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    record(tmp_path, 12)
    (path,) = tmp_path.glob("*.safetensors")
    whole = load_file(path)
    damaged: list[tuple[Any, str]] = [
        (path.read_bytes()[:-10], "Cannot read"),
        (b"", "Cannot read"),
        (path.read_bytes()[:20], "Cannot read"),
        ({"a": whole["a"]}, "Cannot read.*b"),
        ({**whole, "b": whole["b"][:-1]}, r"b has shape \(.*, 3\); the manifest says"),
        ({**whole, "b": whole["b"][:, :2].contiguous()}, r"b has shape \(.*, 2\); the manifest says"),
    ]
    for content, says in damaged:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content, path)
        with pytest.raises(InputError, match=says) as found:
            CachedActivations(tmp_path).next_rows()
        assert str(path) in str(found.value)
    path.unlink()
    with pytest.raises(InputError, match=r"misses shards .*shard_00000\.safetensors"):
        CachedActivations(tmp_path)


def test_a_folder_without_activations_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="Cannot read cached activations"):
            CachedActivations(folder)
    record(tmp_path, 5)
    change(tmp_path, shards=[], n_rows=0)
    with pytest.raises(InputError, match="no activations yet"):
        CachedActivations(tmp_path)


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "first", 40)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    change(tmp_path / "second", n_rows=0, shards=[], next={"n": 0})
    monkeypatch.setattr(activation_cache, "process_index", lambda: 1)
    monkeypatch.setattr(
        activation_cache, "from_first", lambda _: change(tmp_path / "second", **_manifest(tmp_path / "first"))
    )
    before = {name: (tmp_path / "second" / name).stat().st_mtime_ns for name in files(tmp_path / "second")}
    rows = Numbered()
    assert record(tmp_path / "second", 40, rows).n_rows == 44 and rows.n == 44
    for path in (tmp_path / "second").glob("*.safetensors"):
        assert path.stat().st_mtime_ns == before[path.name]


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def test_the_bar_counts_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(SimpleNamespace):
        def __enter__(self) -> Any:
            bars.append(self)
            return self

        def __exit__(self, *_error: Any) -> None:
            pass

        def set_description(self, _text: str) -> None:
            pass

        def update(self, n: int) -> None:
            self.initial += n

    monkeypatch.setattr(activation_cache, "tqdm", lambda **settings: Bar(**settings))
    for n_rows in (30, 30, 60):
        record_activations(Numbered(), tmp_path, n_rows, MODEL, progress=n_rows == 60)
    assert [bar.initial for bar in bars] == [30, 30, 60]  # to the end, and no further
    assert [bar.disable for bar in bars] == [True, True, False]
