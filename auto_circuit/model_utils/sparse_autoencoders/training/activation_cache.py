"""Activations on disk: safetensors shards with a manifest that says what they are.

`manifest.json` names the sites and widths, what was read by which model (`made_of`), and the shards; it is
written anew after each shard, so that an interrupted recording goes on where it was. A shard holds one tensor
`[rows, width]` for each site, the same tokens row by row.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from auto_circuit.errors import InputError, listed, unknown_name
from auto_circuit.files import write_json, write_tensors
from auto_circuit.model_utils.sparse_autoencoders.training.activations import RowSource
from auto_circuit.model_utils.sparse_autoencoders.training.processes import from_first, process_index

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "auto_circuit.activations", 1
#: Bytes of a shard, about.
_SHARD = 256 * 2**20


def record_activations(
    rows: RowSource, folder: str | Path, n_rows: int, made_of: Mapping[str, Any], *, progress: bool = True
) -> "CachedActivations":
    """Write at least `n_rows` rows into a folder, or go on with a recording that was interrupted.

    Args:
        rows: where rows come from.
        folder: where; made if need be.
        n_rows: rows of each site.
        made_of: what the rows depend on besides the source, for JSON (the model's fingerprint).
        progress: show a bar.

    Raises:
        InputError: when the folder holds other activations, saying in what they differ, or cannot be written.
    """
    folder = Path(folder)
    whole = {"source": rows.description(), **made_of}
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if manifest is None:
        manifest = {"format": _FORMAT, "version": _VERSION, "sites": dict(rows.widths), "made_of": whole}
        manifest |= {"n_rows": 0, "shards": [], "next": rows.state()}
    else:
        _check_same(folder, manifest, whole, rows.widths)
    if manifest["n_rows"] < n_rows:
        _go_on(folder, manifest, rows)
    per_shard = max(1, _SHARD // (4 * sum(rows.widths.values())))
    with tqdm(total=n_rows, initial=min(manifest["n_rows"], n_rows), disable=not progress, unit="row") as bar:
        bar.set_description("recording activations")
        while manifest["n_rows"] < n_rows:
            shard, bar_from = _collect(rows, per_shard, n_rows - manifest["n_rows"]), manifest["n_rows"]
            name = _shard_name(len(manifest["shards"]))
            size = len(next(iter(shard.values())))
            manifest["shards"].append({"file": name, "rows": size})
            manifest["n_rows"] += size
            manifest["next"] = rows.state()
            if process_index() == 0:  # the others have the same rows
                _write(folder, name, shard, manifest)
            bar.update(min(manifest["n_rows"], n_rows) - bar_from)
    from_first(None)  # nobody reads before all is written
    return CachedActivations(folder, list(rows.widths))


def _go_on(folder: Path, manifest: Mapping[str, Any], rows: RowSource) -> None:
    """Put the source to where the recording ended."""
    more = [site for site in manifest["sites"] if site not in rows.widths]
    if more:
        raise InputError(
            f"{folder} holds {manifest['n_rows']} rows, fewer than are wanted, and also of {more}. Record "
            f"those sites too, or give another folder."
        )
    try:
        rows.restore(manifest["next"])
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST} is damaged: 'next' says not where to go on.") from error


def _write(folder: Path, name: str, shard: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write a shard, then the manifest that has it."""
    try:
        write_tensors(folder / name, shard)
        write_json(folder / MANIFEST, manifest)
    except (OSError, SafetensorError) as error:
        raise InputError(f"Cannot write activations to {folder}: {error}.") from error


def _collect(rows: RowSource, per_shard: int, wanted: int) -> dict[str, Tensor]:
    """Return the rows of one shard: whole passes, at least as many as there is room or need for."""
    parts: list[dict[str, Tensor]] = []
    size = 0
    while size < min(per_shard, wanted):
        parts.append(rows.next_rows())
        size += len(next(iter(parts[-1].values())))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in rows.widths}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a folder's manifest.

    Raises:
        InputError: when it is missing, damaged or of another kind, or a shard is missing.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read cached activations: {path}: {error}.") from error
    keys = {"format", "version", "sites", "made_of", "n_rows", "shards", "next"}
    if not isinstance(manifest, dict) or not keys <= set(manifest) or manifest["format"] != _FORMAT:
        raise InputError(f"{path} is no manifest of cached activations; expected the keys {sorted(keys)}.")
    if manifest["version"] != _VERSION:
        raise InputError(f"{path} has version {manifest['version']}; this program reads {_VERSION}.")
    if not _is_sound(manifest):
        raise InputError(f"{path} is damaged: its sites, rows or shards are not what is written here.")
    missing = [shard["file"] for shard in manifest["shards"] if not (folder / shard["file"]).is_file()]
    if missing:
        raise InputError(f"{folder} misses shards that its manifest names: {missing}. Record it anew.")
    return manifest


