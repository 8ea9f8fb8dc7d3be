"""`report.html`: one self-contained page with the curve and the strongest nodes or edges of a run.

No script and no request to anywhere; every text that comes from a model, a file or a user is escaped.
"""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from auto_circuit.graph.nodes import NodeScores
from auto_circuit.graph.prune_scores import PruneScores
from auto_circuit.metrics.faithfulness import FaithfulnessCurve

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } caption { text-align: left; font-weight: 600; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
svg { max-width: 100%; height: auto; } pre { overflow: auto; background: #8881; padding: 1rem; }
"""


def html_report(
    title: str,
    scores: NodeScores | PruneScores,
    curve: FaithfulnessCurve | None,
    config: Mapping[str, Any],
    *,
    n_listed: int = 50,
) -> str:
    """Return the page.

    Args:
        title: what was explained.
        scores: of every node, or of every edge.
        curve: how faithful circuits of growing size are; None while it is not measured.
        config: what was run, shown at the end.
        n_listed: how many of the strongest are listed.
    """
    signed = curve.signed if curve else False
    parts = [
        f"<h1>{escape(title)}</h1>",
        _curve(curve) if curve else "<p>Faithfulness was not measured.</p>",
        _edges(scores, n_listed, signed)
        if isinstance(scores, PruneScores)
        else _nodes(scores, n_listed, signed),
        "<h2>How it was computed</h2>",
        "<pre>" + escape("\n".join(f"{key}: {value}" for key, value in config.items())) + "</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _nodes(scores: NodeScores, n: int, signed: bool) -> str:
    nodes = scores.top(n, signed=signed)
    rows = "".join(
        f"<tr><td>{escape(node.site)}</td>"
        f"<td>{'error' if node.latent is None else f'latent {node.latent_id}'}</td>"
        f"<td>{'' if node.position is None else node.position}</td><td>{node.score:+.4f}</td></tr>"
        for node in nodes
    )
    return (
        f"<table><caption>The {len(nodes)} strongest of {len(scores):,} nodes</caption>"
        "<thead><tr><th>site</th><th>node</th><th>position</th><th>score</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _edges(scores: PruneScores, n: int, signed: bool) -> str:
    edges = scores.edges(n, signed=signed)
    rows = "".join(
        f"<tr><td>{escape(edge.source)}</td><td>{escape(edge.destination)}</td>"
        f"<td>{'' if edge.position is None else edge.position}</td><td>{edge.score or 0.0:+.4f}</td></tr>"
        for edge in edges
    )
    return (
        f"<table><caption>The {len(edges)} strongest of {len(scores):,} edges</caption>"
        "<thead><tr><th>source</th><th>destination</th><th>position</th><th>score</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _curve(curve: FaithfulnessCurve) -> str:
    """Draw faithfulness over the logarithm of size, and list the numbers."""
    rows = "".join(
        f"<tr><td>{size}</td><td>{f:.3f}</td><td>{value:.3f}</td></tr>"
        for size, f, value in zip(curve.sizes, curve.faithfulness, curve.objective, strict=True)
    )
    about = (
        f"{curve.n_prompts} prompts, ablation {curve.ablation}, "
        f"{'with' if curve.error_nodes else 'without'} error nodes; objective {curve.full:.3f} for the plain "
        f"model, {curve.empty:.3f} with all {curve.unit} ablated."
    )
    return (
        f"<p>{escape(about)}</p>{_drawing(curve)}"
        "<table><caption>Faithfulness by circuit size</caption><thead><tr>"
        f"<th>{curve.unit} kept</th><th>faithfulness</th><th>objective</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _drawing(curve: FaithfulnessCurve) -> str:
    width, height, left, bottom = 640, 300, 50, 40
    values = [f for f in curve.faithfulness if math.isfinite(f)]
    low, high = min(0.0, *values), max(1.0, *values)
    last = math.log10(max(curve.sizes[-1], 2))

    def x(size: int) -> float:
        return left + (width - left - 10) * math.log10(max(size, 1)) / last

    def y(f: float) -> float:
        return 10 + (height - bottom - 10) * (high - f) / (high - low)

    points = " ".join(
        f"{x(size):.1f},{y(f):.1f}" for size, f in zip(curve.sizes, curve.faithfulness, strict=True)
    )
    lines = "".join(
        f'<line x1="{left}" x2="{width - 10}" y1="{y(f):.1f}" y2="{y(f):.1f}" stroke="#8886"/>'
        f'<text x="{left - 6}" y="{y(f) + 4:.1f}" text-anchor="end">{f:g}</text>'
        for f in (0.0, 0.5, 1.0)
    )
    ticks = "".join(
        f'<text x="{x(10**p):.1f}" y="{height - 18}" text-anchor="middle">{10**p}</text>'
        for p in range(math.floor(last) + 1)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" font-size="12" fill="currentColor" '
        f'aria-label="Faithfulness over the number of {curve.unit} kept">{lines}{ticks}'
        f'<text x="{width / 2:.0f}" y="{height - 2}" text-anchor="middle">{curve.unit} kept</text>'
        f'<polyline points="{points}" fill="none" stroke="#2a7ae2" stroke-width="2"/></svg>'
    )
