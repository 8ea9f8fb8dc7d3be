"""The quality of SAEs against everything computed at once in float64, with plain TransformerLens hooks."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import VOCAB
from dense_quality import compare, expected, likely_tokens, padded, rebuilt, varied_saes
from model_utils.sparse_autoencoders.test_autoencoder_transformer import assert_same, saes_for, state_of
from torch import Tensor
from transformer_lens.hook_points import HookPoint

import auto_circuit as ac
from auto_circuit.errors import InputError, SpliceError, UnknownNameError
from auto_circuit.model_utils.sparse_autoencoders import quality_sums

MLP = "blocks.1.hook_mlp_out"
RESID = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "gemma2"])
def test_every_kind_of_site_equals_everything_at_once(shared_model: Any, family: str) -> None:
    """Seven sites in one call, each alone in its runs; BOS and padding left out and left alone."""
    model = shared_model(family)
    saes = varied_saes(model)
    tokens = padded(likely_tokens(model))
    batches = [tokens[:3], tokens[3:, :7]]
    qualities = ac.sae_quality(model, saes, batches, progress=False)
    assert list(qualities) == list(saes) and len(saes) == (6 if family == "neox" else 7)
    for name, sae in saes.items():
        row = qualities[name].as_row()
        compare(row, expected(model, sae, name, batches), rel=1e-3, abs=2e-5)
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert row["rise_zero"] != row["rise_mean"] != row["rise_spliced"]
    given = [row for q in qualities.values() if (row := q.as_row())["loss_recovered_zero"] is not None]
    assert given  # the tokens are likely ones: some ablation costs more than noise


def test_a_model_without_tokenizer_counts_everything(shared_model: Any) -> None:
    model = shared_model("native_attn_only")
    model_saes = saes_for(model, ["attn.hook_z", "hook_resid_post"], [0, 2])
    tokens = torch.randint(0, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
    qualities = ac.sae_quality(model, model_saes, [tokens], progress=False)
    for name, sae in model_saes.items():
        compare(qualities[name].as_row(), expected(model, sae, name, [tokens], ()), rel=1e-3, abs=2e-5)
        assert qualities[name].n_tokens == 18


@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_models_are_summed_in_float64(shared_model: Any, sae_dtype: torch.dtype) -> None:
    model = shared_model("llama", torch.bfloat16)
    saes = {name: sae.to(sae_dtype) for name, sae in saes_for(model, ["hook_mlp_out"], [1]).items()}
    tokens = torch.randint(3, VOCAB, (40, 20), generator=torch.Generator().manual_seed(0))
    quality = ac.sae_quality(model, saes, [tokens], progress=False)[MLP]
    numbers = expected(model, saes[MLP], MLP, [tokens])
    compare(quality.as_row(), numbers, rel=1e-6, abs=1e-9)  # float32 or bfloat16 sums err by 1e-5


def test_independent_of_batches_where_the_legacy_formula_is_not(make_model: Any) -> None:
    model = make_model("llama", torch.float64)
    kinds = ("hook_mlp_out", "attn.hook_z")
    saes = {n: sae.double() for n, sae in varied_saes(model).items() if n.endswith(kinds)}
    tokens = padded(likely_tokens(model, 8))
    rows = [
        {n: q.as_row() for n, q in ac.sae_quality(model, saes, tokens.split(size), progress=False).items()}
        for size in (1, 3, 8)
    ]
    for name in saes:
        for other in rows[1:]:
            for key, value in rows[0][name].items():
                assert other[name][key] == (value if value is None else pytest.approx(value, rel=1e-5)), key
    sae = saes[MLP]
    x = model.run_with_cache(tokens, names_filter=[MLP])[1][MLP].detach()
    legacy = []
    for size in (1, 3, 8):
        shares = []
        for batch, ids in zip(x.split(size), tokens.split(size), strict=True):
            chosen = batch[ids > 2]
            unexplained = (chosen - rebuilt(sae, chosen)[1]).square().sum(-1)
            shares.append(1 - unexplained / (chosen - chosen.mean(0)).square().sum(-1))
        legacy.append(torch.cat(shares).mean().item())
    assert abs(legacy[0] - legacy[2]) > 0.05 and abs(legacy[1] - legacy[2]) > 0.01
    assert (
        abs(legacy[2] - rows[0][MLP]["explained_variance"]) > 0.01
    )  # even in one batch it is another number


def test_a_large_common_offset_costs_no_digits(make_model: Any) -> None:
    model = make_model("gpt2", torch.float64)
    saes = {MLP: ac.SparseAutoencoder(HookPoint(), 16, 24).double()}
    tokens, offset = likely_tokens(model, 6), 1e7
    saes[MLP].bias.data += offset
    x = model.run_with_cache(tokens, names_filter=[MLP])[1][MLP].detach()[tokens > 2] + offset
    with model.hooks(fwd_hooks=[(MLP, lambda x, hook: x + offset)]):
        q = ac.sae_quality(model, saes, tokens.split(2), losses=False, progress=False)[MLP]
    residual = (x - rebuilt(saes[MLP], x)[1]).square().sum().item()
    assert q.fvu == pytest.approx(residual / (x - x.mean(0)).square().sum().item(), rel=1e-6)
    naive = (x.square().sum(0) - x.sum(0).square() / len(x)).sum().item()
    assert q.fvu != pytest.approx(residual / naive, rel=0.05)
    assert q.losses is None and "loss_plain" not in q.as_row()


def test_dead_dense_and_ids_by_construction(shared_model: Any) -> None:
    model = shared_model("gpt2")
    sae = ac.SparseAutoencoder(HookPoint(), 16, 24)
    sae.latent_bias.data[[3, 7, 11]] = -1e4  # never
    sae.latent_bias.data[[2, 5]] = 1e4  # always
    sae.prune_latents(torch.tensor([15, 7, 5, 3, 2, 0]))
    tokens = likely_tokens(model)
    q = ac.sae_quality(model, {MLP: sae}, [tokens], losses=False, dense_above=0.99, progress=False)[MLP]
    assert q.latent_ids.tolist() == [15, 7, 5, 3, 2, 0]
    assert q.dead_ids.tolist() == [7, 3] and q.dead_share == pytest.approx(2 / 6)
    assert {5, 2} <= set(q.dense_ids.tolist()) <= {15, 5, 2, 0} and q.frequency[[2, 4]].tolist() == [1, 1]
    x = model.run_with_cache(tokens, names_filter=[MLP])[1][MLP][tokens > 2]
    torch.testing.assert_close(q.frequency, (sae.encode(x) > 0).double().mean(0))
    assert q.l0 == pytest.approx(q.frequency.sum().item()) and q.n_latents == 6
    edge = next(f for f in q.frequency.tolist() if 0 < f < 1)  # "above" leaves it out itself
    q = ac.sae_quality(model, {MLP: sae}, [tokens], losses=False, dense_above=edge, progress=False)[MLP]
    assert q.dense_ids.tolist() == [
        i for i, f in zip([15, 7, 5, 3, 2, 0], q.frequency, strict=True) if f > edge
    ]
    assert edge in q.frequency and q.dense_share == len(q.dense_ids) / 6


def test_neurons_are_exact(shared_model: Any) -> None:
    model = shared_model("llama")
    tokens = likely_tokens(model)
    q = ac.sae_quality(model, ac.neuron_saes(model, [1]), [tokens], progress=False)["blocks.1.mlp.hook_post"]
    assert (q.fvu, q.explained_variance, q.residual_bias, q.losses.spliced.kl) == (0, 1, None, 0)
    assert (q.l0, q.n_duplicates, q.largest_cosine) == (40, 0, 0)  # also where activations are negative
    assert q.losses.kl_recovered_zero == q.losses.kl_recovered_mean == 1
    assert q.losses.spliced.loss == q.losses.plain and q.norm_ratio == pytest.approx(1)


def test_what_is_not_defined_is_none_and_says_why(shared_model: Any) -> None:
    """Where the activation never varies its mean is the activation, and ablating it costs nothing."""
    model = shared_model("gpt2")
    sae = ac.SparseAutoencoder(HookPoint(), 16, 24)
    with model.hooks(fwd_hooks=[(MLP, lambda x, hook: torch.ones_like(x))]):
        q = ac.sae_quality(model, {MLP: sae}, likely_tokens(model).split(2), progress=False)[MLP]
    row = q.as_row()
    assert row["fvu"] is row["explained_variance"] is row["loss_recovered_mean"] is None
    assert row["kl_mean"] == pytest.approx(0, abs=1e-9) and row["kl_recovered_mean"] is None
    assert "all counted activations are equal" in q.notes[0]
    assert "mean ablation is not defined: the ablation changes the loss by" in q.notes[-1]
    json.dumps(row, allow_nan=False)
    one = ac.sae_quality(model, {MLP: sae}, [torch.tensor([[0, 5, 6]])], progress=False)[MLP]
    assert one.losses.n_predictions == 1 and one.losses.zero.rise_error is None
    assert one.losses.recovered_zero is None and "unknown" in one.notes[-1]
    better = ac.sae_quality(  # tokens that the model finds unlikely: ablation helps, nothing is recovered
        model, {MLP: sae}, [model(likely_tokens(model)).argmin(-1)], excluded=(), progress=False
    )[MLP]
    assert all(
        run.loss > better.losses.plain or recovered is None
        for run, recovered in (
            (better.losses.zero, better.losses.recovered_zero),
            (better.losses.mean, better.losses.recovered_mean),
        )
    )
    assert not math.isnan(better.losses.plain)
    with model.hooks(fwd_hooks=[(MLP, lambda x, hook: x * 0)]):
        nothing = ac.sae_quality(model, {MLP: sae}, [likely_tokens(model)], losses=False, progress=False)[MLP]
    assert (nothing.norm, nothing.norm_ratio, nothing.cosine) == (0, None, None)


def test_the_first_tokens_alone(shared_model: Any) -> None:
    """Counting stops within a row, and no more batches are asked for."""
    model, asked = shared_model("gpt2"), []
    tokens = padded(likely_tokens(model))
    saes = saes_for(model, ["hook_mlp_out"], [1])

    def batches() -> Iterator[Tensor]:
        for i in range(4):
            asked.append(i)
            yield tokens[i : i + 1]

    q = ac.sae_quality(model, saes, batches(), n_tokens=10, progress=False)[MLP]
    assert (q.n_tokens, asked) == (10, [0, 1])
    # Six tokens of the first row (BOS and two of padding left out), then four of the second.
    x = model.run_with_cache(tokens[:2], names_filter=[MLP])[1][MLP]
    counted = torch.zeros_like(tokens[:2], dtype=torch.bool)
    counted[0, 1:7], counted[1, [1, 2, 3, 5]] = True, True
    assert q.norm == pytest.approx(x[counted].norm(dim=-1).mean().item(), rel=1e-5)
    # Predictions: five of the first row, and of the second 1→2, 2→3 and 5→6, whose target need not count.
    assert q.losses.n_predictions == 5 + 3
    log_probs = model(tokens[:2]).log_softmax(-1)
    pairs = [(0, i) for i in range(1, 6)] + [(1, 1), (1, 2), (1, 5)]
    loss = -sum(log_probs[row, i, tokens[row, i + 1]].item() for row, i in pairs) / len(pairs)
    assert q.losses.plain == pytest.approx(loss, rel=1e-5)
    assert ac.sae_quality(model, saes, [tokens], n_tokens=10**6, progress=False)[MLP].n_tokens == 29


def test_what_is_excluded(shared_model: Any) -> None:
    model = shared_model("gpt2")
    tokens = likely_tokens(model)
    saes = saes_for(model, ["hook_resid_post"], [1])
    for excluded in ((), (0,), [0, int(tokens[0, 1])]):
        q = ac.sae_quality(model, saes, [tokens], excluded=excluded, progress=False)[RESID]
        numbers = expected(model, saes[RESID], RESID, [tokens], tuple(excluded))
        compare(q.as_row(), numbers, rel=1e-3, abs=2e-5)


def test_one_site_at_a_time_whatever_is_hooked_to_the_others(shared_model: Any) -> None:
    model = shared_model("gpt2")
    tokens, saes = likely_tokens(model), saes_for(model, ["hook_mlp_out"])
    alone = ac.sae_quality(model, {MLP: saes[MLP]}, [tokens], progress=False)[MLP].as_row()
    for name, sae in saes.items():
        if name != MLP:
            sae.latents.add_hook(lambda z, hook: z * 0 + 7)
            sae.edit = lambda x, out: x + 5
    assert ac.sae_quality(model, saes, [tokens], progress=False)[MLP].as_row() == alone


def test_passes_and_memory(shared_model: Any, monkeypatch: Any) -> None:
    """One pass up to the last site; with losses 1 + 3·sites whole ones. Logits go through in chunks."""
    model = shared_model("gpt2")
    tokens, saes = likely_tokens(model), saes_for(model, ["hook_mlp_out"], [0, 1])
    runs: list[str] = []
    for name, sae in saes.items():
        sae.activation.register_forward_hook(lambda *args, name=name: runs.append(name))
    hooks = [(f"blocks.{i}.hook_mlp_out", lambda x, hook, i=i: runs.append(str(i))) for i in (0, 2)]
    with model.hooks(fwd_hooks=hooks):
        first = ac.sae_quality(model, saes, tokens.split(2), losses=False, progress=False)
        assert (runs.count("0"), runs.count("2")) == (2, 0)
        runs.clear()
        whole = ac.sae_quality(model, saes, tokens.split(2), progress=False)
        assert (runs.count("0"), runs.count("2")) == (2 * (1 + 7), 2 * 7)
        assert all(runs.count(name) == 2 * (1 + 1) for name in saes)  # no SAE encodes where it is not asked
    assert first[MLP].as_row().items() <= whole[MLP].as_row().items()
    monkeypatch.setattr(quality_sums, "CHUNK", 3 * VOCAB)
    again = ac.sae_quality(model, saes, tokens.split(2), progress=False)[MLP].as_row()
    assert again == {
        k: v if v is None else pytest.approx(v, rel=1e-9) for k, v in whole[MLP].as_row().items()
    }


def test_model_and_saes_are_given_back(make_model: Any, capsys: Any) -> None:
    model = make_model("gpt2")
    saes, tokens = saes_for(model, layers=[0, 1]), likely_tokens(model)
    seen: list[Any] = []
    saes[MLP].latents.add_hook(lambda z, hook: seen.append(z.shape))
    saes[MLP].counting = False
    before, plain = state_of(model), model(tokens)
    counted = {name: sae.latent_total_act.clone() for name, sae in saes.items()}
    weights = {name: [p.clone() for p in sae.parameters()] for name, sae in saes.items()}

    def interrupted() -> Iterator[Tensor]:
        yield tokens
        raise KeyboardInterrupt

    with torch.inference_mode():
        q = ac.sae_quality(model, saes, [tokens])[MLP]
    assert "activations" in capsys.readouterr().err and seen and not q.frequency.is_inference()
    with pytest.raises(KeyboardInterrupt):
        ac.sae_quality(model, saes, interrupted(), progress=False)
    assert capsys.readouterr().err == ""
    with torch.no_grad(), pytest.raises(InputError):
        ac.sae_quality(model, saes, [tokens * 0], progress=False)
    assert_same(before, model)
    assert torch.equal(model(tokens), plain)
    for name, sae in saes.items():
        assert torch.equal(sae.latent_total_act, counted[name]) and not sae.error_nodes and sae.edit is None
        assert all(torch.equal(*pair) for pair in zip(weights[name], sae.parameters(), strict=True))
        assert len(sae.latents._forward_hooks) == (1 if name == MLP else 0) and sae.spliced_at is None
        assert sae.counting is (name != MLP)


def test_wrong_input(make_model: Any, shared_model: Any) -> None:
    model = make_model("gpt2")
    saes, tokens = saes_for(model, ["hook_mlp_out"], [1]), likely_tokens(model)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "No token counts"),
        ([tokens * 0], {}, r"excluded ids \(0, 1, 2\)"),
        (tokens, {}, r"torch.int64 \[9\].*split"),
        ([tokens.float()], {}, "torch.float32"),
        (iter([tokens.tolist()]), {}, "one of them is list"),
        ([tokens + VOCAB], {}, "from 0 to 59.*another model's tokenizer"),
        ([tokens[:, 1:2]], {}, "No prediction counts.*losses=False"),
        ([tokens], {"n_tokens": 0}, "n_tokens must be at least 1"),
        ([tokens], {"dense_above": 1.0}, "dense_above must be"),
        ([tokens], {"duplicates_above": float("nan")}, "duplicates_above must be"),
    ]
    for given, options, words in cases:
        with pytest.raises(InputError, match=words):
            ac.sae_quality(model, saes, given, progress=False, **options)
    with pytest.raises(UnknownNameError, match="blocks.1.hook_mlp_out"):
        ac.sae_quality(model, {"blocks.1.hook_mlp_ou": saes[MLP]}, [tokens], progress=False)
    with model.hooks(fwd_hooks=[(MLP, lambda x, hook: x / 0)]), pytest.raises(InputError, match=MLP):
        ac.sae_quality(model, saes, [tokens], progress=False)
    end = "blocks.2.hook_resid_post"
    with (
        model.hooks(fwd_hooks=[(end, lambda x, hook: x / 0)]),
        pytest.raises(InputError, match=f"{MLP}: logits of the spliced run"),
    ):
        ac.sae_quality(model, saes, [tokens], progress=False)
    saes[MLP].decode_weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=f"{MLP}: reconstructions of 32 of 32 tokens.*weights of the SAE"):
        ac.sae_quality(model, saes, [tokens], progress=False)
    saes[MLP].prune_latents(torch.zeros(9, 1, dtype=torch.long))
    with pytest.raises(InputError, match="latents of its own at each of 9 positions"):
        ac.sae_quality(model, saes, [tokens], progress=False)
    model.train()
    with pytest.raises(InputError, match="model.eval"):
        ac.sae_quality(model, saes_for(model, ["hook_mlp_out"], [1]), [tokens], progress=False)
    granite = shared_model("granite")
    with pytest.raises(SpliceError, match="ran 0 times"):
        ac.sae_quality(granite, saes_for(granite, ["hook_mlp_out"], [1]), [tokens], progress=False)
