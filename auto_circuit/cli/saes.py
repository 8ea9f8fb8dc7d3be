"""`auto-circuit saes eval`: how good SAEs are."""

import argparse
import json
import sys
from typing import Any

from auto_circuit.cli.arguments import add_model, add_text, load_model, positive, say, text_of


def add(verbs: Any) -> None:
    """Add the verb and its own verbs."""
    saes = verbs.add_parser("saes", help="work with SAEs: eval")
    own = saes.add_subparsers(title="verbs", metavar="VERB", required=True)
    evaluate = own.add_parser(
        "eval",
        help="measure L0, FVU, loss recovered, KL, dead, dense and near-copied latents",
        description="Measure SAEs on text or prompts, each at its own site in the plain model.",
    )
    add_model(evaluate)
    evaluate.add_argument(
        "--saes", required=True, metavar="DIR", help="folder of SAEs, at any depth; or tiny"
    )
    evaluate.add_argument("--sites", metavar="NAMES", help="only these SAEs, names separated by commas")
    add_text(evaluate)
    evaluate.add_argument(
        "--tokens", type=positive, default=4_096, metavar="N", help="tokens that count (%(default)s)"
    )
    evaluate.add_argument(
        "--batch-tokens", type=positive, default=1_024, metavar="N", help="tokens in a pass (%(default)s)"
    )
    evaluate.add_argument(
        "--no-losses",
        dest="losses",
        action="store_false",
        help="leave out what needs 1 + 3·sites more passes",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    evaluate.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> None:
    from auto_circuit.data.text import token_batches
    from auto_circuit.model_utils.sparse_autoencoders.checkpoints import load_saes
    from auto_circuit.model_utils.sparse_autoencoders.quality import sae_quality
    from auto_circuit.visualize.tables import quality_table

    model = load_model(arguments)
    saes = load_saes(
        arguments.saes,
        sites=arguments.sites.split(",") if arguments.sites else None,
        device=arguments.device,
    )
    tokens = token_batches(
        model,
        text_of(arguments, model),
        batch_tokens=arguments.batch_tokens,
        context_length=arguments.context,
    )
    qualities = sae_quality(
        model,
        saes,
        tokens,
        n_tokens=arguments.tokens,
        losses=arguments.losses,
        progress=sys.stderr.isatty(),
    )
    if arguments.json:
        rows = {site: quality.as_row() for site, quality in qualities.items()}
        say(json.dumps(rows, indent=2, allow_nan=False))
        return
    say(quality_table(qualities))