def _is_sound(manifest: Mapping[str, Any]) -> bool:
    """Return whether the entries of a manifest have their kinds, and its shards the names given here."""
    sites, shards = manifest["sites"], manifest["shards"]
    return (
        isinstance(sites, dict)
        and all(isinstance(width, int) for width in sites.values())
        and isinstance(manifest["made_of"], dict)
        and isinstance(shards, list)
        and all(isinstance(shard, dict) and isinstance(shard.get("rows"), int) for shard in shards)
        and [shard.get("file") for shard in shards] == [_shard_name(i) for i in range(len(shards))]
        and manifest["n_rows"] == sum(shard["rows"] for shard in shards)
    )


def _shard_name(index: int) -> str:
    return f"shard_{index:05d}.safetensors"


def _check_same(
    folder: Path, manifest: Mapping[str, Any], made_of: Mapping[str, Any], widths: Mapping[str, int]
) -> None:
    own = json.loads(json.dumps(made_of))
    differs = [key for key in {**own, **manifest["made_of"]} if own.get(key) != manifest["made_of"].get(key)]
    if differs:
        shown = "; ".join(
            f"{key}: there {manifest['made_of'].get(key)}, now {own.get(key)}" for key in differs
        )
        raise InputError(
            f"{folder} holds activations of something else ({shown}). Give another folder, or delete it."
        )
    for site, width in widths.items():
        if manifest["sites"].get(site) != width:
            raise InputError(
                f"{folder} has no activations of {site} (width {width}); it has {manifest['sites']}. Give "
                f"another folder, or record all sites at once."
            )


class CachedActivations:
    """Rows of a folder that `record_activations` wrote; shards in an order drawn anew each time round.

    Args:
        folder: the folder.
        sites: which of its sites; None: all.
        seed: of the order of shards.

    Raises:
        InputError: when it is not whole, or no sites are given.
        UnknownNameError: for a site that it has not.
    """

    def __init__(self, folder: str | Path, sites: list[str] | None = None, seed: int = 0) -> None:
        self.folder, self._seed = Path(folder), seed
        self._manifest = read_manifest(self.folder)
        known = self._manifest["sites"]
        for site in sites or ():
            if site not in known:
                raise unknown_name(f"site of {self.folder}", site, known)
        self.widths = {site: known[site] for site in (known if sites is None else sites)}
        if not self.widths:
            raise InputError(f"No sites were given; {self.folder} has {listed(list(known))}.")
        if not self._manifest["shards"]:
            raise InputError(f"{self.folder} has no activations yet.")
        self._epoch, self._used = 0, 0

    @property
    def n_rows(self) -> int:
        """Rows of each site."""
        return self._manifest["n_rows"]

    def next_rows(self) -> dict[str, Tensor]:
        """See `RowSource`: one shard."""
        order = list(range(len(self._manifest["shards"])))
        random.Random(f"{self._seed} {self._epoch}").shuffle(order)
        shard = self._manifest["shards"][order[self._used]]
        self._used += 1
        if self._used == len(order):
            self._epoch, self._used = self._epoch + 1, 0
        path = self.folder / shard["file"]
        try:
            with safe_open(path, framework="pt") as file:
                rows = {site: file.get_tensor(site) for site in self.widths}
        except (OSError, SafetensorError) as error:
            raise InputError(f"Cannot read cached activations from {path}: {error}.") from error
        for site, width in self.widths.items():
            if tuple(rows[site].shape) != (shard["rows"], width):
                raise InputError(
                    f"{path}: {site} has shape {tuple(rows[site].shape)}; the manifest says "
                    f"{(shard['rows'], width)}. Record it anew."
                )
        return rows

    def state(self) -> dict[str, Any]:
        """See `RowSource`."""
        return {"epoch": self._epoch, "used": self._used, "n_rows": self.n_rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `RowSource`.

        Raises:
            InputError: when more was recorded since, which changes the order.
        """
        if state["n_rows"] != self.n_rows:
            raise InputError(
                f"{self.folder} has {self.n_rows} rows now; it had {state['n_rows']} when this was saved, so "
                f"its order is another. Start again, or give the folder as it was."
            )
        self._epoch, self._used = state["epoch"], state["used"]

    def description(self) -> dict[str, Any]:
        """See `RowSource`."""
        return {"cached": self._manifest["made_of"], "n_rows": self.n_rows, "seed": self._seed}
