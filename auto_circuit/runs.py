"""The results folder: what a computing verb leaves behind, enough to go on from.

`config.json` (arguments, versions, seed, fingerprints of model and SAEs), `prompts.json`,
`scores.safetensors` (of edges, also `scores.json`),
`circuit.json`, `metrics.json`, `report.html`. Each file appears whole, as soon as
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
from auto_circuit.errors import InputError, listed
from auto_circuit.files import replacing, write_json, write_text
from auto_circuit.graph.circuit_graph import CircuitGraph
from auto_circuit.graph.nodes import NodeScores
from auto_circuit.graph.prune_scores import PruneScores
from auto_circuit.metrics.faithfulness import FaithfulnessCurve
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import AutoencoderTransformer
from auto_circuit.model_utils.sparse_autoencoders.latent_pruning import PruningResult
from auto_circuit.visualize.report import html_report

#: The files of a results folder.
RESULTS = (
    "config.json",
    "prompts.json",
    "scores.safetensors",
    "scores.json",
    "circuit.json",
    "metrics.json",
    "report.html",
)

#: Edges that `circuit.json` lists by name at most.
EDGES_LISTED = 10_000


class Run:
    """A results folder that is being written.

    Args:
        folder: where; it is made.
        arguments: what was asked for, for `config.json`.
    """

    def __init__(self, folder: str | Path, arguments: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = {"arguments": dict(arguments), "versions": _versions()}
        self.metrics: dict[str, Any] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / "config.json"):
                pass  # it can be written; an earlier run's is kept until this one starts
        except OSError as error:
            raise InputError(
                f"Cannot write results to {self.folder}: {error}. Give another folder."
            ) from error

    @staticmethod
    def check(folder: str | Path) -> None:
        """Refuse, before anything is computed, a folder that holds other things than a run's results.

        Raises:
            InputError: naming what is there.
        """
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; results need a folder. Give another name.")
        inside = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        if inside and not (path / "config.json").is_file():
            raise InputError(
                f"{path} holds {listed(inside, 4)} and no config.json, so it is no results folder. Give a "
                f"new or empty folder."
            )
        folders = [name for name in RESULTS if (path / name).is_dir()]
        if folders:
            raise InputError(f"{path} has folders where results would be written: {listed(folders)}.")

    def start(
        self,
        spliced: AutoencoderTransformer | CircuitGraph,
        prompts: PromptDataset,
        pruning: PruningResult | None = None,
    ) -> None:
        """Write what the run is about, and take away what an earlier run left."""
        for name in RESULTS:
            (self.folder / name).unlink(missing_ok=True)
        if pruning is not None:
            self.metrics["pruning"] = asdict(pruning)
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

    def scored(self, scores: NodeScores | PruneScores) -> None:
        """Write the scores, and a report without a curve."""
        scores.save(self.folder / "scores.safetensors")
        self._report(scores, None)

    def measured(
        self, scores: NodeScores | PruneScores, curve: FaithfulnessCurve, faithfulness: float = 0.9
    ) -> None:
        """Write the curve, the smallest circuit measured to be so faithful (else the largest), the report."""
        size = curve.smallest(faithfulness)
        k = curve.sizes[-1] if size is None else size
        circuit = {
            "wanted_faithfulness": faithfulness,
            "reached": size is not None,
            "faithfulness": curve.faithfulness[curve.sizes.index(k)],
            "size": k,
        }
        if isinstance(scores, PruneScores):
            # The best of them by name; the whole circuit is the first `size` of scores.safetensors.
            best = scores.edges(min(k, EDGES_LISTED), signed=curve.signed)
            circuit["edges"] = [{"name": edge.name, **asdict(edge)} for edge in best]
        else:
            nodes = scores.top(k, signed=curve.signed)
            circuit["nodes"] = [{"name": node.name, **asdict(node)} for node in nodes]
        write_json(self.folder / "circuit.json", circuit)
        self.metrics["faithfulness_curve"] = asdict(curve)
        write_json(self.folder / "metrics.json", self.metrics)
        self._report(scores, curve)

    def _report(self, scores: NodeScores | PruneScores, curve: FaithfulnessCurve | None) -> None:
        arguments = self.config["arguments"]
        title = f"{arguments.get('task', 'nodes')} in {arguments.get('model', 'a model')}"
        write_text(self.folder / "report.html", html_report(title, scores, curve, self.config))


def fingerprint(module: torch.nn.Module) -> str:
    """Return a short hash of what a module computes: kinds of its parts, every parameter and buffer."""
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        digest.update(f"{name} {type(part).__name__}\n".encode())
    counts = "latent_total_act"  # what an SAE has seen is not what it is
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in sorted(
        ((n, t) for n, t in tensors if not n.endswith(counts)), key=lambda pair: pair[0]
    ):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("auto-circuit", "torch", "transformer-lens", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
