"""Sums of a few numbers worked out by hand, and near copies made on purpose."""

from typing import Any

import pytest
import torch
from transformer_lens.hook_points import HookPoint

import auto_circuit as ac
from auto_circuit.model_utils.sparse_autoencoders import quality_sums
from auto_circuit.model_utils.sparse_autoencoders.quality_sums import Moments, SiteSums, near_copies


def test_moments_by_hand() -> None:
    moments = Moments()
    for batch in ([[1.0, 2.0]], [[3.0, 2.0], [5.0, 8.0]], []):
        moments.add(torch.tensor(batch).reshape(-1, 2))
    assert (moments.n, moments.mean.tolist(), moments.squares.tolist()) == (3, [3.0, 4.0], [8.0, 24.0])
    assert (moments.about_mean, moments.mean_square, moments.about_zero) == (32.0, 75.0, 107.0)
    constant = Moments()
    for _ in range(3):
        constant.add(torch.full((7, 2), 0.1, dtype=torch.float64))
    assert constant.about_mean == 0


def test_a_site_by_hand() -> None:
    sums = SiteSums("here")
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    out = torch.tensor([[3.0, 0.0], [0.5, 0.0], [0.0, 1.0]])
    for part in (slice(0, 1), slice(1, 3)):
        sums.add(x[part], out[part], (out != 0)[part])
    assert sums.n_active.tolist() == [2, 1] and sums.n_nonzero == 2
    assert sums.residuals.about_zero == pytest.approx(16 + 0.25 + 1)
    assert sums.inputs.about_mean == pytest.approx(26 - (16 + 16) / 3)
    assert (sums.norm, sums.norm_ratio) == (pytest.approx(6), pytest.approx(3 / 5 + 0.5))
    assert sums.cosine == pytest.approx(3 / 5 + 1)


def test_near_copies_by_construction(monkeypatch: Any) -> None:
    sae = ac.SparseAutoencoder(HookPoint(), 7, 4)
    eye = torch.eye(4)
    rows = [eye[0], 3 * eye[0], -eye[0], eye[1], eye[1] + 0.1 * eye[2], 0 * eye[0], 0.5 * eye[0]]
    sae.decode_weight.data = torch.stack(rows).T
    for chunk in (1, 4, quality_sums.CHUNK):  # a row, two rows, all rows at once
        monkeypatch.setattr(quality_sums, "CHUNK", chunk)
        assert near_copies(sae, 0.9) == (4, pytest.approx(1))  # three pairs of 0, 1, 6, and 3 with 4
        assert near_copies(sae, 0.999)[0] == 3
    sae.prune_latents(torch.tensor([0, 2]))
    assert near_copies(sae, 0.0) == (0, -1.0)
    sae.prune_latents(torch.tensor([0]))
    assert near_copies(sae, 0.0) == (0, None)
    sae = ac.SparseAutoencoder(HookPoint(), 60, 6).to(torch.bfloat16)
    unit = torch.nn.functional.normalize(sae.directions.detach().double(), dim=-1)
    cosines = (unit @ unit.T)[torch.ones(60, 60).triu(1).bool()]
    monkeypatch.setattr(quality_sums, "CHUNK", 7 * 60)
    count, largest = near_copies(sae, 0.7)
    assert count == int((cosines > 0.7).sum()) > 10 and largest == pytest.approx(cosines.max().item())
