"""Edge patching written out: every source a dense tensor, every reader an input of its own.

The independent reference of the graph's tests. Sources are named by hand, masks are looked up by edge name,
readers are TransformerLens' own split hooks (`hook_q_input` and so on) where the model has them, else each
head's norm and projection called one by one. Nothing of `auto_circuit.patching` is used.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from references import parts
from torch import Tensor

from auto_circuit import SparseAutoencoder

#: (source, destination) → how much of the patch the edge carries, a number or one for each position.
Carried = Callable[[str, str], Any]


class DenseEdges:
    def __init__(
        self, model: Any, saes: Mapping[str, SparseAutoencoder], *, error_nodes: bool = True
    ) -> None:
        self.model, self.saes, self.error_nodes = model, dict(saes), error_nodes
        self.sources: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}

    def run(
        self, tokens: Tensor, patch: Mapping[str, Tensor] | None = None, carried: Carried = lambda _s, _d: 0.0
    ) -> Tensor:
        """Return last-position logits; `sources` then holds what every source wrote."""
        self.patch, self.carried = patch, carried
        self.sources, self.inputs = {}, {}
        model, n = self.model, self.model.cfg.n_layers
        split = not model.cfg.architecture.startswith("TransformerLensNative")
        flag = model.cfg.use_split_qkv_input
        hooks: list[tuple[str, Any]] = [("blocks.0.hook_resid_pre", self._start)]
        for layer in range(n):
            hooks += self._block(layer, split)
        hooks.append((f"blocks.{n - 1}.hook_resid_post", lambda x, hook: self._read(x, "end")))
        try:
            if split:
                model.set_use_split_qkv_input(True)
            return model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
        finally:
            if split:
                model.set_use_split_qkv_input(flag)

    def _start(self, x: Tensor, hook: Any) -> None:
        self.sources["start"] = x

    def _read(self, x: Tensor, destination: str) -> Tensor:
        """Add what the edges into one reader carry to what it reads anyway."""
        if self.patch is not None:
            for source, written in self.sources.items():
                m = torch.as_tensor(self.carried(source, destination), dtype=x.dtype)
                x = x + (m[:, None] if m.ndim else m) * (self.patch[source] - written)
        self.inputs[destination] = x
        return x

    # ---- one block -------------------------------------------------------------------------------

    def _block(self, layer: int, split: bool) -> list[tuple[str, Any]]:
        name, block = f"blocks.{layer}", self.model.blocks[layer]
        before: dict[str, Tensor] = {}
        visible: list[str] = []

        def stream(x: Tensor, hook: Any) -> None:
            before["x"] = x
            visible[:] = list(self.sources)

        hooks: list[tuple[str, Any]] = [(f"{name}.hook_resid_pre", stream)]
        for part in "qkv":
            if split:

                def heads(x: Tensor, hook: Any, part: str = part) -> Tensor:
                    rows = [self._read(x[:, :, h], f"{name}.attn.{part}/head.{h}") for h in range(x.shape[2])]
                    return torch.stack(rows, 2)

                hooks.append((f"{name}.hook_{part}_input", heads))
            else:

                def projected(out: Tensor, hook: Any, part: str = part) -> Tensor:
                    rows = []
                    for h in range(out.shape[2]):
                        x = self._read(before["x"], f"{name}.attn.{part}/head.{h}")
                        y = getattr(block.attn, part).original_component(block.ln1.original_component(x))
                        rows.append(y.view(out.shape)[:, :, h])
                    return torch.stack(rows, 2)

                hooks.append((f"{name}.attn.hook_{part}", projected))
        hooks += self._writer(layer, "attn", "o", "ln1_post", "hook_z", visible)
        if getattr(block, "mlp", None) is not None:
            hooks.append((f"{name}.ln2.hook_in", lambda x, hook: self._read(x, f"{name}.mlp.in")))
            hooks += self._writer(layer, "mlp", "out", "ln2_post", "hook_post", visible)
        return hooks

    def _writer(
        self, layer: int, component: str, projection: str, norm: str, inner: str, visible: list[str]
    ) -> list[tuple[str, Any]]:
        """Hooks that write out what a component's sources write, once all of it is known."""
        name, block = f"blocks.{layer}", self.model.blocks[layer]
        linear = getattr(getattr(block, component), projection).original_component
        weight = linear.weight.T if isinstance(linear, torch.nn.Linear) else linear.weight
        post = getattr(block, norm, None) if norm in block._modules else None
        seen: dict[str, Tensor] = {"scale": torch.ones(())}
        inner_site, outer_site = f"{name}.{component}.{inner}", f"{name}.hook_{component}_out"
        parallel = bool(getattr(self.model.cfg, "parallel_attn_mlp", False))

        def at_inner(x: Tensor, hook: Any) -> Tensor | None:
            flat = x.reshape(*x.shape[:2], -1)
            seen["inner"] = flat
            if inner_site not in self.saes:
                return None
            out = self._site(inner_site, flat, seen)
            return out.view(x.shape)

        def at_outer(x: Tensor, hook: Any) -> Tensor | None:
            out = self._site(outer_site, x, seen) if outer_site in self.saes else None
            mine = self._sources(layer, component, x, seen, weight, post)
            if parallel and component == "attn":
                self._held = mine  # the MLP of a parallel block does not see them
            else:
                self.sources |= {**getattr(self, "_held", {}), **mine}
                self._held = {}
            return out

        hooks: list[tuple[str, Any]] = [(inner_site, at_inner), (outer_site, at_outer)]
        if post is not None:
            hooks.insert(1, (f"{name}.{norm}.hook_scale", lambda s, hook: seen.update(scale=s)))
        return hooks

    def _site(self, site: str, x: Tensor, seen: dict[str, Tensor]) -> Tensor:
        sae = self.saes[site]
        seen["c"], seen["e"] = parts(sae, x)
        return x if self.error_nodes else seen["c"] @ sae.decode_weight.T + sae.bias

    def _sources(
        self, layer: int, component: str, out: Tensor, seen: dict[str, Tensor], weight: Tensor, post: Any
    ) -> dict[str, Tensor]:
        name = f"blocks.{layer}"
        gain = 1.0 if post is None else (1 + post.original_component.weight) / seen["scale"]
        inner = f"{name}.{component}.{'hook_z' if component == 'attn' else 'hook_post'}"
        outer = f"{name}.hook_{component}_out"
        for site, through in ((inner, True), (outer, False)):
            if site not in self.saes:
                continue
            sae = self.saes[site]
            to_stream = (lambda v: v @ weight * gain) if through else (lambda v: v)
            each = seen["c"][..., None] * sae.decode_weight.T
            written = {f"{site}/latent.{i}": to_stream(each[..., i, :]) for i in range(each.shape[-2])}
            if self.error_nodes:
                constant = sae.bias if through and post is not None else 0.0
                written[f"{site}/error"] = to_stream(seen["e"] + constant)
            elif through and post is not None:
                written[f"{site}/bias"] = to_stream(sae.bias.expand_as(seen["e"]))
            return written
        if component == "mlp":
            return {f"{name}.mlp": out}
        n_heads = self.model.cfg.n_heads
        z = seen["inner"].unflatten(-1, (n_heads, -1))
        w = weight.unflatten(0, (n_heads, -1))
        return {f"{name}.attn/head.{h}": z[:, :, h] @ w[h] * gain for h in range(n_heads)}
