import math

import pytest
import torch

from auto_circuit.data.prompts import PromptBatch
from auto_circuit.metrics.objectives import answer_log_prob, logit_diff, prob_diff


def test_hand_computed() -> None:
    tokens = torch.zeros(2, 1, dtype=torch.long)
    batch = PromptBatch(
        tokens, tokens, torch.tensor([[0, -1], [1, 2]]), torch.tensor([[2, 1], [-1, -1]]), torch.arange(2)
    )
    logits = torch.tensor([[1.0, 2.0, 4.0]]).log()
    assert logit_diff(logits, _first(batch))[0].item() == pytest.approx(-(math.log(2) + math.log(4)) / 2)
    flat = torch.zeros(2, 3)
    assert logit_diff(flat, batch).tolist() == [0, 0]
    assert answer_log_prob(flat, batch).tolist() == pytest.approx([math.log(1 / 3), math.log(2 / 3)])
    assert prob_diff(logits, _first(batch))[0].item() == pytest.approx(1 / 7 - 3 / 7)


def _first(batch: PromptBatch) -> PromptBatch:
    return PromptBatch(
        batch.clean[:1], batch.corrupt[:1], batch.answers[:1], batch.wrong_answers[:1], batch.idxs[:1]
    )
