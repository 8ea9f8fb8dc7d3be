"""Plain-text tables of nodes, edges and curves."""

from collections.abc import Sequence

from auto_circuit.graph.nodes import NodeScores
from auto_circuit.graph.prune_scores import PruneScores
from auto_circuit.metrics.faithfulness import FaithfulnessCurve


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows under a head; columns of numbers to the right, the others to the left."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    numeric = [bool(rows) and all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, numeric, strict=True)
        return "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def node_table(scores: NodeScores, per_site: int = 5, *, signed: bool = False) -> str:
    """Show the best nodes of every site: published id, score, rank among all nodes."""
    rank = {int(i): place + 1 for place, i in enumerate(scores.ranking(signed=signed))}
    start, rows = 0, []
    for site, site_scores in scores.sites.items():
        alone = NodeScores({site: site_scores})
        for i in alone.ranking(signed=signed)[:per_site].tolist():
            node = alone.node(i)
            what = "error" if node.latent is None else f"latent {node.latent_id}"
            at = "" if node.position is None else f" @{node.position}"
            rows.append([site, what + at, f"{node.score:+.4f}", str(rank[start + i])])
        start += len(alone)
    return text_table(["site", "node", "score", "rank"], rows)


def edge_table(scores: PruneScores, n: int = 20, *, signed: bool = False) -> str:
    """Show the best edges: source, destination, position, score."""
    edges = scores.edges(n, signed=signed)
    at = [] if scores.layout.seq_len is None else ["position"]
    rows = [
        [e.source, e.destination, *([str(e.position)] if at else []), f"{e.score or 0.0:+.4f}"] for e in edges
    ]
    return text_table(["source", "destination", *at, "score"], rows)


def curve_table(curve: FaithfulnessCurve) -> str:
    """Show the faithfulness of each circuit size."""
    rows = [
        [str(size), f"{faithfulness:.3f}", f"{value:.3f}"]
        for size, faithfulness, value in zip(curve.sizes, curve.faithfulness, curve.objective, strict=True)
    ]
    return text_table([f"{curve.unit} kept", "faithfulness", "objective"], rows)
