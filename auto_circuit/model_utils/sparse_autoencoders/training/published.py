"""From a trained coder to the SAE as published: its threshold set, its numbers measured, its card."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.model_utils.sparse_autoencoders.training.coder import Coder


@torch.no_grad()
def published(
    site: str, coder: Coder, rows: Float[Tensor, "rows d"], identity: Mapping[str, Any]
) -> tuple[SparseAutoencoder, dict[str, float]]:
    """Return the SAE of a coder, and its L0 and FVU on some activations in their own units.

    Args:
        site: where it stands.
        coder: what was trained; BatchTopK's threshold is set on the rows.
        rows: activations of the training text, `[rows, n_inputs]`.
        identity: the model's `name`, for the card.
    """
    coder.calibrate(rows)
    sae, rows = coder.to_sae(), rows.cpu()
    n_active, left = 0, 0.0
    for x in rows.split(2_048):
        z = sae.encode(x)
        n_active += int((z > 0).sum())
        left += float((x - sae.decode(z)).double().square().sum())
    spread = (rows.double() - rows.mean(0, dtype=torch.float64)).square().sum().clamp(min=1e-12)
    measured = {"l0": n_active / len(rows), "fvu": left / float(spread)}
    card = {
        "model_name": identity.get("name", ""),
        "hook_name": site,
        "context_size": coder.config.context_length,
        "training_architecture": coder.kind,
        "l0": measured["l0"],
        "num_dead_features": int(coder.dead.sum()),
        "auto_circuit": {"config": coder.config.as_dict(), "fvu": measured["fvu"]},
    }
    sae.metadata = {"format": "sae_lens", "cfg": {"metadata": card}}
    return sae, measured
