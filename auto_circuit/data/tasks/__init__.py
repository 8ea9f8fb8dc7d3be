"""Tasks: one generator of prompt pairs a file, one registry."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from auto_circuit.data.prompts import PromptDataset, read_prompts
from auto_circuit.data.tasks.agreement import agreement_prompts
from auto_circuit.data.tasks.induction import induction_prompts
from auto_circuit.data.tasks.ioi import ioi_prompts
from auto_circuit.data.tasks.successor import successor_prompts
from auto_circuit.errors import unknown_name

#: Task name → function of (model, n, seed, prepend_bos=…).
TASKS: dict[str, Callable[..., PromptDataset]] = {
    "ioi": ioi_prompts,
    "induction": induction_prompts,
    "successor": successor_prompts,
    "agreement": agreement_prompts,
}


def load_prompts(
    name: str | Path, model: Any, n: int | None = None, seed: int = 0, *, prepend_bos: bool | None = None
) -> PromptDataset:
    """Make the prompts of a task, or read them from a JSON file.

    Args:
        name: a task of `TASKS`, or the path of a file in AutoCircuit's JSON layout.
        model: what tokenises.
        n: number of prompts; of a file, the first `n`. None: 64, or all of a file.
        seed: of a task's generator.
        prepend_bos: put the tokenizer's BOS first; None: as the model does by default.

    Raises:
        UnknownNameError: when `name` is neither a task nor a file.
        PromptError: see `PromptDataset`.
    """
    if str(name) in TASKS:
        return TASKS[str(name)](model, 64 if n is None else n, seed, prepend_bos=prepend_bos)
    if Path(name).suffix == ".json" or Path(name).is_file():
        prompts = read_prompts(name, model, prepend_bos=prepend_bos)
        return prompts if n is None or n >= len(prompts) else prompts.subset(range(n))
    raise unknown_name("task", str(name), TASKS, "Or give the path of a JSON file of prompts.")
