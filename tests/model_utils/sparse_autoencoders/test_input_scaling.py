import math

import pytest
import torch

from auto_circuit.errors import CheckpointError
from auto_circuit.model_utils.sparse_autoencoders.input_scaling import (
    ConstantNormScaling,
    LayerNormScaling,
    scaling_from_tensors,
)


def test_hand_computed() -> None:
    """(1, 3) has mean 2 and unbiased deviation √2; (3, 4) has norm 5."""
    scaled = LayerNormScaling(1.0)(torch.tensor([1.0, 3.0]))
    assert scaled.shift.item() == 2 and scaled.scale.item() == pytest.approx(math.sqrt(2))
    assert scaled.x.tolist() == pytest.approx([-1 / (math.sqrt(2) + 1), 1 / (math.sqrt(2) + 1)])
    scaled = ConstantNormScaling(10.0)(torch.tensor([3.0, 4.0]))
    assert scaled.x.tolist() == pytest.approx([6, 8]) and scaled.scale.item() == pytest.approx(0.5)
    assert scaled.shift.item() == 0


def test_the_setting_says_the_kind() -> None:
    assert scaling_from_tensors({}) is None
    for one in (LayerNormScaling(0.1), ConstantNormScaling(3.0)):
        again = scaling_from_tensors(one.state_dict())
        assert type(again) is type(one) and again.state_dict() == one.state_dict()
    with pytest.raises(CheckpointError, match="layer_norm"):
        scaling_from_tensors({"mean": torch.tensor(0.0)})
