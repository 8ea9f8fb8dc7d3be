"""Putting modules in the place of hook points, and taking them out without a trace.

`Splice.enter` swaps through `parent._modules` (never `setattr`, which renames hooks), enters the
SAEs' own hooks in the model's registry under every name of the site, and refuses what would break
the model meanwhile. `Splice.leave` undoes exactly that, also after an exception at any point.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from auto_circuit.errors import SpliceError
from auto_circuit.model_utils.hooked_model import HookedModel, Site
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder

#: The hooks of an SAE that get names in the model: `{site}.latents` and so on.
SAE_HOOKS = ("latents", "latent_outs", "error_out")

_GUARDED = {
    "moved or converted": "to cuda cpu mps half float double bfloat16 type _apply".split(),
    "put in compatibility mode or set up anew": (
        "enable_compatibility_mode process_weights process_weights_ setup clear_hook_registry".split()
    ),
    "copied or pickled": ["__deepcopy__", "__reduce_ex__", "__getstate__"],
}


class BlockOutput(nn.Module):
    """Stands at a block's output and adds what an SAE on a branch of the stream changed."""

    def __init__(self, wrapped_hook: nn.Module, sae: SparseAutoencoder) -> None:
        super().__init__()
        self.wrapped_hook = wrapped_hook
        # Not a submodule: it has its place elsewhere in the model.
        self.__dict__["sae"] = sae

    def forward(self, x: Tensor) -> Tensor:
        """Add the change at the branch, then do what stood here."""
        change = self.__dict__["sae"].take_branch_change()
        return self.wrapped_hook(x if change is None else x + change)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped_hook"), name)


