"""What identifies a run; that its folder is written and kept right is in `test_cli`."""

from pathlib import Path

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from auto_circuit import SparseAutoencoder
from auto_circuit.errors import InputError
from auto_circuit.model_utils.sparse_autoencoders.latent_activations import TopK
from auto_circuit.runs import Run, fingerprint


def test_fingerprints_tell_saes_apart() -> None:
    def sae(k: int = 3) -> SparseAutoencoder:
        torch.manual_seed(0)
        return SparseAutoencoder(HookPoint(), 50, 20, activation=TopK(k))

    changed = sae()
    changed.encode_weight.data[31, 7] += 1e-3
    pruned = sae()
    pruned.prune_latents(torch.arange(50).flip(0))
    counted = sae()
    counted(torch.randn(2, 20))
    prints = [fingerprint(one) for one in (sae(), sae(4), changed, pruned)]
    assert len(set(prints)) == 4 and fingerprint(counted) == prints[0]


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    Run.check(tmp_path / "new")
    Run.check(tmp_path)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(InputError, match="holds report.html and no config.json"):
        Run.check(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    Run.check(tmp_path)
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(InputError, match="has folders where results would be written: metrics.json"):
        Run.check(tmp_path)
