"""What a checkpoint format is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class CheckpointFormat:
    """A public layout of SAE checkpoints.

    Attributes:
        name: its key in the registry.
        description: the files that make it, for messages.
        recognises: whether a folder holds one SAE of this format, by content.
        site: the site that the folder's files name, or None.
        read: make the SAE of a folder.
        check: raise a `CheckpointError` for an SAE that the format cannot hold.
        write: write an SAE for a site into an existing folder, atomically file by file.
    """

    name: str
    description: str
    recognises: Callable[[Path], bool]
    site: Callable[[Path], str | None]
    read: Callable[[Path], SparseAutoencoder]
    check: Callable[[str, SparseAutoencoder], None]
    write: Callable[[Path, str, SparseAutoencoder], None]
