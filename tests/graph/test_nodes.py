from pathlib import Path

import pytest
import torch

from auto_circuit.errors import InputError, UnknownNameError
from auto_circuit.graph.nodes import NodeScores, SiteScores


def scores(per_position: bool = False) -> NodeScores:
    shape = (2,) if per_position else ()
    a = torch.tensor([0.5, -2.0, 0.5]).expand(*shape, 3).clone()
    b = torch.tensor([1.0, 0.0]).expand(*shape, 2).clone()
    ids = torch.tensor([7, 3, 9])
    error = torch.tensor(-0.5).expand(shape).clone()
    return NodeScores(
        {
            "s0": SiteScores(a, error, ids.expand_as(a)),
            "s1": SiteScores(b, None, torch.tensor([4, 1]).expand_as(b)),
        }
    )


def test_order_names_and_ties() -> None:
    s = scores()
    assert len(s) == 6 and s.flat().tolist() == [0.5, -2, 0.5, -0.5, 1, 0]
    assert s.ranking().tolist() == [1, 4, 0, 2, 3, 5]  # ties by index
    assert s.ranking(signed=True).tolist() == [4, 0, 2, 5, 3, 1]
    assert [node.name for node in s.top(4)] == ["s0/latent.3", "s1/latent.4", "s0/latent.7", "s0/latent.9"]
    assert s.node(3).name == "s0/error" and s.node(3).latent is None
    assert [node.latent_id for node in s.top(9, site="s1")] == [4, 1]
    with pytest.raises(UnknownNameError, match="s0"):
        s.top(1, site="s2")
    with pytest.raises(InputError, match="0 to 5; given 6"):
        s.node(6)
    with pytest.raises(InputError, match="at least one site"):
        NodeScores({})


def test_per_position() -> None:
    s = scores(per_position=True)
    assert len(s) == 12 and s.per_position
    names = [node.name for node in s]
    assert names[:4] == ["s0/latent.7@0", "s0/latent.3@0", "s0/latent.9@0", "s0/latent.7@1"]
    assert names[6:8] == ["s0/error@0", "s0/error@1"] and names[-1] == "s1/latent.1@1"


@pytest.mark.parametrize("per_position", [False, True])
def test_masks_and_nodes_agree(per_position: bool) -> None:
    s = scores(per_position)
    for i in range(len(s)):
        masks, node = s.masks([i]), s.node(i)
        assert (
            sum(int(m.latents.sum()) + (0 if m.error is None else int(m.error.sum())) for m in masks.values())
            == 1
        )
        where = () if node.position is None else (node.position,)
        mask = masks[node.site]
        assert mask.error[where] if node.latent is None else mask.latents[(*where, node.latent)]


@pytest.mark.parametrize("per_position", [False, True])
def test_saved_and_loaded_without_a_model(tmp_path: Path, per_position: bool) -> None:
    s = scores(per_position)
    s.save(tmp_path / "scores.safetensors")
    again = NodeScores.load(tmp_path / "scores.safetensors")
    assert list(again.sites) == ["s0", "s1"] and again.sites["s1"].error is None
    assert list(again) == list(s)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]
