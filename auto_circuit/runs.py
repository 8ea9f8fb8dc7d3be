"""The results folder: what a computing verb leaves behind, enough to go on from.

`config.json` (arguments, versions, seed, fingerprints of model and SAEs), `prompts.json`,
`scores.safetensors`, `circuit.json`, `metrics.json`, `report.html`. Each file appears whole, as soon as
it is known, so that an interrupted run keeps what it had.
"""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from auto_circuit.data.prompts import PromptDataset
from auto_circuit.files import write_json, write_text
from auto_circuit.graph.nodes import NodeScores
from auto_circuit.metrics.faithfulness import FaithfulnessCurve
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import AutoencoderTransformer
from auto_circuit.visualize.report import html_report


class Run:
    """A results folder that is being written.

    Args:
        folder: where; it is made.
        arguments: what was asked for, for `config.json`.
    """

    def __init__(self, folder: str | Path, arguments: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = {"arguments": dict(arguments), "versions": _versions()}
        # What an earlier run left must not pass for this one's.
        for name in ("scores.safetensors", "circuit.json", "metrics.json", "report.html"):
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / "config.json", self.config)

    def start(self, spliced: AutoencoderTransformer, prompts: PromptDataset) -> None:
        """Write what the run is about: fingerprints and prompts."""
        self.config["model"] = {
            "class": type(spliced.model).__name__,
            "fingerprint": fingerprint(spliced.model),
        }
        self.config["saes"] = {
            name: {
                "latents": sae.n_latents,
                "inputs": sae.n_inputs,
                "activation": sae.activation.kind,
                "path": sae.metadata.get("path"),
                "fingerprint": fingerprint(sae),
            }
            for name, sae in spliced.saes.items()
        }
        self.config["error_nodes"] = spliced.error_nodes
        write_json(self.folder / "config.json", self.config)
        prompts.save(self.folder / "prompts.json")

    def scored(self, scores: NodeScores) -> None:
        """Write the scores, and a report without a curve."""
        scores.save(self.folder / "scores.safetensors")
        self._report(scores, None)

    def measured(self, scores: NodeScores, curve: FaithfulnessCurve, faithfulness: float = 0.9) -> None:
        """Write the curve, the smallest circuit measured to be so faithful (else all nodes), the report."""
        size = curve.smallest(faithfulness)
        nodes = scores.top(curve.sizes[-1] if size is None else size, signed=curve.signed)
        circuit = {
            "wanted_faithfulness": faithfulness,
            "reached": size is not None,
            "nodes": [{"name": node.name, **asdict(node)} for node in nodes],
        }
        write_json(self.folder / "circuit.json", circuit)
        write_json(self.folder / "metrics.json", {"faithfulness_curve": asdict(curve)})
        self._report(scores, curve)

    def _report(self, scores: NodeScores, curve: FaithfulnessCurve | None) -> None:
        arguments = self.config["arguments"]
        title = f"{arguments.get('task', 'nodes')} in {arguments.get('model', 'a model')}"
        write_text(self.folder / "report.html", html_report(title, scores, curve, self.config))


def fingerprint(module: torch.nn.Module) -> str:
    """Return a short hash of every parameter's name, shape, dtype and up to 4,096 of its values."""
    digest = hashlib.sha256()
    for name, tensor in module.named_parameters():
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // 4096, 1)].double().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("auto-circuit", "torch", "transformer-lens", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
