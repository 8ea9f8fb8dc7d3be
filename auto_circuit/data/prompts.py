"""Prompt pairs, datasets of them, batches without padding, and JSON in AutoCircuit's layout.

A pair has a clean and a corrupt prompt of the same number of tokens, the answers that are right
after the clean one, and wrong answers; each answer is one token. Batches hold prompts of one length
only, so that nothing is padded, and no prompt is dropped.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from auto_circuit.errors import PromptError, listed
from auto_circuit.files import write_json


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupt prompt with their answers, as text.

    Attributes:
        clean: the prompt whose behaviour is explained.
        corrupt: the prompt that takes the behaviour away; as many tokens.
        answers: right continuations of the clean prompt, one token each.
        wrong_answers: continuations to compare with, one token each.
    """

    clean: str
    corrupt: str
    answers: tuple[str, ...]
    wrong_answers: tuple[str, ...]


@dataclass(frozen=True)
class PromptBatch:
    """Tokenised pairs of one length.

    Attributes:
        clean: token ids, `[batch, seq]`.
        corrupt: token ids, `[batch, seq]`.
        answers: token ids, `[batch, n_answers]`, filled with −1 where a prompt has fewer.
        wrong_answers: token ids, `[batch, n_wrong]`, filled with −1.
        idxs: each prompt's index in its dataset, `[batch]`.
        reference: the plain model's logits at the last position of the clean prompts, or what computes
            them when an objective asks for `reference_logits`; None until somebody adds them.
    """

    clean: Int[Tensor, "batch seq"]
    corrupt: Int[Tensor, "batch seq"]
    answers: Int[Tensor, "batch n_answers"]
    wrong_answers: Int[Tensor, "batch n_wrong"]
    idxs: Int[Tensor, " batch"]
    reference: Tensor | Callable[[], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def reference_logits(self) -> Float[Tensor, "batch vocab"] | None:
        """The plain model's logits at the last position of the clean prompts."""
        if self.reference is not None and not isinstance(self.reference, Tensor):
            object.__setattr__(self, "reference", self.reference())
        return self.reference if isinstance(self.reference, Tensor) else None

    def with_reference(self, logits: Tensor | Callable[[], Tensor]) -> "PromptBatch":
        """Return this batch with reference logits `[batch, vocab]`, or with what computes them when asked."""
        return replace(self, reference=logits)


class PromptDataset:
    """Tokenised prompt pairs.

    Args:
        pairs: the pairs, at least one.
        model: what tokenises: a TransformerLens model, or anything with `to_tokens(text,
            prepend_bos=…) -> [1, seq]`.
        prepend_bos: put the tokenizer's BOS first; None: as the model does by default.
        seq_labels: a name for each position, kept for figures.
        word_idxs: positions of named words, kept for figures.

    Raises:
        PromptError: naming the prompt, for no pairs, an empty prompt, clean and corrupt of different
            length, a missing answer, or an answer that is not one token.
    """

    def __init__(
        self,
        pairs: Sequence[PromptPair],
        model: Any,
        *,
        prepend_bos: bool | None = None,
        seq_labels: Sequence[str] | None = None,
        word_idxs: dict[str, int] | None = None,
    ) -> None:
        if not pairs:
            raise PromptError("A dataset needs at least one prompt pair; none was given.")
        if hasattr(model, "cfg") and getattr(model, "tokenizer", None) is None:
            raise PromptError("This model has no tokenizer; save one into its folder (save_pretrained).")
        self.pairs = list(pairs)
        self.seq_labels = list(seq_labels) if seq_labels is not None else None
        self.word_idxs = dict(word_idxs) if word_idxs is not None else None
        tokenised = [_tokenise(i, pair, model, prepend_bos) for i, pair in enumerate(pairs)]
        self._clean = [tokens.clean for tokens in tokenised]
        self._corrupt = [tokens.corrupt for tokens in tokenised]
        self._answers = [tokens.answers for tokens in tokenised]
        self._wrong = [tokens.wrong for tokens in tokenised]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each prompt."""
        return [len(tokens) for tokens in self._clean]

    def batches(self, batch_size: int = 32, device: torch.device | str = "cpu") -> Iterator[PromptBatch]:
        """Yield every prompt once, in batches of at most `batch_size` prompts of one length."""
        if batch_size < 1:
            raise PromptError(f"batch_size must be at least 1; given {batch_size}.")
        by_length: dict[int, list[int]] = {}
        for i, length in enumerate(self.lengths):
            by_length.setdefault(length, []).append(i)
        for idxs in by_length.values():
            for start in range(0, len(idxs), batch_size):
                yield self._batch(idxs[start : start + batch_size], device)

    def _batch(self, idxs: list[int], device: torch.device | str) -> PromptBatch:
        return PromptBatch(
            clean=torch.tensor([self._clean[i] for i in idxs], device=device),
            corrupt=torch.tensor([self._corrupt[i] for i in idxs], device=device),
            answers=_filled([self._answers[i] for i in idxs]).to(device),
            wrong_answers=_filled([self._wrong[i] for i in idxs]).to(device),
            idxs=torch.tensor(idxs, device=device),
        )

    def subset(self, idxs: Sequence[int]) -> "PromptDataset":
        """Return the dataset of some of the prompts, in the order of `idxs`."""
        new = object.__new__(PromptDataset)
        new.seq_labels, new.word_idxs = self.seq_labels, self.word_idxs
        for name in ("pairs", "_clean", "_corrupt", "_answers", "_wrong"):
            setattr(new, name, [getattr(self, name)[i] for i in idxs])
        if not new.pairs:
            raise PromptError("A dataset needs at least one prompt pair; the subset is empty.")
        return new

    def split(self, test_fraction: float = 0.5, seed: int = 0) -> tuple["PromptDataset", "PromptDataset"]:
        """Split at random into a training and a test dataset; both have at least one prompt."""
        n_test = round(len(self) * test_fraction)
        if not 0 < n_test < len(self):
            raise PromptError(
                f"Splitting {len(self)} prompts with test_fraction = {test_fraction} leaves one side empty."
            )
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        return self.subset(sorted(order[n_test:])), self.subset(sorted(order[:n_test]))

    def save(self, path: str | Path) -> None:
        """Write the prompts as JSON in AutoCircuit's layout."""
        prompts = [
            {
                "clean": pair.clean,
                "corrupt": pair.corrupt,
                "answers": list(pair.answers),
                "wrong_answers": list(pair.wrong_answers),
            }
            for pair in self.pairs
        ]
        extra = {"seq_labels": self.seq_labels, "word_idxs": self.word_idxs}
        content = {"prompts": prompts} | {k: v for k, v in extra.items() if v is not None}
        write_json(Path(path), content)


@dataclass(frozen=True)
class _Tokens:
    clean: list[int]
    corrupt: list[int]
    answers: list[int]
    wrong: list[int]


def _tokenise(i: int, pair: PromptPair, model: Any, prepend_bos: bool | None) -> _Tokens:
    where = f"Prompt {i} ({pair.clean!r})"
    for given in (pair.answers, pair.wrong_answers):
        if isinstance(given, str) or not all(isinstance(answer, str) for answer in given):
            raise PromptError(f"{where}: answers must be sequences of strings; given {given!r}.")
    try:
        "".join((pair.clean, pair.corrupt, *pair.answers, *pair.wrong_answers)).encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{where}: has characters that are no text ({error}).") from error
    if not pair.clean.strip() or not pair.corrupt.strip():
        raise PromptError(f"{where}: clean and corrupt must both have text.")
    clean, corrupt = (_ids(text, model, prepend_bos) for text in (pair.clean, pair.corrupt))
    longest = getattr(getattr(model, "cfg", None), "n_ctx", None)
    if longest is not None and max(len(clean), len(corrupt)) >= longest:
        raise PromptError(
            f"{where}: has {longest} tokens or more, which is as many as the model reads; leave room for an "
            f"answer."
        )
    if len(clean) != len(corrupt):
        raise PromptError(
            f"{where}: clean has {len(clean)} tokens, corrupt ({pair.corrupt!r}) has {len(corrupt)}; "
            f"they must have the same number. Tokens: {_shown(clean, model)} against "
            f"{_shown(corrupt, model)}."
        )
    answers, wrong = (
        list(dict.fromkeys(_answer_id(where, pair.clean, clean, a, model, prepend_bos) for a in given))
        for given in (pair.answers, pair.wrong_answers)
    )
    if not answers:
        raise PromptError(f"{where}: needs at least one answer.")
    if set(answers) & set(wrong):
        both = _shown(sorted(set(answers) & set(wrong)), model)
        raise PromptError(f"{where}: {both} is among the answers and the wrong answers.")
    return _Tokens(clean, corrupt, answers, wrong)


def _ids(text: str, model: Any, prepend_bos: bool | None) -> list[int]:
    return model.to_tokens(text, prepend_bos=prepend_bos)[0].tolist()


def _answer_id(
    where: str, clean: str, clean_ids: list[int], answer: str, model: Any, prepend_bos: bool | None
) -> int:
    """Return the token that `answer` is after the clean prompt."""
    together = _ids(clean + answer, model, prepend_bos) if answer else clean_ids
    if together[: len(clean_ids)] == clean_ids and len(together) == len(clean_ids) + 1:
        return together[-1]
    rest = together[len(clean_ids) :] if together[: len(clean_ids)] == clean_ids else None
    became = "merges with the end of the prompt" if rest is None else f"is {_shown(rest, model)}"
    raise PromptError(
        f"{where}: the answer {answer!r} must be one token after the prompt; for this tokenizer it "
        f"{became}. Answers usually start with a space; choose words that are one token."
    )


def _shown(ids: Sequence[int], model: Any) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return str(list(ids))
    return "[" + listed([repr(tokenizer.decode([i])) for i in ids], 24) + "]"


def _filled(rows: list[list[int]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.long).reshape(
        len(rows), width
    )


def read_prompts(path: str | Path, model: Any, *, prepend_bos: bool | None = None) -> PromptDataset:
    """Read a JSON file in AutoCircuit's layout.

    The layout is `{"prompts": [{"clean", "corrupt", "answers", "wrong_answers"}], "seq_labels"?,
    "word_idxs"?}`; prompts and answers are strings.

    Raises:
        PromptError: for a file that is missing, not JSON, empty, or misses an entry; the message
            names the prompt.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PromptError(f"Cannot read prompts from {path}: {error}.") from error
    layout = 'expected {"prompts": [{"clean", "corrupt", "answers", "wrong_answers"}, …]}'
    prompts = content.get("prompts") if isinstance(content, dict) else None
    if not isinstance(prompts, list):
        raise PromptError(f"{path} has no list of prompts; {layout}.")
    if not prompts:
        raise PromptError(f"{path} has an empty list of prompts; {layout}.")
    labels, words = content.get("seq_labels"), content.get("word_idxs")
    if labels is not None and not _all_are(labels, list, str):
        raise PromptError(f"{path}: seq_labels must be a list of strings; given {labels!r}.")
    if words is not None and not (isinstance(words, dict) and _all_are(list(words.values()), list, int)):
        raise PromptError(f"{path}: word_idxs must map words to positions; given {words!r}.")
    pairs = [_pair(f"{path}, prompt {i}", prompt) for i, prompt in enumerate(prompts)]
    return PromptDataset(
        pairs,
        model,
        prepend_bos=prepend_bos,
        seq_labels=labels,
        word_idxs=words,
    )


def _all_are(items: Any, container: type, kind: type) -> bool:
    return isinstance(items, container) and all(isinstance(item, kind) for item in items)


def _pair(where: str, prompt: Any) -> PromptPair:
    keys = ("clean", "corrupt", "answers", "wrong_answers")
    if not isinstance(prompt, dict) or any(key not in prompt for key in keys):
        given = sorted(prompt) if isinstance(prompt, dict) else type(prompt).__name__
        raise PromptError(f"{where}: needs {listed(keys)}; given {given}.")
    texts = [prompt["clean"], prompt["corrupt"]]
    lists = [prompt["answers"], prompt["wrong_answers"]]
    fine = all(isinstance(text, str) for text in texts) and all(
        isinstance(items, list) and all(isinstance(item, str) for item in items) for items in lists
    )
    if not fine:
        raise PromptError(
            f"{where}: clean and corrupt must be strings, answers and wrong_answers lists of strings."
        )
    return PromptPair(texts[0], texts[1], tuple(lists[0]), tuple(lists[1]))
