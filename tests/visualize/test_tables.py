import torch
from visualize.test_report import curve, scores

from auto_circuit import SiteQuality
from auto_circuit.model_utils.sparse_autoencoders.quality_results import RunLoss, SiteLosses
from auto_circuit.visualize.tables import curve_table, node_table, quality_table


def test_tables() -> None:
    lines = node_table(scores(), 2).splitlines()
    assert lines[2].split()[-4:] == ["latent", "3", "-2.0000", "1"]
    assert lines[3].split()[-3:] == ["error", "+1.0000", "2"] and len(lines) == 4
    assert curve_table(curve()).splitlines()[2].split() == ["1", "-0.200", "0.100"]


def quality(losses: SiteLosses | None, fvu: float | None = 0.25) -> SiteQuality:
    frequency = torch.tensor([0.0, 0.05, 0.1, 0.5], dtype=torch.float64)
    return SiteQuality(
        n_tokens=20, l0=0.65, fvu=fvu, residual_bias=0.5, norm=3.0, norm_ratio=0.9, cosine=0.95,
        frequency=frequency, latent_ids=torch.tensor([9, 8, 7, 6]), dense_above=0.1, duplicates_above=0.9,
        n_duplicates=2, largest_cosine=0.99, losses=losses,
    )  # fmt: skip


def test_quality_table() -> None:
    losses = SiteLosses(19, 2.0, RunLoss(2.1, 0.01, 0.2), RunLoss(3.0, 0.1, 0.8), RunLoss(2.1, 0.1, 0.4))
    lines = quality_table({"a": quality(losses), "b": quality(losses, None)}).splitlines()
    assert lines[2].split() == (
        "a 4 0.7 0.250 0.900 0.950 25.0 25.0 2 0.100 0.200 0.900 – 0.750 0.500".split()
    ), lines
    assert lines[0].endswith("KL rec. mean") and lines[3].split()[3] == "–" and len(lines) == 7
    assert lines[0].index("FVU") + 3 == lines[2].index("0.250") + 5 == lines[3].index("–") + 1
    assert lines[4].startswith("a: Loss recovered against mean ablation is not defined: the ablation changes")
    assert lines[5].startswith("b: FVU is not defined")
    short = quality_table({"a": quality(None)}).splitlines()
    assert len(short) == 3 and short[0].split()[-2:] == ["%", "copies"]
