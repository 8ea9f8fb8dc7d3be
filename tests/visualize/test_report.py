from html.parser import HTMLParser

import torch

from auto_circuit.graph.nodes import NodeScores, SiteScores
from auto_circuit.metrics.faithfulness import FaithfulnessCurve
from auto_circuit.visualize.report import html_report

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
