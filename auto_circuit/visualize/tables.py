"""Plain-text tables of nodes, edges, curves and the quality of SAEs."""

from collections.abc import Mapping, Sequence

from auto_circuit.graph.nodes import NodeScores
from auto_circuit.graph.prune_scores import PruneScores
from auto_circuit.metrics.faithfulness import FaithfulnessCurve
from auto_circuit.model_utils.sparse_autoencoders.quality_results import SiteQuality

#: A cell of a column of numbers in which there is none.
NO_NUMBER = "–"


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
        return cell == NO_NUMBER
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


#: Columns of `quality_table`: head, key of `SiteQuality.as_row`, format, factor.
_QUALITY: tuple[tuple[str, str, str, int], ...] = (
    ("latents", "n_latents", "d", 1),
    ("L0", "l0", ".1f", 1),
    ("FVU", "fvu", ".3f", 1),
    ("|x^|/|x|", "norm_ratio", ".3f", 1),
    ("cos", "cosine", ".3f", 1),
    ("dead %", "dead_share", ".1f", 100),
    ("dense %", "dense_share", ".1f", 100),
    ("copies", "n_duplicates", "d", 1),
    ("loss +", "rise_spliced", ".3f", 1),
    ("KL", "kl_spliced", ".3f", 1),
    ("rec. zero", "loss_recovered_zero", ".3f", 1),
    ("rec. mean", "loss_recovered_mean", ".3f", 1),
    ("KL rec. zero", "kl_recovered_zero", ".3f", 1),
    ("KL rec. mean", "kl_recovered_mean", ".3f", 1),
)


def quality_table(qualities: Mapping[str, SiteQuality]) -> str:
    """Show the quality of SAEs, a site a line; below, why a number is not given.

    Columns: latents; mean active latents of a token; fraction of variance unexplained; norm and cosine of
    reconstructions; dead, dense and near-copied latents; rise of the loss and KL in nats with the
    reconstruction in place; loss and KL recovered against zero and mean ablation.
    """
    rows = {site: quality.as_row() for site, quality in qualities.items()}
    columns = [column for column in _QUALITY if any(column[1] in row for row in rows.values())]
    cells = [
        [site, *(_number(row.get(key), form, factor) for _, key, form, factor in columns)]
        for site, row in rows.items()
    ]
    notes = [f"{site}: {note}" for site, quality in qualities.items() for note in quality.notes]
    return "\n".join([text_table(["site", *(column[0] for column in columns)], cells), *notes])


def _number(value: int | float | None, form: str, factor: int) -> str:
    return NO_NUMBER if value is None else f"{value * factor:{form}}"
