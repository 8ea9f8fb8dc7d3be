"""Nodes of SAE sites (latents and errors) and one score for each.

Nodes have one order, on which every ranking and index agrees: sites as they run; in a site the latents
(position by position when scored per position), then the error.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from auto_circuit.errors import InputError, unknown_name
from auto_circuit.files import write_tensors


@dataclass(frozen=True)
class Node:
    """One latent or error.

    Attributes:
        site: name of the SAE's site.
        latent: index of the latent in the SAE as it is now; None for the error.
        latent_id: its published id; None for the error.
        position: token position, when nodes are per position; else None.
        score: its score.
    """

    site: str
    latent: int | None
    latent_id: int | None
    position: int | None
    score: float

    @property
    def name(self) -> str:
        """For people and files: `blocks.6.hook_mlp_out/latent.123`, `…/error`, `…@4` per position."""
        what = "error" if self.latent is None else f"latent.{self.latent_id}"
        return f"{self.site}/{what}" + ("" if self.position is None else f"@{self.position}")


@dataclass(frozen=True)
class SiteScores:
    """Scores of one site's nodes.

    Attributes:
        latents: `[(seq,) n_latents]`.
        error: `[(seq)]`, a scalar unless per position; None when the site has no error node.
        latent_ids: published ids, `[(seq,) n_latents]`.
    """

    latents: Float[Tensor, "*seq n_latents"]
    error: Float[Tensor, "*seq"] | None
    latent_ids: Int[Tensor, "*seq n_latents"]


@dataclass(frozen=True)
class SiteMask:
    """Which of one site's nodes are kept: `latents [(seq,) n_latents]`, `error [(seq)]` or None."""

    latents: Bool[Tensor, "*seq n_latents"]
    error: Bool[Tensor, "*seq"] | None


class NodeScores:
    """One score for every latent and every error of some sites.

    A score is, to first order, `objective(kept) − objective(ablated)`, mean over prompts: positive means
    that the node helps.

    Args:
        sites: site name → scores, in the order in which sites run; all per position, or none.
    """

    def __init__(self, sites: Mapping[str, SiteScores]) -> None:
        if not sites or len({scores.latents.ndim for scores in sites.values()}) != 1:
            raise InputError("NodeScores needs at least one site, and all per position or none.")
        self.sites = dict(sites)

    @property
    def per_position(self) -> bool:
        """Whether each token position has nodes of its own."""
        return next(iter(self.sites.values())).latents.ndim == 2

    def __len__(self) -> int:
        parts = [s.latents.numel() + (0 if s.error is None else s.error.numel()) for s in self.sites.values()]
        return sum(parts)

    def flat(self) -> Float[Tensor, " n_nodes"]:
        """Every node's score in the order of nodes."""
        parts = []
        for scores in self.sites.values():
            parts.append(scores.latents.flatten())
            if scores.error is not None:
                parts.append(scores.error.flatten())
        return torch.cat(parts)

    def ranking(self, *, signed: bool = False) -> Int[Tensor, " n_nodes"]:
        """Indices of nodes, best first: by score, or by absolute score; ties by index."""
        scores = self.flat()
        return (scores if signed else scores.abs()).argsort(descending=True, stable=True)

    def top(self, k: int, *, signed: bool = False, site: str | None = None) -> list[Node]:
        """Return the `k` best nodes (of one site), best first.

        Raises:
            UnknownNameError: for a site without scores.
        """
        if site is not None and site not in self.sites:
            raise unknown_name("scored site", site, self.sites)
        scores = self if site is None else NodeScores({site: self.sites[site]})
        return [scores.node(int(i)) for i in scores.ranking(signed=signed)[: max(k, 0)]]

    def node(self, index: int) -> Node:
        """Return the node at an index of the order of nodes."""
        if not 0 <= index < len(self):
            raise InputError(f"There are nodes 0 to {len(self) - 1}; given {index}.")
        for name, scores in self.sites.items():
            n = scores.latents.numel()
            if index < n:
                position, latent = divmod(index, scores.latents.shape[-1])
                ids = scores.latent_ids[..., latent]
                return Node(
                    site=name,
                    latent=latent,
                    latent_id=int(ids[position] if ids.ndim else ids),
                    position=position if self.per_position else None,
                    score=float(scores.latents.view(-1)[index]),
                )
            index -= n
            if scores.error is not None:
                if index < scores.error.numel():
                    return Node(
                        site=name,
                        latent=None,
                        latent_id=None,
                        position=index if self.per_position else None,
                        score=float(scores.error.flatten()[index]),
                    )
                index -= scores.error.numel()
        raise AssertionError("unreachable: the index was checked")

    def masks(self, kept: Int[Tensor, " k"] | Sequence[int]) -> dict[str, SiteMask]:
        """Return, for every site, which nodes are among the indices `kept`."""
        flat = torch.zeros(len(self), dtype=torch.bool)
        flat[torch.as_tensor(kept, dtype=torch.long)] = True
        masks, start = {}, 0
        for name, scores in self.sites.items():
            latents = flat[start : start + scores.latents.numel()].reshape(scores.latents.shape)
            start += scores.latents.numel()
            error = None
            if scores.error is not None:
                error = flat[start : start + scores.error.numel()].reshape(scores.error.shape)
                start += scores.error.numel()
            masks[name] = SiteMask(latents, error)
        return masks

    def save(self, path: str | Path) -> None:
        """Write the scores as safetensors: `{site}/latents`, `{site}/error`, `{site}/latent_ids`."""
        tensors: dict[str, Tensor] = {}
        for name, scores in self.sites.items():
            tensors[f"{name}/latents"] = scores.latents
            tensors[f"{name}/latent_ids"] = scores.latent_ids
            if scores.error is not None:
                tensors[f"{name}/error"] = scores.error
        write_tensors(Path(path), tensors, {"sites": "\n".join(self.sites)})

    @classmethod
    def load(cls, path: str | Path) -> "NodeScores":
        """Read what `save` wrote; no model is needed.

        Raises:
            InputError: for a file that is missing, damaged, or holds no scores.
        """
        try:
            with safe_open(str(path), "pt") as file:
                names = (file.metadata() or {})["sites"].split("\n")
                held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(
                f"{path} holds no node scores ({error}); expected a file that save wrote."
            ) from error
        return cls(
            {
                name: SiteScores(
                    held[f"{name}/latents"], held.get(f"{name}/error"), held[f"{name}/latent_ids"]
                )
                for name in names
            }
        )

    def __iter__(self) -> Iterator[Node]:
        return (self.node(i) for i in range(len(self)))
