"""The one file that knows TransformerLens: sites and their names, and putting modules in their place.

Two model classes are understood, each by an adapter of its own:

- `TransformerBridge` (TransformerLens 3.9 and 4.x). Every hook point has a canonical name
  (`blocks.3.mlp.hook_out`) and usually an alias (`blocks.3.hook_mlp_out`); hook points are looked up
  in `_hook_registry`.
- `HookedTransformer` (TransformerLens 3.9). One name each, in `hook_dict` and `mod_dict`.

A site is one of seven kinds of place in a block (`SITE_KINDS`). On the bridge `hook_resid_mid` stands
inside `ln2` and carries only the MLP branch, so `Site.branch_only` says that what is changed there
must be added again at the block's output.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from auto_circuit.errors import InputError, listed, unknown_name

#: The kinds of site by the end of their name, in the order in which a block runs them.
SITE_KINDS: dict[str, str] = {
    "hook_resid_pre": "start of the block on the residual stream",
    "attn.hook_z": "attention heads before the output projection, flattened",
    "hook_attn_out": "output of the attention layer",
    "hook_resid_mid": "residual stream between attention and MLP",
    "mlp.hook_post": "MLP neurons after the activation function",
    "hook_mlp_out": "output of the MLP",
    "hook_resid_post": "end of the block on the residual stream",
}

#: AutoCircuit's names for "this site in every layer".
SITE_FAMILIES: dict[str, str] = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_mlp": "hook_mlp_out",
    "resid": "hook_resid_post",
}


@dataclass(frozen=True)
class Site:
    """A place in a model where an SAE can stand.

    Attributes:
        name: what we call it, the alias where there is one: `blocks.3.hook_mlp_out`.
        canonical: TransformerLens' own name of the hook point: `blocks.3.mlp.hook_out`.
        names: every name under which the model knows the hook point.
        kind: its key in `SITE_KINDS`.
        layer: index of the block.
        width: size of the activation's last dimension (of the last two, for heads not flattened).
        hook_point: the hook point itself.
        branch_only: whether the hook point carries only a branch, not the stream itself.
    """

    name: str
    canonical: str
    names: tuple[str, ...]
    kind: str
    layer: int
    width: int
    hook_point: HookPoint
    branch_only: bool

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sites by when they run."""
        return self.layer, list(SITE_KINDS).index(self.kind)


