"""`auto-circuit train`: SAEs at several sites of a model, from the same forward passes."""

import argparse
import json
import sys
from typing import Any

from auto_circuit.cli.arguments import (
    add_model,
    add_text,
    load_model,
    positive,
    say,
    site_names,
    text_of,
)

#: Settings that have a flag: (flag, field of TrainingConfig, what it is).
_NUMBERS = (
    ("--tokens", "n_tokens", int, "activations of each site to train on"),
    ("--l0", "l0", float, "wanted mean number of active latents per token"),
    ("--latents", "n_latents", int, "latents of each SAE; else --expansion times the site's width"),
    ("--expansion", "expansion", int, "latents for each dimension of the activation"),
    ("--batch-size", "batch_size", int, "activations in a step"),
    ("--learning-rate", "learning_rate", float, "of Adam at its highest; else the architecture's own"),
    ("--end-to-end-share", "end_to_end_share", float, "share of the tokens for local_then_end_to_end"),
    ("--downstream", "downstream", float, "weight of the downstream reconstruction, end to end"),
    ("--tokens-per-pass", "tokens_per_pass", int, "tokens of one forward pass of the model"),
    ("--buffer", "buffer_tokens", int, "activations of each site that are mixed at a time"),
    ("--seed", "seed", int, "of initial values and of the order of the data"),
)
ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated")
LOSSES = ("local", "end_to_end", "local_then_end_to_end")
PENALTIES = ("quadratic", "tanh")


def add(verbs: Any) -> None:
    """Add the verb."""
    train = verbs.add_parser(
        "train",
        help="train SAEs at several sites from the same forward passes",
        description="Train SAEs at several sites of a model from the same forward passes. Interrupt it when "
        "you like and go on with --resume; under torchrun, processes share each batch.",
    )
    add_model(train)
    train.add_argument(
        "--sites",
        required=True,
        metavar="NAMES",
        help="sites, separated by commas: blocks.6.hook_mlp_out, or hook_mlp_out for that of every layer",
    )
    add_text(train)
    train.add_argument("--out", required=True, metavar="DIR", help="folder of the run; the SAEs end up in it")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    train.add_argument("--cache", metavar="DIR", help="record activations here first, or use those recorded")
    train.add_argument(
        "--cache-tokens",
        type=positive,
        metavar="N",
        help="activations of each site to record; more --tokens go round them several times (--tokens)",
    )
    train.add_argument(
        "--architecture", choices=ARCHITECTURES, default="batchtopk", help="of the SAEs (%(default)s)"
    )
    train.add_argument("--loss", choices=LOSSES, default="local", help="what is minimised (%(default)s)")
    train.add_argument(
        "--penalty", choices=PENALTIES, default="quadratic", help="JumpReLU's sparsity penalty (%(default)s)"
    )
    for flag, field, kind, says in _NUMBERS:
        train.add_argument(
            flag,
            dest=field,
            type=kind,
            metavar="N" if kind is int else "X",
            help=f"{says} ({_default(field)})",
        )
    train.add_argument("--json", action="store_true", help="print JSON instead of a table")
    train.set_defaults(run=_train)


def _default(field: str) -> str:
    """Return a setting's default for the help; tested against `TrainingConfig`."""
    known = {
        "n_tokens": "2000000",
        "l0": "32",
        "expansion": "8",
        "batch_size": "2048",
        "end_to_end_share": "0.1",
        "downstream": "1",
        "tokens_per_pass": "4096",
        "buffer_tokens": "65536",
        "seed": "0",
    }
    return known.get(field, "not given")


def _train(arguments: argparse.Namespace) -> None:
    from auto_circuit.model_utils.sparse_autoencoders.training.config import TrainingConfig
    from auto_circuit.model_utils.sparse_autoencoders.training.trainer import train_saes
    from auto_circuit.visualize.tables import text_table

    fields = [field for _, field, _, _ in _NUMBERS] + ["architecture", "loss", "penalty"]
    given = {field: getattr(arguments, field) for field in fields if getattr(arguments, field) is not None}
    config = TrainingConfig(context_length=arguments.context, **given)
    model = load_model(arguments)
    saes = train_saes(
        model,
        site_names(model, arguments.sites),
        text_of(arguments, model),
        config,
        out=arguments.out,
        resume=arguments.resume,
        cache=arguments.cache,
        cache_tokens=arguments.cache_tokens,
        progress=sys.stderr.isatty(),
    )
    rows = {site: _row(sae) for site, sae in saes.items()}
    if arguments.json:
        say(json.dumps({"out": arguments.out, "sites": rows}, indent=2, allow_nan=False))
        return
    cells = [
        [site, str(row["latents"]), f"{row['l0']:.1f}", f"{row['fvu']:.4f}", str(row["dead"])]
        for site, row in rows.items()
    ]
    say(text_table(["site", "latents", "L0", "FVU", "dead"], cells))
    say(f"\nOn activations of the training text. Written: {arguments.out}/ (measure: auto-circuit saes eval)")


def _row(sae: Any) -> dict[str, Any]:
    card = sae.metadata["cfg"]["metadata"]
    trained = card["auto_circuit"]
    return {
        "latents": sae.n_latents,
        "l0": card["l0"],
        "fvu": trained["fvu"],
        "dead": card["num_dead_features"],
    }
