"""Pruning on a dataset against latents counted prompt by prompt."""

from typing import Any

import pytest
import torch
from conftest import make_prompts
from prune_algos.test_node_attribution import SITES, make_saes
from references import inputs_of, parts

import auto_circuit as ac
from auto_circuit.errors import InputError


def activity(
    model: Any, saes: Any, prompts: Any, include_corrupt: bool, per_position: bool
) -> dict[str, Any]:
    totals: dict[str, Any] = {}
    for batch in prompts.batches(1):
        for tokens in (batch.clean, batch.corrupt)[: 2 if include_corrupt else 1]:
            for name, x in inputs_of(model, tokens, list(saes)).items():
                z = parts(saes[name], x)[0].detach()[0]
                totals[name] = totals.get(name, 0) + (z if per_position else z.sum(0))
    return totals


@pytest.mark.parametrize("include_corrupt", [True, False])
def test_each_sae_keeps_its_own_active_latents(
    shared_model: Any, prompts: Any, include_corrupt: bool
) -> None:
    model, saes = shared_model("gpt2"), make_saes()
    for sae in saes.values():  # some latents that never fire
        sae.latent_bias.data[::5] = -100
    totals = activity(model, saes, prompts, include_corrupt, per_position=False)
    spliced = ac.sae_model(model, saes)
    before = spliced.run_with_cache(next(prompts.batches()).clean)[0]
    result = spliced.prune_latents(prompts, include_corrupt=include_corrupt, batch_size=2, progress=False)
    for name, sae in saes.items():
        active = (totals[name] > 0).nonzero().flatten().tolist()
        order = sorted(active, key=lambda i, t=totals[name]: -t[i].item())
        assert sae.latent_ids.tolist() == order and 0 < len(active) < 16
        site = result.sites[name]
        assert (site.n_before, site.n_active, site.n_kept) == (16, len(active), len(active))
        assert site.dropped_share == 0
    assert result.n_prompts == len(prompts) * (2 if include_corrupt else 1)
    assert torch.equal(spliced.run_with_cache(next(prompts.batches()).clean)[0], before)
    assert "KL(unpruned" in str(result) and SITES[0] in str(result)


@pytest.mark.parametrize("per_position", [False, True])
def test_keeping_every_active_latent_changes_nothing(shared_model: Any, per_position: bool) -> None:
    model, saes, prompts = shared_model("llama"), make_saes(), make_prompts(lengths=(6,))
    spliced = ac.sae_model(model, saes, error_nodes=False)
    batch = next(prompts.batches())
    before = spliced(batch.clean)
    result = spliced.prune_latents(prompts, per_position=per_position, progress=False)
    assert result.kl == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(spliced(batch.clean), before, rtol=1e-4, atol=1e-5)


def test_the_limit_is_each_saes_own_and_the_cost_is_measured(shared_model: Any, prompts: Any) -> None:
    model, saes = shared_model("gpt2"), make_saes()
    saes[SITES[0]].latent_bias.data[2:] = -100  # the first has two active latents: others are not cut to two
    spliced = ac.sae_model(model, saes, error_nodes=False)
    unpruned = [spliced(t).log_softmax(-1).detach() for b in prompts.batches(1) for t in (b.clean, b.corrupt)]
    result = spliced.prune_latents(prompts, 4, progress=False)
    assert [result.sites[name].n_kept for name in SITES] == [saes[name].n_latents for name in SITES]
    assert result.sites[SITES[0]].n_kept == 2 and result.sites[SITES[1]].n_kept == 4
    pruned = [spliced(t).log_softmax(-1).detach() for b in prompts.batches(1) for t in (b.clean, b.corrupt)]
    kl = torch.cat(
        [(p.exp() * (p - q)).sum(-1).flatten() for p, q in zip(unpruned, pruned, strict=True)]
    ).mean()
    assert result.kl == pytest.approx(kl.item(), rel=1e-3) and result.kl > 1e-4
    assert result.sites[SITES[1]].dropped_share > 0


def test_per_position_fills_with_inactive_latents_by_lowest_id(shared_model: Any) -> None:
    model, saes, prompts = shared_model("gpt2"), make_saes(), make_prompts(3, lengths=(6,))
    for sae in saes.values():
        sae.latent_bias.data -= 0.5
    totals = activity(model, saes, prompts, True, per_position=True)
    ac.sae_model(model, saes).prune_latents(prompts, per_position=True, progress=False)
    for name, sae in saes.items():
        active = totals[name] > 0
        assert sae.latent_ids.shape == (7, int(active.sum(-1).max())) and active.sum(-1).unique().numel() > 1
        for row, ids, total in zip(active, sae.latent_ids.tolist(), totals[name], strict=True):
            n = int(row.sum())
            assert ids[:n] == sorted(row.nonzero().flatten().tolist(), key=lambda i, t=total: -t[i].item())
            assert ids[n:] == (~row).nonzero().flatten().tolist()[: len(ids) - n]


def test_ordered_by_attribution(shared_model: Any, prompts: Any) -> None:
    model, saes = shared_model("gpt2"), make_saes()
    spliced = ac.sae_model(model, saes)
    scores = ac.node_attribution(spliced, prompts, progress=False)
    wanted = {n: s.latents.abs().argsort(descending=True)[:3].tolist() for n, s in scores.sites.items()}
    spliced.prune_latents(prompts, 3, order_by=scores, measure_kl=False, progress=False)
    assert {name: sae.latent_ids.tolist() for name, sae in saes.items()} == wanted
    with pytest.raises(InputError, match="no scores for the 3 latents"):
        spliced.prune_latents(prompts, 2, order_by=scores, progress=False)


def test_an_error_on_the_way_prunes_nothing(shared_model: Any, prompts: Any, monkeypatch: Any) -> None:
    from auto_circuit.model_utils.sparse_autoencoders import latent_pruning

    model, saes = shared_model("gpt2"), make_saes()
    monkeypatch.setattr(latent_pruning, "_kl", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ac.sae_model(model, saes).prune_latents(prompts, 2, progress=False)
    assert all(sae.n_latents == 16 and not sae.latents._forward_hooks for sae in saes.values())


def test_wrong_input(shared_model: Any, prompts: Any) -> None:
    spliced = ac.sae_model(shared_model("gpt2"), make_saes())
    with pytest.raises(InputError, match=r"these have \[6, 7\] tokens"):
        spliced.prune_latents(prompts, per_position=True, progress=False)
    with pytest.raises(InputError, match="max_latents must be at least 1"):
        spliced.prune_latents(prompts, 0, progress=False)
