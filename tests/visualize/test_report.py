from html.parser import HTMLParser

import torch

from auto_circuit.graph.nodes import NodeScores, SiteScores
from auto_circuit.metrics.faithfulness import FaithfulnessCurve
from auto_circuit.visualize.report import html_report
from auto_circuit.visualize.tables import curve_table, node_table

HOSTILE = "</pre><script>alert('x')</script>\"&\u202e"


def curve() -> FaithfulnessCurve:
    return FaithfulnessCurve([1, 5], [-0.2, 1.0], [0.1, 2.0], 2.0, 0.3, 4, "zero", True, False)


def scores() -> NodeScores:
    site = SiteScores(torch.tensor([0.5, -2.0]), torch.tensor(1.0), torch.tensor([7, 3]))
    return NodeScores({f"blocks.0.{HOSTILE}": site})


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not any(name in ("src", "href") or name.startswith("on") for name, _ in attrs)


def test_hostile_text_stays_text_and_nothing_is_fetched() -> None:
    page = html_report(HOSTILE, scores(), curve(), {"task": HOSTILE})
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.seen and "svg" in tags.seen and tags.seen.count("pre") == 1
    assert "http" not in page and "latent 3" in page and "-2.0000" in page


def test_tables() -> None:
    lines = node_table(scores(), 2).splitlines()
    assert lines[2].split()[-4:] == ["latent", "3", "-2.0000", "1"]
    assert lines[3].split()[-3:] == ["error", "+1.0000", "2"] and len(lines) == 4
    assert curve_table(curve()).splitlines()[2].split() == ["1", "-0.200", "0.100"]