class Splice:
    """SAEs in the place of hook points of one model.

    Args:
        hooked: the model's adapter.
        placed: sites with their SAEs.
        error_nodes: set on every SAE while it is spliced.
    """

    def __init__(
        self,
        hooked: HookedModel,
        placed: list[tuple[Site, SparseAutoencoder]],
        error_nodes: bool,
    ) -> None:
        self.hooked = hooked
        self.placed = placed
        self.error_nodes = error_nodes
        self.active = False
        self.checked = False
        self._undo: list[Callable[[], object]] = []

    # ---- entering and leaving -------------------------------------------------------------------

    def enter(self) -> None:
        """Put every SAE in its place.

        Raises:
            SpliceError: when the model, or one of the SAEs, is spliced already.
        """
        refuse_if_spliced(self.hooked.model)
        self.active = True
        self.checked = False
        try:
            self.hooked.prepare()
            self._undo.append(self.hooked.remember_caches())
            holders = self.hooked.holders(site.hook_point for site, _ in self.placed)
            self._undo.append(self._repair_aliases)
            for site, sae in self.placed:
                self._place(site, sae, holders[site.hook_point])
            for site, sae in self.placed:
                if site.branch_only:
                    self._correct_block(site, sae)
            self._guard(self.hooked.model)
            for module in self._ancestors():
                self._guard(module, only=("_apply",))
            self._watch_forward()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Take everything out again, last in first out; a step that fails does not keep the others."""
        try:
            while self._undo:
                self._undo.pop()()
        finally:
            if self._undo:
                self.leave()
            self.active = False

    def _place(self, site: Site, sae: SparseAutoencoder, holders: list[tuple[nn.Module, str]]) -> None:
        if sae.spliced_at is not None:
            raise SpliceError(
                f"The SAE for {site.name} is already spliced at {sae.spliced_at}; unsplice that "
                f"first, or give a copy (copy.deepcopy)."
            )
        if not holders:
            raise SpliceError(
                f"{site.name} is no submodule of the model any more; was its hook point replaced?"
            )
        before = (sae.wrapped_hook, sae.error_nodes, sae.training)

        def restore_sae() -> None:
            sae.spliced_at = None
            sae.branch_only = False
            sae.take_branch_change()
            sae._modules["wrapped_hook"], sae.error_nodes, sae.training = before
            for name in SAE_HOOKS:
                getattr(sae, name).name = None

        self._undo.append(restore_sae)
        sae.spliced_at = site.name
        sae.branch_only = site.branch_only
        sae.error_nodes = self.error_nodes
        sae._modules["wrapped_hook"] = site.hook_point
        sae.n_calls = 0
        for parent, attribute in holders:
            self._swap(parent, attribute, sae)
        for name in SAE_HOOKS:
            hook = getattr(sae, name)
            hook.name = f"{site.canonical}.{name}"
            for registry in self.hooked.registries():
                for site_name in site.names:
                    registry[f"{site_name}.{name}"] = hook
                    self._undo.append(lambda r=registry, n=f"{site_name}.{name}": r.pop(n, None))

    def _swap(self, parent: nn.Module, attribute: str, module: nn.Module) -> None:
        before = parent._modules[attribute]
        parent._modules[attribute] = module
        self._undo.append(lambda: parent._modules.__setitem__(attribute, before))

    def _correct_block(self, site: Site, sae: SparseAutoencoder) -> None:
        """Make the block's output carry what the SAE changes on the branch it stands on."""
        block = self.hooked.block(site.layer)
        inner = block._modules["hook_out"]
        if inner is not None:
            self._swap(block, "hook_out", BlockOutput(inner, sae))

    def _repair_aliases(self) -> None:
        """Point attributes that came to name an SAE (alias attributes) back at its hook point."""
        hook_points = {id(sae): site.hook_point for site, sae in self.placed}
        for module in self.hooked.model.modules():
            for key, value in module.__dict__.items():
                if id(value) in hook_points:
                    module.__dict__[key] = hook_points[id(value)]

    # ---- refusals and the check ------------------------------------------------------------------

    def _guard(self, module: nn.Module, only: tuple[str, ...] | None = None) -> None:
        """Make what would break a spliced model say so instead."""
        for what, names in _GUARDED.items():
            for name in names:
                there = hasattr(type(module), name) or name == "__deepcopy__"
                if not there or name in module.__dict__ or (only is not None and name not in only):
                    continue
                module.__dict__[name] = _refusal(what)
                self._undo.append(lambda n=name: module.__dict__.pop(n, None))

    def _ancestors(self) -> list[nn.Module]:
        """Every module that has an SAE somewhere below it: converting it would convert half of it."""
        roots = [self.hooked.model, getattr(self.hooked.model, "original_model", None)]
        parents: dict[int, list[nn.Module]] = {}
        for root in roots:
            for module in root.modules() if isinstance(root, nn.Module) else ():
                for child in module._modules.values():
                    parents.setdefault(id(child), []).append(module)
        found: dict[int, nn.Module] = {}
        waiting: list[nn.Module] = [sae for _, sae in self.placed]
        while waiting:
            for parent in parents.get(id(waiting.pop()), ()):
                if id(parent) not in found:
                    found[id(parent)] = parent
                    waiting.append(parent)
        return list(found.values())

    def _watch_forward(self) -> None:
        """Count, in every forward pass of the model, how often each site runs, until one was whole."""
        model = self.hooked.model
        run = model.forward

        @wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            for _, sae in self.placed:
                sae.n_calls = 0
            out = run(*args, **kwargs)
            if not self.checked and kwargs.get("start_at_layer") is None:
                self._check(kwargs.get("stop_at_layer"))
            return out

        model.__dict__["forward"] = forward
        self._undo.append(lambda: model.__dict__.pop("forward", None))

    def _check(self, stop_at_layer: int | None) -> None:
        """After a forward pass: check that every site (below the layer it stopped at) ran exactly once.

        Raises:
            SpliceError: naming the site; the model is restored first.
        """
        n_layers = self.hooked.n_layers
        stop = n_layers if stop_at_layer is None else stop_at_layer
        stop = stop + n_layers if stop < 0 else stop
        self.checked = stop_at_layer is None
        wrong = [(site, sae.n_calls) for site, sae in self.placed if site.layer < stop and sae.n_calls != 1]
        if wrong:
            self.leave()
            site, calls = wrong[0]
            raise SpliceError(
                f"{site.name} ran {calls} times in one forward pass of this model, expected once; "
                f"the model was restored. On this architecture its hook point ({site.canonical}) "
                f"does not carry the activation; try another site, for example "
                f"blocks.{site.layer}.hook_resid_post."
            )

    def hook_point(self, name: str) -> HookPoint | None:
        """Return the hook point of a site, or of an SAE at one, by any of its names; else None."""
        for site, sae in self.placed:
            if name in site.names:
                return site.hook_point
            site_name, _, hook = name.rpartition(".")
            if site_name in site.names and hook in SAE_HOOKS:
                return getattr(sae, hook)
        return None

    @contextmanager
    def without_names(self, *hooks: str) -> Iterator[None]:
        """Leave some of the SAEs' hooks out of the model's registry for a while."""
        taken = [
            (registry, name, registry.pop(name))
            for registry in self.hooked.registries()
            for name in list(registry)
            if name.rpartition(".")[2] in hooks
        ]
        try:
            yield
        finally:
            if self.active:  # a failed check has left already, and its names with it
                for registry, name, hook in taken:
                    registry[name] = hook


def refuse_if_spliced(model: nn.Module) -> None:
    """Raise a `SpliceError` when SAEs stand in this model now."""
    spliced = [sae.spliced_at for sae in model.modules() if isinstance(sae, SparseAutoencoder)]
    if spliced:
        raise SpliceError(
            f"This model is spliced already, with an SAE at {spliced[0]}. Leave that `with` block "
            f"(or call .unsplice()) first; to use more SAEs at once, give them all to one "
            f"sae_model call."
        )


def _refusal(what: str) -> Callable[..., NoReturn]:
    def refuse(*_args: object, **_kwargs: object) -> NoReturn:
        raise SpliceError(
            f"SAEs are spliced into this model; it cannot be {what} now. Leave the `with` block "
            f"(or call .unsplice()) first, do it, and splice again."
        )

    return refuse
