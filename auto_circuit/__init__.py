"""Sparse autoencoders as circuit nodes in TransformerLens models.

The public names, imported when first used: `import auto_circuit` alone loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_circuit.data.prompts import PromptBatch, PromptDataset, PromptPair, read_prompts
    from auto_circuit.data.tasks import load_prompts
    from auto_circuit.data.text import token_batches
    from auto_circuit.errors import AutoCircuitError
    from auto_circuit.graph.circuit_graph import CircuitGraph
    from auto_circuit.graph.edge_ends import Edge
    from auto_circuit.graph.edge_layout import EdgeLayout
    from auto_circuit.graph.nodes import Node, NodeScores
    from auto_circuit.graph.prune_scores import Circuit, PruneScores
    from auto_circuit.metrics.faithfulness import FaithfulnessCurve, faithfulness_curve
    from auto_circuit.metrics.objectives import answer_log_prob, logit_diff, prob_diff
    from auto_circuit.model_utils.model_loading import load_model
    from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import (
        AutoencoderTransformer,
        sae_model,
    )
    from auto_circuit.model_utils.sparse_autoencoders.checkpoints import load_saes, save_saes
    from auto_circuit.model_utils.sparse_autoencoders.neuron_autoencoder import neuron_saes
    from auto_circuit.model_utils.sparse_autoencoders.quality import sae_quality
    from auto_circuit.model_utils.sparse_autoencoders.quality_results import SiteQuality
    from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
    from auto_circuit.model_utils.sparse_autoencoders.training.activation_cache import CachedActivations
    from auto_circuit.model_utils.sparse_autoencoders.training.config import TrainingConfig
    from auto_circuit.model_utils.sparse_autoencoders.training.trainer import train_saes
    from auto_circuit.patching.ablations import Ablation, GraphRecorder
    from auto_circuit.patching.edge_patching import PatchType, run_circuits
    from auto_circuit.prune_algos.edge_attribution import edge_attribution
    from auto_circuit.prune_algos.node_attribution import exact_node_effects, node_attribution

_SAE = "auto_circuit.model_utils.sparse_autoencoders"
_WHERE = {
    "auto_circuit.data.prompts": ("PromptBatch", "PromptDataset", "PromptPair", "read_prompts"),
    "auto_circuit.data.tasks": ("load_prompts",),
    "auto_circuit.data.text": ("token_batches",),
    "auto_circuit.errors": ("AutoCircuitError",),
    "auto_circuit.graph.circuit_graph": ("CircuitGraph",),
    "auto_circuit.graph.edge_ends": ("Edge",),
    "auto_circuit.graph.edge_layout": ("EdgeLayout",),
    "auto_circuit.graph.nodes": ("Node", "NodeScores"),
    "auto_circuit.graph.prune_scores": ("Circuit", "PruneScores"),
    "auto_circuit.metrics.faithfulness": ("FaithfulnessCurve", "faithfulness_curve"),
    "auto_circuit.metrics.objectives": ("answer_log_prob", "logit_diff", "prob_diff"),
    "auto_circuit.model_utils.model_loading": ("load_model",),
    f"{_SAE}.autoencoder_transformer": ("AutoencoderTransformer", "sae_model"),
    f"{_SAE}.checkpoints": ("load_saes", "save_saes"),
    f"{_SAE}.neuron_autoencoder": ("neuron_saes",),
    f"{_SAE}.quality": ("sae_quality",),
    f"{_SAE}.quality_results": ("SiteQuality",),
    f"{_SAE}.sparse_autoencoder": ("SparseAutoencoder",),
    f"{_SAE}.training.activation_cache": ("CachedActivations",),
    f"{_SAE}.training.config": ("TrainingConfig",),
    f"{_SAE}.training.trainer": ("train_saes",),
    "auto_circuit.patching.ablations": ("Ablation", "GraphRecorder"),
    "auto_circuit.patching.edge_patching": ("PatchType", "run_circuits"),
    "auto_circuit.prune_algos.edge_attribution": ("edge_attribution",),
    "auto_circuit.prune_algos.node_attribution": ("exact_node_effects", "node_attribution"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "Ablation",
    "AutoCircuitError",
    "AutoencoderTransformer",
    "CachedActivations",
    "Circuit",
    "CircuitGraph",
    "Edge",
    "EdgeLayout",
    "FaithfulnessCurve",
    "GraphRecorder",
    "Node",
    "NodeScores",
    "PatchType",
    "PromptBatch",
    "PromptDataset",
    "PromptPair",
    "PruneScores",
    "SiteQuality",
    "SparseAutoencoder",
    "TrainingConfig",
    "answer_log_prob",
    "edge_attribution",
    "exact_node_effects",
    "faithfulness_curve",
    "load_model",
    "load_prompts",
    "load_saes",
    "logit_diff",
    "neuron_saes",
    "node_attribution",
    "prob_diff",
    "read_prompts",
    "run_circuits",
    "sae_model",
    "sae_quality",
    "save_saes",
    "token_batches",
    "train_saes",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'auto_circuit' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
