"""End-to-end losses: SAEs are trained so that the model with them in place does what the plain model does.

For a batch of tokens, with all SAEs in place of their sites' activations at once and errors dropped:

    loss = KL(plain ‖ spliced)  +  downstream · mean over later blocks of FVU(residual stream)
           +  each SAE's own sparsity penalty and revival of dead latents

The KL divergence is in nats, mean over counted positions. The FVU of a block is
`Σ‖spliced − plain‖² / Σ‖plain − mean‖²` of its end of the residual stream, over counted positions, for
every block from the first site's on. Special tokens keep their activations. Source: Braun et al. 2024
("Identifying functionally important features with end-to-end sparse dictionary learning"), who train one
SAE at a time; here those of a circuit learn to work together. The reconstruction itself has no loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from auto_circuit.model_utils.hooked_model import hooked_model
from auto_circuit.model_utils.sparse_autoencoders.training.activations import at_sites, is_counted
from auto_circuit.model_utils.sparse_autoencoders.training.coder import Coded, Coder, Losses
from auto_circuit.model_utils.sparse_autoencoders.training.processes import mean_over, total_over


class EndToEnd(NamedTuple):
    """What a batch of tokens costs end to end.

    Attributes:
        total: what is minimised.
        kl: KL divergence of the spliced model's next-token distribution from the plain model's, in nats.
        downstream: mean FVU of the residual stream after the blocks from the first site's on.
        sites: each site's own losses; their `total` is what they add to the total.
    """

    total: Tensor
    kl: Tensor
    downstream: Tensor
    sites: dict[str, Losses]


class EndToEndLoss:
    """Computes end-to-end losses of coders at the sites of a model.

    Args:
        model: a TransformerLens model; its parameters get no gradients.
        coders: site → coder.
        excluded: token ids whose positions keep their activations and do not count.
        downstream: weight of the downstream term.
    """

    def __init__(
        self, model: Any, coders: Mapping[str, Coder], excluded: Sequence[int], downstream: float = 1.0
    ) -> None:
        self._placed = at_sites(model, list(coders))
        self._coders, self._excluded, self._weight = dict(coders), list(excluded), downstream
        hooked = hooked_model(model)
        first = min(site.layer for site in self._placed.sites.values())
        wanted = {f"blocks.{layer}.hook_resid_post" for layer in range(first, hooked.n_layers)}
        self._streams = [site for site in hooked.sites() if site.name in wanted]
        self._ran: dict[str, Losses] = {}

    def __call__(self, tokens: Int[Tensor, "rows seq"]) -> EndToEnd:
        """Return the losses of a batch of tokens, with gradients for the coders."""
        tokens = tokens.to(self._placed.device)
        counted = is_counted(tokens, self._excluded)
        model = self._placed.model
        with _frozen(model):
            with torch.no_grad(), self._recorded({}) as plain_streams:
                plain = model(tokens)[counted].float().log_softmax(-1)
            run = {name: partial(self._reconstructed, name, counted) for name in self._coders}
            with self._recorded(run) as streams:
                spliced = model(tokens)[counted].float().log_softmax(-1)
        divergence = torch.nn.functional.kl_div(spliced, plain, log_target=True, reduction="sum")
        kl = divergence / mean_over(counted.sum()).clamp(min=1)
        fvus = [_fvu(streams[name][counted], plain_streams[name][counted]) for name in plain_streams]
        downstream = torch.stack(fvus).mean()
        sites, self._ran = self._ran, {}
        total = kl + self._weight * downstream
        for losses in sites.values():
            total = total + losses.total
        return EndToEnd(total, kl, downstream, sites)

    def _reconstructed(self, name: str, counted: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """Return the reconstruction at counted positions, and the activation itself elsewhere."""
        coder = self._coders[name]
        rows = x[counted].float() * coder.scale
        written, coded, pre = coder.reconstruct(rows, learn=True)
        self._ran[name] = self._losses(coder, rows.detach(), written, coded, pre)
        result = out.clone()
        result[counted] = (written / coder.scale).to(out.dtype)
        return result

    @staticmethod
    def _losses(coder: Coder, rows: Tensor, written: Tensor, coded: Coded, pre: Tensor) -> Losses:
        error = (rows - written).detach()
        # Processes have unlike numbers of counted rows: their means are weighted by them.
        n_rows = mean_over(torch.tensor(float(len(rows)), device=rows.device))
        weight = len(rows) / n_rows
        total = weight * coder.sparsity_loss(coded) + coder.revival(rows - coder.bias.detach(), pre, error)
        fvu = error.square().sum() / (coder.variance * n_rows)
        return Losses(total, fvu, weight * coder.l0(coded), coder.fired(coded))

    @contextmanager
    def _recorded(self, run: Mapping[str, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Have edits at sites, and the streams after later blocks recorded."""
        streams: dict[str, Tensor] = {}

        def record(name: str, _module: Any, _args: Any, out: Tensor) -> None:
            streams[name] = out

        with self._placed.edits(run):
            # A site's own hook point may be a stream: what stands in its place is read, after its edit.
            saes = self._placed.saes
            places = {s.name: saes.get(s.name) or s.hook_point for s in self._streams}
            handles = [place.register_forward_hook(partial(record, name)) for name, place in places.items()]
            try:
                yield streams
            finally:
                for handle in handles:
                    handle.remove()


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Let the model's parameters need no gradients, and then as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


def _fvu(new: Tensor, plain: Tensor) -> Tensor:
    """Return this process's part of the FVU: the mean over processes is that of all their positions."""
    exact = plain.double()
    n = total_over(torch.tensor(float(len(plain)), device=plain.device))
    mean = total_over(exact.sum(0)) / n
    spread = mean_over((exact - mean).square().sum()).clamp(min=1e-12)
    return (new.float() - plain.float()).square().sum() / spread.to(torch.float32)
