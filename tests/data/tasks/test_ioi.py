import subprocess
import sys
from typing import Any

import pytest
import torch

from auto_circuit.data.tasks.ioi import ioi_prompts
from auto_circuit.errors import PromptError


class Letters:
    """A tokenizer for which words of at most five letters are one token, longer ones two."""

    tokenizer = None

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def to_tokens(self, text: str, prepend_bos: bool | None = None) -> torch.Tensor:
        pieces = []
        for word in text.replace(",", " ,").replace(".", " .").split(" "):
            pieces += [word[:5], word[5:]] if len(word) > 5 else [word]
        return torch.tensor([[self.ids.setdefault(piece, len(self.ids)) for piece in pieces]])


def test_prompts_are_what_the_task_says() -> None:
    prompts = ioi_prompts(Letters(), 200, seed=3)
    assert len({p.clean for p in prompts.pairs}) == 200
    orders = {"abb": 0, "bab": 0}
    for p in prompts.pairs:
        (answer,), (wrong,) = p.answers, p.wrong_answers
        a, b = answer.strip(), wrong.strip()
        assert max(len(a), len(b)) <= 5
        assert p.clean.count(a) == 1 and p.clean.count(b) == 2 and p.corrupt.count(b) == 1
        assert a in p.corrupt and p.clean.rsplit(b, 1)[1] == p.corrupt[-len(p.clean.rsplit(b, 1)[1]) :]
        orders["abb" if p.clean.index(a) < p.clean.index(b) else "bab"] += 1
    assert orders == {"abb": 100, "bab": 100}


def test_seeds_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from data.tasks.test_ioi import Letters\n"
        "from auto_circuit.data.tasks.ioi import ioi_prompts\n"
        "print([p.clean for p in ioi_prompts(Letters(), 20, seed=1).pairs])"
    )
    import os
    from pathlib import Path

    root = Path(__file__).parents[3]
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1
    ours = [p.clean for p in ioi_prompts(Letters(), 20, seed=1).pairs]
    assert ours == [p.clean for p in ioi_prompts(Letters(), 20, seed=1).pairs] and str(ours) in runs.pop()
    assert ours != [p.clean for p in ioi_prompts(Letters(), 20, seed=2).pairs]


def test_tokenizers_without_the_names_are_told() -> None:
    class Characters:
        tokenizer = None

        def to_tokens(self, text: str, prepend_bos: Any = None) -> torch.Tensor:
            return torch.tensor([[ord(c) for c in text]])

    with pytest.raises(PromptError, match="has 0 names"):
        ioi_prompts(Characters(), 4)
    with pytest.raises(PromptError, match="n must be at least 1"):
        ioi_prompts(Letters(), 0)
