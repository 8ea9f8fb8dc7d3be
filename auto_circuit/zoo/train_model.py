"""Training of the tiny model on its language, and how well a model does its tasks.

AdamW on the cross-entropy of every token, of sentences packed whole into rows: warm-up, a constant
learning rate until every task is answered right by at least 98 % of fresh prompts, then a linear
cool-down. The same recipe gives the same weights on the same machine with the same number of threads.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from auto_circuit.data.prompts import PromptBatch, PromptDataset
from auto_circuit.data.tasks import TASKS
from auto_circuit.data.tasks.ioi import ioi_prompts
from auto_circuit.errors import InputError
from auto_circuit.metrics.objectives import logit_diff
from auto_circuit.zoo.language import build_tokenizer, held_out, sentence

#: The accuracy on every task that begins the cool-down, and the seed of the prompts it is checked on.
WANTED, CHECK_SEED = 0.98, 1_000_003
#: What `measure` calls the task `ioi` with pairs of names that never occur together in the language.
HELD_OUT = "ioi, held-out pairs"
LogitsOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the tiny model is made.

    Attributes:
        seed: of its first weights and of the sentences.
        n_layers: number of blocks.
        n_heads: attention heads of a block.
        d_model: width of the residual stream.
        n_ctx: number of tokens it reads.
        batch_size: rows of `n_ctx` tokens in a step.
        learning_rate: after the warm-up, until the cool-down.
        n_warmup: steps in which the learning rate rises.
        n_cooldown: steps in which it falls to 0 at the end.
        check_every: steps between checks of the tasks.
        max_steps: steps after which the cool-down begins although the tasks are not learned.
    """

    seed: int = 0
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 64
    n_ctx: int = 64
    batch_size: int = 32
    learning_rate: float = 2e-3
    n_warmup: int = 100
    n_cooldown: int = 1500
    check_every: int = 100
    max_steps: int = 4000

    def __post_init__(self) -> None:
        wrong = [name for name, value in asdict(self).items() if name != "seed" and value <= 0]
        if wrong:
            raise InputError(f"Everything in a recipe but its seed is above 0; given 0 or less: {wrong}.")


@dataclass(frozen=True)
class Measured:
    """How well a model does a task.

    Attributes:
        accuracy: share of the clean prompts after which an answer has the largest logit of all words.
        clean: mean logit difference of answers and wrong answers after clean prompts.
        corrupt: the same after corrupt prompts.
        n_prompts: number of prompts.
    """

    accuracy: float
    clean: float
    corrupt: float
    n_prompts: int


def train(recipe: Recipe, *, progress: bool = True) -> tuple[Any, int]:
    """Train a `GPT2LMHeadModel` by a recipe; return it and the number of steps taken."""
    from tqdm import tqdm

    tokenizer = build_tokenizer(recipe.n_ctx)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _fresh_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    rows = sentence_batches(recipe, tokenizer)
    step, end, accuracy = 0, recipe.max_steps + recipe.n_cooldown, {}
    bar = tqdm(total=end, desc="training", unit="step", disable=not progress)
    while step < end:
        rate = min((step + 1) / recipe.n_warmup, (end - step) / recipe.n_cooldown, 1)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * rate
        ids = next(rows)
        loss = _loss(model(ids).logits, ids, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        bar.update()
        if step % recipe.check_every == 0 and end > step + recipe.n_cooldown:
            measured = measure(lambda ids: model(ids).logits, Tokenises(tokenizer), 200, CHECK_SEED)
            accuracy = {task: f"{m.accuracy:.3f}" for task, m in measured.items()}
            if all(m.accuracy >= WANTED for m in measured.values()):
                end = bar.total = step + recipe.n_cooldown
        bar.set_postfix({"loss": f"{loss.item():.3f}", **accuracy}, refresh=False)
    bar.close()
    return model.eval(), step


def _fresh_model(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.n_ctx,
        n_embd=recipe.d_model,
        n_layer=recipe.n_layers,
        n_head=recipe.n_heads,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def sentence_batches(recipe: Recipe, tokenizer: Any) -> Iterator[Int[Tensor, "batch seq"]]:
    """Yield rows without end: BOS, as many whole sentences as fit, EOS, padding."""
    rng = random.Random(recipe.seed)
    rows: list[list[int]] = []
    row: list[int] = [tokenizer.bos_token_id]
    while True:
        texts = [sentence(rng) for _ in range(1000)]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            if len(row) + len(ids) >= recipe.n_ctx:
                padding = recipe.n_ctx - len(row) - 1
                rows.append([*row, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding])
                row = [tokenizer.bos_token_id]
            row.extend(ids)
        while len(rows) >= recipe.batch_size:
            yield torch.tensor(rows[: recipe.batch_size])
            rows = rows[recipe.batch_size :]


def _loss(logits: Float[Tensor, "batch seq vocab"], ids: Int[Tensor, "batch seq"], padding: int) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=padding
    )


class Tokenises:
    """What a `PromptDataset` asks of a model, by a tokenizer alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def to_tokens(self, text: str, prepend_bos: bool | None = None) -> Int[Tensor, "1 seq"]:
        """Tokenise one text."""
        return torch.tensor([self.tokenizer(text, add_special_tokens=prepend_bos is not False)["input_ids"]])


def measure(logits_of: LogitsOf, tokenises: Any, n: int, seed: int) -> dict[str, Measured]:
    """Measure every task of `TASKS`, and `ioi` on the pairs of names that were held out.

    Args:
        logits_of: gives the logits `[batch, seq, vocab]` of token ids `[batch, seq]`.
        tokenises: see `PromptDataset`.
        n: prompts of each task; of held-out pairs there are about half as many.
        seed: of the prompts.
    """
    prompts = {task: make(tokenises, n, seed) for task, make in TASKS.items()}
    many = ioi_prompts(tokenises, 5 * n, seed + 1)
    pairs = [(p.answers[0].strip(), p.wrong_answers[0].strip()) for p in many.pairs]
    prompts[HELD_OUT] = many.subset([i for i, pair in enumerate(pairs) if held_out(*pair)])
    return {task: _measured(logits_of, data) for task, data in prompts.items()}


@torch.no_grad()
def _measured(logits_of: LogitsOf, prompts: PromptDataset) -> Measured:
    right, clean, corrupt = [], [], []
    for batch in prompts.batches(256):
        logits = logits_of(batch.clean)[:, -1]
        right.append(_is_right(logits, batch))
        clean.append(logit_diff(logits, batch))
        corrupt.append(logit_diff(logits_of(batch.corrupt)[:, -1], batch))
    means = [torch.cat(values).double().mean().item() for values in (right, clean, corrupt)]
    return Measured(*means, n_prompts=len(prompts))


def _is_right(logits: Float[Tensor, "batch vocab"], batch: PromptBatch) -> Tensor:
    return (logits.argmax(-1, keepdim=True) == batch.answers).any(-1)
