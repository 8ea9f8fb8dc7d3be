"""`auto-circuit hooks`: the sites of a model where an SAE can stand."""

import argparse
import json
from typing import Any

from auto_circuit.cli.arguments import add_model, load_model, say


def add(verbs: Any) -> None:
    """Add the verb."""
    hooks = verbs.add_parser("hooks", help="list the sites of a model where an SAE can stand")
    add_model(hooks)
    hooks.add_argument("--json", action="store_true", help="print JSON instead of a table")
    hooks.set_defaults(run=_hooks)


def _hooks(arguments: argparse.Namespace) -> None:
    from auto_circuit.model_utils.hooked_model import SITE_KINDS, hooked_model
    from auto_circuit.visualize.tables import text_table

    sites = hooked_model(load_model(arguments)).sites()
    if arguments.json:
        rows = [{"site": s.name, "canonical": s.canonical, "shape": ["batch", "seq", s.width]} for s in sites]
        say(json.dumps(rows, indent=2))
        return
    rows = [[s.name, f"[batch, seq, {s.width}]", s.canonical, SITE_KINDS[s.kind]] for s in sites]
    say(text_table(["site", "shape", "TransformerLens' name", "what it is"], rows))
