"""SAE checkpoints: one file for each public format, one registry.

A format is a module-level `CheckpointFormat`: how to recognise a folder by its content, how to read
it, how to write it. `load_saes` and `save_saes` are the two public functions.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from auto_circuit.errors import CheckpointError, listed, unknown_name
from auto_circuit.model_utils.sparse_autoencoders.checkpoints.checkpoint_format import CheckpointFormat
from auto_circuit.model_utils.sparse_autoencoders.checkpoints.sae_lens import SAE_LENS
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.zoo import TINY

#: SAEs that ship in the package, by name; a folder of that name comes first.
PACKAGED_SAES: dict[str, Path] = {"tiny": TINY / "saes"}

#: Every format by name.
FORMATS: dict[str, CheckpointFormat] = {fmt.name: fmt for fmt in (SAE_LENS,)}


def load_saes(
    path: str | Path,
    *,
    sites: list[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, SparseAutoencoder]:
    """Load one SAE, or a folder of them, in the canonical form.

    Args:
        path: the folder of one SAE, or a folder with such folders at any depth; or `tiny`, the SAEs of the
            packaged tiny model.
        sites: load only these, by the names in their files; None: all.
        device: where their tensors go.
        dtype: of their tensors; None: as stored.

    Returns:
        Site name (as in the file: `blocks.6.hook_mlp_out`; the folder's name where the file has
        none) → SAE, sorted by folder. Use them with `sae_model`.

    Raises:
        CheckpointError: when nothing is found, two SAEs have the same site, or a file is incomplete,
            inconsistent or of an unknown kind.
        UnknownNameError: for a site that is not there.
    """
    root = Path(path)
    if not root.is_dir():
        root = PACKAGED_SAES.get(str(path).lower(), root)
    if not root.is_dir():
        raise CheckpointError(
            f"{root} is no folder. Expected a folder with SAEs in it ({_known()}), or packaged SAEs "
            f"({listed([*PACKAGED_SAES])})."
        )
    if (root / "training.json").is_file() and not (root / "trained.json").is_file():
        raise CheckpointError(
            f"{root} is a training run that is not finished. Go on with it: train_saes(…, resume=True), "
            f"or auto-circuit train --resume."
        )
    found = sorted(folder for folder in (root, *root.rglob("*")) if folder.is_dir() and _format(folder))
    if not found:
        inside = listed(sorted(entry.name for entry in root.iterdir())) or "nothing"
        raise CheckpointError(f"No SAE was found in {root} (it holds {inside}). Known formats: {_known()}.")
    places: dict[str, Path] = {}
    for folder in found:
        fmt = _format(folder)
        name = (fmt.site(folder) if fmt else None) or folder.name
        if name in places:
            raise CheckpointError(
                f"Two SAEs for {name}: {places[name]} and {folder}. Load one of the folders by itself."
            )
        places[name] = folder
    for name in sites or ():
        if name not in places:
            raise unknown_name(f"SAE in {root}", name, places)
    wanted = {name: folder for name, folder in places.items() if sites is None or name in sites}
    return {name: _read(folder, device, dtype) for name, folder in wanted.items()}


def save_saes(
    saes: Mapping[str, SparseAutoencoder], path: str | Path, *, format: str = "sae_lens"
) -> list[Path]:
    """Write SAEs, each into a folder of `path` named by its site.

    Args:
        saes: site name → SAE.
        path: the folder for all of them; it is made.
        format: a format of `FORMATS`.

    Returns:
        The folders written.

    Raises:
        UnknownNameError: for an unknown format.
        CheckpointError: for an SAE that the format cannot hold, before anything is written.
    """
    if format not in FORMATS:
        raise unknown_name("checkpoint format", format, FORMATS)
    fmt = FORMATS[format]
    for name, sae in saes.items():
        if Path(name).name != name:
            raise CheckpointError(f"{name!r} cannot be a folder's name; use the site's name.")
        fmt.check(name, sae)
    folders = [Path(path) / name for name in saes]
    for folder, (name, sae) in zip(folders, saes.items(), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        fmt.write(folder, name, sae)
    return folders


def _format(folder: Path) -> CheckpointFormat | None:
    return next((fmt for fmt in FORMATS.values() if fmt.recognises(folder)), None)


def _read(folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> SparseAutoencoder:
    fmt = _format(folder)
    if fmt is None:
        raise CheckpointError(f"{folder} holds no SAE of a known format ({_known()}).")
    return fmt.read(folder).to(device=device, dtype=dtype)


def _known() -> str:
    return listed([f"{fmt.name}: {fmt.description}" for fmt in FORMATS.values()])


__all__ = ["FORMATS", "CheckpointFormat", "load_saes", "save_saes"]
