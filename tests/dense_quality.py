"""The numbers of `sae_quality` from everything at once, in float64, with plain TransformerLens hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import VOCAB
from model_utils.sparse_autoencoders.test_autoencoder_transformer import saes_for
from torch import Tensor

import auto_circuit as ac
from auto_circuit.model_utils.sparse_autoencoders.input_scaling import ConstantNormScaling, LayerNormScaling
from auto_circuit.model_utils.sparse_autoencoders.latent_activations import JumpReLU, TopK


def likely_tokens(model: Any, rows: int = 4, length: int = 9, seed: int = 3) -> Tensor:
    """BOS and what the model itself finds likely next, so that ablations cost something."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (rows, 1), generator=generator)
    tokens = torch.cat([torch.zeros(rows, 1, dtype=torch.long), tokens], 1)
    with torch.no_grad():
        while tokens.shape[1] < length:
            probs = (4 * model(tokens)[:, -1].double()).softmax(-1)
            probs[:, :3] = 0
            tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)], 1)
    return tokens


def padded(tokens: Tensor) -> Tensor:
    """The last two positions of the first row replaced by the special token 1, and one in the middle by 2."""
    tokens = tokens.clone()
    tokens[0, -2:], tokens[1, 4] = 1, 2
    return tokens


def varied_saes(model: Any, layers: tuple[int, ...] = (1,)) -> dict[str, ac.SparseAutoencoder]:
    """One SAE of another kind at each site."""
    saes = saes_for(model, layers=layers)
    for i, sae in enumerate(saes.values()):
        sae.activation = [sae.activation, TopK(5), JumpReLU(0.2 * torch.rand(16))][i % 3]
        sae.scaling = [None, None, None, LayerNormScaling(1e-5), ConstantNormScaling(3.0)][i % 5]
        sae.bias.data.normal_(std=0.1)
    return saes


def rebuilt(sae: ac.SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction, written out."""
    shift, scale, divisor = torch.zeros(()), torch.ones(()), torch.ones(())
    if isinstance(sae.scaling, LayerNormScaling):
        shift, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        divisor = scale + 1e-5
    elif sae.scaling is not None:
        scale = divisor = x.norm(dim=-1, keepdim=True) / 3.0
    z = sae.activation(((x - shift) / divisor - sae.bias) @ sae.encode_weight.T + sae.latent_bias)
    return z, (z @ sae.decode_weight.T + sae.bias) * scale + shift


def rerun(model: Any, tokens: Tensor, name: str, new: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits with the activation at one site replaced, by TransformerLens' own hooks."""

    def hook(x: Tensor, hook: Any) -> Tensor:
        return new(x.reshape(*tokens.shape, -1)).reshape(x.shape)

    if not name.endswith("hook_resid_mid"):
        return model.run_with_hooks(tokens, fwd_hooks=[(name, hook)])
    block, caught = name.removesuffix(".hook_resid_mid"), {}
    # That hook point carries the MLP's branch alone: the stream is put together again at the block's end.
    fwd = [(name, hook), (f"{block}.hook_mlp_out", lambda x, hook: caught.update(mlp=x.clone()))]
    model.run_with_hooks(tokens, fwd_hooks=fwd)
    mid = model.run_with_cache(tokens, names_filter=[name])[1][name]
    post = new(mid) + caught["mlp"]
    return model.run_with_hooks(tokens, fwd_hooks=[(f"{block}.hook_resid_post", lambda x, hook: post)])


@torch.no_grad()
def expected(
    model: Any, sae: Any, name: str, batches: list[Tensor], special: tuple[int, ...] = (0, 1, 2)
) -> dict[str, float]:
    """Every number of one site from everything at once, in float64."""
    xs, outs, zs = [], [], []
    masks = [~torch.isin(tokens, torch.tensor(special)) for tokens in batches]
    for tokens, mask in zip(batches, masks, strict=True):
        x = model.run_with_cache(tokens, names_filter=[name])[1][name].reshape(*tokens.shape, -1)
        z, out = rebuilt(sae, x.to(sae.bias.dtype))
        xs, outs, zs = [*xs, x[mask].double()], [*outs, out.to(x.dtype)[mask].double()], [*zs, z[mask]]
    x, out, z = torch.cat(xs), torch.cat(outs), torch.cat(zs)
    residual, mean = x - out, x.mean(0)
    ratio = out.norm(dim=-1) / x.norm(dim=-1)
    numbers = {
        "n_tokens": len(x),
        "l0": (z != 0).sum(-1).double().mean(),
        "fvu": residual.square().sum() / (x - mean).square().sum(),
        "residual_bias": residual.mean(0).square().sum() * len(x) / residual.square().sum(),
        "norm": x.norm(dim=-1).mean(),
        "norm_ratio": ratio.mean(),
        "cosine": torch.cosine_similarity(x, out, dim=-1).mean(),
    }
    numbers["explained_variance"] = 1 - numbers["fvu"]
    news = {"spliced": lambda x: rebuilt(sae, x.to(sae.bias.dtype))[1], "zero": torch.zeros_like}
    news |= {"mean": lambda x: mean.expand_as(x)}
    losses: dict[str, list[Tensor]] = {run: [] for run in ("plain", *news)}
    kls: dict[str, list[Tensor]] = {run: [] for run in news}
    for tokens, mask in zip(batches, masks, strict=True):
        predicted = mask[:, :-1] & mask[:, 1:]
        plain = model(tokens).double().log_softmax(-1)
        logits = {run: rerun(model, tokens, name, masked(new, mask)) for run, new in news.items()}
        for run, p in {"plain": plain, **{k: v.double().log_softmax(-1) for k, v in logits.items()}}.items():
            picked = p[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
            losses[run].append(-picked[predicted])
            if run != "plain":
                kls[run].append((plain.exp() * (plain - p)).sum(-1)[mask])
    means = {run: torch.cat(values).mean() for run, values in losses.items()}
    numbers["n_predictions"] = len(torch.cat(losses["plain"]))
    for run, value in means.items():
        numbers[f"loss_{run}"] = value
    for run in news:
        rise = torch.cat(losses[run]) - torch.cat(losses["plain"])
        numbers[f"rise_{run}"], numbers[f"rise_error_{run}"] = rise.mean(), rise.std() / len(rise) ** 0.5
        numbers[f"kl_{run}"] = torch.cat(kls[run]).mean()
    for run in ("zero", "mean"):
        numbers[f"loss_recovered_{run}"] = (means[run] - means["spliced"]) / (means[run] - means["plain"])
        numbers[f"kl_recovered_{run}"] = 1 - numbers["kl_spliced"] / numbers[f"kl_{run}"]
    return {key: float(value) for key, value in numbers.items()}


def masked(new: Callable[[Tensor], Tensor], mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(mask[..., None], new(x).to(x.dtype), x)


def compare(row: dict[str, Any], numbers: dict[str, float], **tolerance: float) -> None:
    """All numbers agree; a recovered loss is given exactly where the rise stands out of its noise."""
    for key, value in numbers.items():
        if key.startswith("loss_recovered"):
            run = key.removeprefix("loss_recovered_")
            if numbers[f"rise_{run}"] <= 2 * numbers[f"rise_error_{run}"]:
                assert row[key] is None
                continue
        assert row[key] == pytest.approx(value, **tolerance), key
