"""The spliced model: a TransformerLens model with SAEs in the place of some of its hook points."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from auto_circuit.data.prompts import PromptDataset
from auto_circuit.errors import InputError, listed
from auto_circuit.model_utils.hooked_model import (
    SITE_FAMILIES,
    SITE_KINDS,
    HookedModel,
    Site,
    hooked_model,
)
from auto_circuit.model_utils.sparse_autoencoders.latent_pruning import PruningResult, prune_latents
from auto_circuit.model_utils.sparse_autoencoders.sparse_autoencoder import SparseAutoencoder
from auto_circuit.model_utils.splice import Splice, refuse_if_spliced

#: Methods of the model that work on hooks by name, so that they need the SAEs in place.
_NEEDS_SPLICE = frozenset(
    "reset_hooks remove_all_hook_fns list_hooks get_caching_hooks add_caching_hooks cache_all "
    "cache_some".split()
)

#: Site → SAE, or family of sites → one SAE for each layer. Checked by `sae_model`, hence no narrower type.
SaesBySite = Any


def sae_model(
    model: Any,
    saes: SaesBySite,
    *,
    error_nodes: bool = True,
) -> "AutoencoderTransformer":
    """Make a model with SAEs at some of its sites; neither copies nor re-classes the model.

    Use it in `with`, or call `.splice()` and `.unsplice()`; called outside of both, it splices for
    that one call. Leaving gives the model back as it was: the same modules, hooks, parameters, names.

    Args:
        model: a `TransformerBridge`, or (TransformerLens 3) a `HookedTransformer`.
        saes: site → SAE. A site is a name or alias of a hook point (`blocks.3.hook_mlp_out`); a site
            family (`resid_delta_mlp`, `mlp_post_act`, `resid`, or a kind such as `hook_mlp_out`)
            takes a sequence of SAEs, one for every layer.
        error_nodes: add each SAE's error back, so that the unpatched model is bitwise the plain one.

    Raises:
        UnknownNameError: for a site that does not exist.
        InputError: for an SAE of another width or on another device than its site, two SAEs at one
            site, or one SAE at two.
        SpliceError: when the model is spliced already.
    """
    return AutoencoderTransformer(model, saes, error_nodes=error_nodes)


class AutoencoderTransformer:
    """A model with SAEs at some of its sites; see `sae_model`.

    Everything the model has (`cfg`, `tokenizer`, `to_tokens`, `run_with_hooks`, …) is reachable here.
    While spliced, each SAE's hooks are hooks of the model: `blocks.3.hook_mlp_out.latents`,
    `.latent_outs`, `.error_out`; the site's own name keeps the SAE's input.

    Attributes:
        model: the model given.
        saes: the SAEs by the name of their site, in the order in which they run.
        sites: the sites by the same names.
        error_nodes: whether errors are added back.
    """

    def __init__(
        self,
        model: Any,
        saes: SaesBySite,
        *,
        error_nodes: bool = True,
    ) -> None:
        self._hooked = hooked_model(model)
        refuse_if_spliced(model)
        placed = _placed(self._hooked, saes)
        self.model = model
        self.saes = {site.name: sae for site, sae in placed}
        self.sites = {site.name: site for site, _ in placed}
        self.error_nodes = error_nodes
        self._splice = Splice(self._hooked, placed, error_nodes)
        self._depth = 0

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    def only_needed_layers(self) -> dict[str, int]:
        """Arguments of a forward pass that stops after the last site."""
        stop = max(site.layer for site in self.sites.values()) + 1
        return {"stop_at_layer": stop} if stop < self._hooked.n_layers else {}

    # ---- splicing -------------------------------------------------------------------------------

    @property
    def is_spliced(self) -> bool:
        """Whether the SAEs stand in the model now."""
        return self._splice.active

    def splice(self) -> "AutoencoderTransformer":
        """Put the SAEs in their places until `unsplice()`."""
        self._splice.enter()
        return self

    def unsplice(self) -> None:
        """Give the model back as it was. Does nothing when it is not spliced."""
        self._splice.leave()

    def __enter__(self) -> "AutoencoderTransformer":
        return self.splice()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unsplice()

    @contextmanager
    def spliced(self) -> Iterator["AutoencoderTransformer"]:
        """Be spliced inside this context; on leaving, be as before."""
        if self.is_spliced:
            yield self
            return
        with self:
            yield self

    @contextmanager
    def with_error_nodes(self, error_nodes: bool) -> Iterator["AutoencoderTransformer"]:
        """Be spliced, with or without error nodes, inside this context; on leaving, be as before."""
        with self.spliced():
            before = {name: sae.error_nodes for name, sae in self.saes.items()}
            try:
                for sae in self.saes.values():
                    sae.error_nodes = error_nodes
                yield self
            finally:
                for name, sae in self.saes.items():
                    sae.error_nodes = before[name]

    @contextmanager
    def edits(
        self,
        edits: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    ) -> Iterator["AutoencoderTransformer"]:
        """Be spliced, uncounted, and let functions set the output of some sites.

        Args:
            edits: site name → function of the SAE's input and output, both `[…, n_inputs]`, that
                returns the output to use.
        """
        with self.spliced():
            before = {name: (sae.edit, sae.counting) for name, sae in self.saes.items()}
            try:
                for name, sae in self.saes.items():
                    sae.edit, sae.counting = edits.get(name), False
                yield self
            finally:
                for name, sae in self.saes.items():
                    sae.edit, sae.counting = before[name]

    # ---- running --------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the spliced model."""
        with self.spliced():
            return self.model(*args, **kwargs)

    forward = __call__

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Run the spliced model and cache activations, latents and errors.

        Without a `names_filter` every hook is cached but `latent_outs`, whose contributions
        `[batch, seq, n_latents, n_inputs]` are gigabytes; name them in a filter to have them.
        """
        with self.spliced():
            if kwargs.get("names_filter") is not None:
                return self.model.run_with_cache(*args, **kwargs)
            with self._splice.without_names("latent_outs"):
                return self.model.run_with_cache(*args, **kwargs)

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Run the spliced model with temporary hooks."""
        with self.spliced():
            return self.model.run_with_hooks(*args, **kwargs)

    def add_hook(self, name: Any, hook_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add a hook by the name of a hook point (or a filter of names) to the spliced model."""
        hook_point = self._splice.hook_point(name) if isinstance(name, str) else None
        if hook_point is not None:
            return hook_point.add_hook(hook_fn, *args, **kwargs)
        with self.spliced():
            return self.model.add_hook(name, hook_fn, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the spliced model."""
        with self.spliced():
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def hooks(self, *args: Any, **kwargs: Any) -> Iterator["AutoencoderTransformer"]:
        """Have temporary hooks on the spliced model inside this context."""
        with self.spliced(), self.model.hooks(*args, **kwargs):
            yield self

    def prune_latents(
        self,
        prompts: PromptDataset,
        max_latents: int | None = None,
        per_position: bool = False,
        include_corrupt: bool = True,
        **options: Any,
    ) -> PruningResult:
        """Keep only the latents that a dataset uses: see `latent_pruning.prune_latents`."""
        return prune_latents(
            self,
            prompts,
            max_latents,
            per_position=per_position,
            include_corrupt=include_corrupt,
            **options,
        )

    def to(self, *args: Any, **kwargs: Any) -> "AutoencoderTransformer":
        """Move or convert the model and its SAEs (not while spliced)."""
        self.model.to(*args, **kwargs)
        for sae in self.saes.values():
            sae.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "model" not in self.__dict__:
            raise AttributeError(name)
        value = getattr(self.model, name)
        if name not in _NEEDS_SPLICE:
            return value

        def while_spliced(*args: Any, **kwargs: Any) -> Any:
            with self.spliced():
                return getattr(self.model, name)(*args, **kwargs)

        return while_spliced

    def __repr__(self) -> str:
        state = "spliced" if self.is_spliced else "not spliced"
        lines = [f"  {name}: {sae}" for name, sae in self.saes.items()]
        head = f"AutoencoderTransformer({type(self.model).__name__}, {state}"
        return "\n".join([f"{head}, error_nodes={self.error_nodes}", *lines, ")"])


def _placed(hooked: HookedModel, saes: SaesBySite) -> list[tuple[Site, SparseAutoencoder]]:
    """Resolve names to sites, check that each SAE fits its own, and sort by when they run."""
    placed: list[tuple[Site, SparseAutoencoder]] = []
    for name, given in _by_site(hooked, saes):
        site = hooked.site(name)
        for other, sae in placed:
            if other.hook_point is site.hook_point:
                raise InputError(
                    f"Two SAEs for one site: {other.name} and {name} are names of the same hook "
                    f"point ({site.canonical}). Give one SAE for each site."
                )
            if sae is given:
                raise InputError(
                    f"One SAE for two sites, {other.name} and {site.name}. Give a copy "
                    f"(copy.deepcopy) for the second."
                )
        _check_fit(hooked, site, given)
        placed.append((site, given))
    if not placed:
        raise InputError(
            "No SAEs were given. Give a mapping of site → SparseAutoencoder, such as load_saes "
            "returns, or neuron_saes(model)."
        )
    return sorted(placed, key=lambda pair: pair[0].order)


def _by_site(hooked: HookedModel, saes: SaesBySite) -> Iterator[tuple[str, Any]]:
    if not isinstance(saes, Mapping):
        raise InputError(f"saes must be a mapping of site → SparseAutoencoder; given {type(saes).__name__}.")
    for name, given in saes.items():
        if not isinstance(name, str):
            raise InputError(f"Sites are named by strings such as blocks.3.hook_mlp_out; given {name!r}.")
        if isinstance(given, SparseAutoencoder) and name not in SITE_FAMILIES and name not in SITE_KINDS:
            yield name, given
        elif name in SITE_FAMILIES or name in SITE_KINDS:
            sites = hooked.family(name)
            given = list(given) if isinstance(given, Iterable) else [given]
            if len(given) != len(sites):
                raise InputError(
                    f"{name} stands for {len(sites)} sites ({listed(sites, 3)}); given "
                    f"{len(given)} SAEs. Give one for each, or name single sites."
                )
            yield from zip(sites, given, strict=True)
        else:
            raise InputError(
                f"{name}: expected a SparseAutoencoder, given {type(given).__name__}. Sequences "
                f"are for site families: {listed([*SITE_FAMILIES, *SITE_KINDS], 12)}."
            )


def _check_fit(hooked: HookedModel, site: Site, sae: Any) -> None:
    if not isinstance(sae, SparseAutoencoder):
        raise InputError(f"{site.name}: expected a SparseAutoencoder, given {type(sae).__name__}.")
    if sae.n_inputs != site.width:
        same = sorted({s.kind for s in hooked.sites() if s.width == sae.n_inputs})
        hint = f"Sites of that width: {listed(same)}." if same else "No site has that width."
        raise InputError(
            f"{site.name} carries activations of width {site.width}; its SAE reads width "
            f"{sae.n_inputs}. {hint}"
        )
    device = next(hooked.model.parameters()).device
    if sae.bias.device != device:
        raise InputError(
            f"The model is on {device}, the SAE for {site.name} on {sae.bias.device}. Move it: "
            f"sae.to({str(device)!r})."
        )