class HookedModel:
    """What this package asks of a model, whatever its class. Use `hooked_model(model)`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.model.cfg.n_layers

    def hook_points(self) -> dict[str, HookPoint]:
        """Every hook point by each of its names, also where something stands in its place."""
        return {name: _hook_point(module) for name, module in self.model.hook_dict.items()}

    def registries(self) -> list[dict[str, Any]]:
        """The dicts in which a hook point must be entered so that its name is found."""
        raise NotImplementedError

    def block(self, layer: int) -> nn.Module:
        """The module of a block."""
        return self.model.blocks[layer]

    def prepare(self) -> None:
        """Finish what the model would otherwise set up in its first forward pass."""

    def remember_caches(self) -> Callable[[], None]:
        """Return what puts back the model's own caches of its registry."""
        return lambda: None

    def has_branch_only(self, kind: str) -> bool:
        """Whether a hook point of this kind carries only a branch of the stream."""
        del kind
        return False

    def linear(self, layer: int, name: str) -> tuple[Tensor, Tensor | None] | None:
        """Weight `[n_in, n_out]` and bias of a linear map of a block: attn.q, .k, .v, .o, or mlp.out.

        None where the block has no such map of that form.
        """
        raise NotImplementedError

    def norm(self, layer: int, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
        """A norm of a block (`ln1`, `ln2`, `ln1_post`, `ln2_post`): its module, and how to call it quietly.

        None where the block has none of that name.
        """
        raise NotImplementedError

    def holders(self, hook_points: Iterable[nn.Module]) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
        """Every (module, attribute) that holds each of some hook points as a submodule."""
        found: dict[nn.Module, list[tuple[nn.Module, str]]] = {hook_point: [] for hook_point in hook_points}
        for module in self.model.modules():
            for attribute, child in module._modules.items():
                if child in found:
                    found[child].append((module, attribute))
        return found

    def sites(self) -> list[Site]:
        """Every site of the model, in the order in which they run."""
        hooks = self.hook_points()
        names = [f"blocks.{layer}.{kind}" for layer in range(self.n_layers) for kind in SITE_KINDS]
        return [self._site(name, hooks) for name in names if name in hooks]

    def site(self, name: str) -> Site:
        """Resolve a name or alias to its site.

        Raises:
            UnknownNameError: naming the nearest sites, and `hook_resid_pre` where a block has no
                `hook_resid_mid`.
        """
        hooks = self.hook_points()
        if name in hooks:
            for known in self.sites():
                if known.hook_point is hooks[name]:
                    return known
        kinds = ", ".join(SITE_KINDS)
        hint = f"SAEs can stand at {kinds} of blocks 0 to {self.n_layers - 1}."
        if name in hooks:
            raise InputError(f"{name} is a hook point, but not one where an SAE can stand. {hint}")
        if name.endswith("hook_resid_mid"):
            hint = (
                "Parallel blocks have no stream between attention and MLP; use "
                f"{name.replace('hook_resid_mid', 'hook_resid_pre')}. {hint}"
            )
        raise unknown_name("site of this model", name, [site.name for site in self.sites()], hint)

    def family(self, name: str) -> list[str]:
        """The names of a site family (`SITE_FAMILIES`, or a key of `SITE_KINDS`), layer by layer."""
        kind = SITE_FAMILIES.get(name, name)
        if kind not in SITE_KINDS:
            raise unknown_name("family of sites", name, [*SITE_FAMILIES, *SITE_KINDS])
        return [site.name for site in self.sites() if site.kind == kind]

    def _site(self, name: str, hooks: Mapping[str, HookPoint]) -> Site:
        hook_point = hooks[name]
        _, layer, kind = name.split(".", 2)
        names = tuple(other for other, hook in hooks.items() if hook is hook_point)
        return Site(
            name=name,
            canonical=str(hook_point.name),
            names=tuple(sorted({*names, str(hook_point.name)})),
            kind=kind,
            layer=int(layer),
            width=self._width(kind, self.block(int(layer))),
            hook_point=hook_point,
            branch_only=self.has_branch_only(kind),
        )

    def _width(self, kind: str, block: Any) -> int:
        cfg = self.model.cfg
        projection = {"mlp.hook_post": ("mlp", "out"), "attn.hook_z": ("attn", "o")}.get(kind)
        if projection is None:
            return cfg.d_model
        # The weight that reads the site says its width, also where layers differ.
        component = getattr(getattr(block, projection[0], None), projection[1], None)
        wrapped = getattr(component, "original_component", None)
        if isinstance(wrapped, nn.Linear):
            return wrapped.in_features
        return cfg.d_mlp if kind == "mlp.hook_post" else cfg.n_heads * cfg.d_head


def _hook_point(module: Any) -> HookPoint:
    """Return the hook point that a module in its place wraps (an alias can name either)."""
    while not isinstance(module, HookPoint):
        module = module.wrapped_hook
    return module


class _Bridge(HookedModel):
    """`TransformerBridge`, TransformerLens 3.9 and 4.x."""

    def registries(self) -> list[dict[str, Any]]:
        return [self.model._hook_registry]

    def prepare(self) -> None:
        # Blocks wire some hook points into closures in their first forward pass. Done now, the
        # closures hold the hook points themselves rather than whatever stands in their place.
        for block in self.model.blocks:
            wire = getattr(block, "_maybe_wire_capture_hooks", None)
            if wire is not None:
                wire()

    def remember_caches(self) -> Callable[[], None]:
        name = "_block_alias_cache"
        if name not in self.model.__dict__:
            return lambda: None
        before = self.model.__dict__[name]
        return lambda: self.model.__dict__.__setitem__(name, before)

    def has_branch_only(self, kind: str) -> bool:
        return kind == "hook_resid_mid"

    def linear(self, layer: int, name: str) -> tuple[Tensor, Tensor | None] | None:
        component, _, part = name.partition(".")
        module = getattr(self.block(layer), component, None)
        wrapped = getattr(getattr(module, part, None), "original_component", None)
        weight = getattr(wrapped, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        # Hugging Face's Conv1D holds [n_in, n_out], nn.Linear the transpose.
        weight = weight.T if isinstance(wrapped, nn.Linear) else weight
        return weight, getattr(wrapped, "bias", None)

    def norm(self, layer: int, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
        module: Any = self.block(layer)._modules.get(name)
        return None if module is None else (module, module.original_component)


class _HookedTransformer(HookedModel):
    """`HookedTransformer`, TransformerLens 3.9 (and older)."""

    def registries(self) -> list[dict[str, Any]]:
        return [self.model.hook_dict, self.model.mod_dict]

    def linear(self, layer: int, name: str) -> tuple[Tensor, Tensor | None] | None:
        component, _, part = name.partition(".")
        module = getattr(self.block(layer), component, None)
        if module is None:
            return None
        if component == "mlp":
            weight = getattr(module, "W_out", None)
            return None if weight is None else (weight, getattr(module, "b_out", None))
        raw = {"k": "_W_K", "v": "_W_V"}.get(part, "")  # one for each key/value head under GQA
        weight = getattr(module, raw, None)
        weight = getattr(module, f"W_{part.upper()}") if weight is None else weight
        bias = getattr(module, raw.replace("W", "b"), None) if raw else None
        bias = getattr(module, f"b_{part.upper()}") if bias is None else bias
        if part == "o":
            return weight.flatten(0, 1), bias
        return weight.transpose(0, 1).flatten(1), bias.flatten()

    def norm(self, layer: int, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
        module = self.block(layer)._modules.get(name)
        return None if module is None or isinstance(module, nn.Identity) else (module, module)


def hooked_model(model: Any) -> HookedModel:
    """Return the adapter for a TransformerLens model.

    Raises:
        InputError: for anything but a `TransformerBridge` or a `HookedTransformer`.
    """
    classes = {cls.__name__ for cls in type(model).__mro__}
    if "TransformerBridge" in classes:
        if not hasattr(model, "blocks") or not hasattr(model.cfg, "n_layers"):
            raise InputError(
                f"{type(model).__name__} of {getattr(model.cfg, 'architecture', 'this kind')} has "
                f"no `blocks`; only decoder-only models can carry SAEs."
            )
        return _Bridge(model)
    if "HookedTransformer" in classes:
        return _HookedTransformer(model)
    raise InputError(
        f"Expected a TransformerLens model (TransformerBridge, or HookedTransformer on "
        f"TransformerLens 3); given {type(model).__name__}. Load one with auto_circuit.load_model, "
        f"or TransformerBridge.boot_transformers(name)."
    )


def boot_model(source: str, device: str | torch.device, dtype: torch.dtype) -> Any:
    """Boot a Hugging Face folder or hub name as a `TransformerBridge`; errors are the libraries' own."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(source, device=str(device), dtype=dtype)


def parse_layers(model: Any, layers: Any) -> list[int]:
    """Check layer indices against a model.

    Args:
        model: a TransformerLens model.
        layers: an iterable of ints, or None for all.

    Raises:
        InputError: for an index out of range or given twice.
    """
    n_layers = hooked_model(model).n_layers
    chosen = list(range(n_layers)) if layers is None else [int(layer) for layer in layers]
    wrong = [layer for layer in chosen if not 0 <= layer < n_layers]
    if wrong or len(set(chosen)) != len(chosen) or not chosen:
        raise InputError(
            f"Layers must be among 0 to {n_layers - 1}, each once, at least one; given "
            f"{listed([str(layer) for layer in chosen])}."
        )
    return chosen
