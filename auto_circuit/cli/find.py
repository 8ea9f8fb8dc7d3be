"""`auto-circuit find`: score nodes or edges on a task, and measure how faithful the best ones are."""

import argparse
import json
import sys
from typing import Any

from auto_circuit.cli.arguments import add_model, load_model, positive, say
from auto_circuit.errors import InputError

ABLATIONS = ("resample", "zero", "mean", "mean_clean", "mean_both", "mean_batch", "mean_positions")
METHODS = ("eap", "clean-corrupt", "mask", "mask-ig", "ig-inputs", "ig-activations")
OBJECTIVE_NAMES = ("logit_diff", "answer_log_prob", "prob_diff")


def add(verbs: Any) -> None:
    """Add the verb."""
    find = verbs.add_parser(
        "find",
        help="score latents and errors, or edges, on a task, and measure how faithful the best ones are",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model(find)
    _add_what(find)
    _add_how(find)
    find.set_defaults(run=_find)


def _add_what(find: argparse.ArgumentParser) -> None:
    """Say which nodes, edges and prompts."""
    find.add_argument("--level", choices=("node", "edge"), default="node", help="score nodes, or edges")
    source = find.add_mutually_exclusive_group()
    source.add_argument(
        "--saes", metavar="DIR", help="folder of SAEs (SAELens layout), at any depth; or tiny"
    )
    source.add_argument(
        "--neurons", metavar="LAYERS", help="use MLP neurons as latents: 'all', or layers such as 6,12,18"
    )
    find.add_argument("--sites", metavar="NAMES", help="use only these SAEs, names separated by commas")
    find.add_argument(
        "--max-latents", type=positive, metavar="N", help="first prune each SAE to at most N active latents"
    )
    find.add_argument(
        "--no-error-nodes",
        dest="error_nodes",
        action="store_false",
        help="let reconstructions stand for the activations, errors dropped",
    )
    find.add_argument("--per-position", action="store_true", help="a node or edge for each token position")
    find.add_argument("--task", default="ioi", help="ioi, induction, successor, agreement, or a JSON file")
    find.add_argument("--prompts", type=positive, default=32, metavar="N", help="number of prompt pairs")
    find.add_argument("--seed", type=int, default=0, help="of the task's prompts")


def _add_how(find: argparse.ArgumentParser) -> None:
    """Say how to score, measure and show."""
    find.add_argument("--objective", choices=OBJECTIVE_NAMES, default="logit_diff", help="what to explain")
    find.add_argument("--ablation", choices=ABLATIONS, default="resample", help="what ablated ones write")
    find.add_argument("--method", choices=METHODS, default="eap", help="how to score edges")
    find.add_argument(
        "--ig-steps",
        type=positive,
        metavar="N",
        help="points of integrated gradients (nodes: none, attribution; edges: 5, for the methods with ig)",
    )
    find.add_argument(
        "--patch-type", choices=("tree", "edge"), default="tree", help="how circuits of edges are run"
    )
    find.add_argument("--signed", action="store_true", help="rank by score, not by absolute score")
    find.add_argument(
        "--top", type=positive, default=5, metavar="N", help="nodes to show for each site (edges: 4 N)"
    )
    find.add_argument(
        "--batch-size", type=positive, metavar="N", help="prompts in a pass; else 32 (edges: or what fits)"
    )
    find.add_argument("--memory-limit", type=float, metavar="GIB", help="for edges; else what is free")
    find.add_argument("--out", metavar="DIR", help="write the results folder here")
    find.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _find(arguments: argparse.Namespace) -> None:
    from auto_circuit.data.tasks import load_prompts
    from auto_circuit.metrics.faithfulness import faithfulness_curve
    from auto_circuit.metrics.objectives import OBJECTIVES
    from auto_circuit.runs import Run

    _check_find(arguments)
    asked = {key: value for key, value in vars(arguments).items() if key != "run"}
    if arguments.out:
        Run.check(arguments.out)
    model = load_model(arguments)
    spliced, left_out = _spliced(arguments, model)
    prompts = load_prompts(arguments.task, model, arguments.prompts, arguments.seed)
    run = Run(arguments.out, {**asked, "left_out": left_out}) if arguments.out else None
    progress = sys.stderr.isatty()
    pruning = None
    if arguments.max_latents is not None:
        pruning = spliced.prune_latents(
            prompts,
            arguments.max_latents,
            per_position=arguments.per_position,
            batch_size=arguments.batch_size or 32,
            progress=progress,
        )
    of_edges = arguments.level == "edge"
    scored = _graph(arguments, spliced, prompts) if of_edges else spliced
    if run:
        run.start(scored, prompts, pruning)
    options = {"ablation": arguments.ablation, "progress": progress, "batch_size": arguments.batch_size or 32}
    objective = OBJECTIVES[arguments.objective]
    scores = (_edge_scores if of_edges else _node_scores)(arguments, scored, prompts, objective, options)
    if run:
        run.scored(scores)
    if of_edges:
        options["patch_type"] = arguments.patch_type
    curve = faithfulness_curve(scored, scores, prompts, objective, signed=arguments.signed, **options)
    if run:
        run.measured(scores, curve)
    _show_found(arguments, scores, curve, pruning, left_out)
    if run and not arguments.json:
        say(f"\nWritten: {run.folder}/ (open report.html)")


def _check_find(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if arguments.level == "node":
        if arguments.saes is None and arguments.neurons is None:
            raise InputError("Nodes are latents: give --saes DIR or --neurons LAYERS (or --level edge).")
        wrong = {"--method": arguments.method != "eap", "--patch-type": arguments.patch_type != "tree"}
        wrong["--memory-limit"] = arguments.memory_limit is not None
    else:
        without = "ig" not in arguments.method
        wrong = {f"--ig-steps with --method {arguments.method}": arguments.ig_steps is not None and without}
        sourceless = arguments.saes is None and arguments.neurons is None
        wrong["--max-latents without --saes"] = sourceless and arguments.max_latents is not None
        wrong["--no-error-nodes without --saes"] = sourceless and not arguments.error_nodes
        if arguments.patch_type == "edge" and arguments.ablation != "resample":
            raise InputError("--patch-type edge goes with --ablation resample; use tree for other ablations.")
        wrong["--sites without --saes"] = arguments.saes is None and arguments.sites is not None
    for option, given in wrong.items():
        if given:
            raise InputError(f"{option} means nothing with --level {arguments.level}; leave it out.")


def _spliced(arguments: argparse.Namespace, model: Any) -> tuple[Any, list[str]]:
    """Return the model with its SAEs (or the plain one), and the SAEs that edges cannot have."""
    from auto_circuit.model_utils.hooked_model import hooked_model
    from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import sae_model

    if arguments.saes is None and arguments.neurons is None:
        return model, []
    saes = _saes(arguments, model)
    left_out: list[str] = []
    if arguments.level == "edge" and not arguments.sites:
        hooked = hooked_model(model)
        left_out = [name for name in saes if "resid" in hooked.site(name).kind]
        if len(left_out) < len(saes):
            saes = {name: sae for name, sae in saes.items() if name not in left_out}
    return sae_model(model, saes, error_nodes=arguments.error_nodes), left_out


def _graph(arguments: argparse.Namespace, model: Any, prompts: Any) -> Any:
    from auto_circuit.graph.circuit_graph import CircuitGraph

    lengths = sorted(set(prompts.lengths))
    if arguments.per_position and len(lengths) > 1:
        raise InputError(
            f"--per-position needs prompts of one length; these have {lengths} tokens. Give a JSON file of "
            f"prompts of one length, or another --prompts or --seed."
        )
    return CircuitGraph(model, per_position=lengths[0] if arguments.per_position else None)


def _edge_scores(
    arguments: argparse.Namespace, graph: Any, prompts: Any, objective: Any, options: dict[str, Any]
) -> Any:
    from auto_circuit.prune_algos.edge_attribution import edge_attribution

    return edge_attribution(
        graph,
        prompts,
        objective,
        method=arguments.method,
        steps=arguments.ig_steps or 5,
        memory_limit=arguments.memory_limit,
        **{**options, "batch_size": arguments.batch_size},
    )


def _node_scores(
    arguments: argparse.Namespace, spliced: Any, prompts: Any, objective: Any, options: dict[str, Any]
) -> Any:
    from auto_circuit.prune_algos.node_attribution import node_attribution

    positions = {"per_position": arguments.per_position, "ig_steps": arguments.ig_steps}
    return node_attribution(spliced, prompts, objective, **positions, **options)


def _show_found(
    arguments: argparse.Namespace, scores: Any, curve: Any, pruning: Any, left_out: list[str]
) -> None:
    from dataclasses import asdict

    from auto_circuit.visualize.tables import curve_table, edge_table, node_table

    of_edges = arguments.level == "edge"
    if arguments.json:
        found: dict[str, Any] = {"faithfulness_curve": asdict(curve), "left_out": left_out}
        if of_edges:
            edges = scores.edges(4 * arguments.top, signed=arguments.signed)
            found["edges"] = [{"name": edge.name, **asdict(edge)} for edge in edges]
        else:
            per_site = [scores.top(arguments.top, site=site) for site in scores.sites]
            found["nodes"] = [asdict(node) for nodes in per_site for node in nodes]
        if pruning is not None:
            found["pruning"] = asdict(pruning)
        say(json.dumps(found, indent=2, allow_nan=False))
        return
    if pruning is not None:
        say(f"{pruning}\n")
    if left_out:
        names = ", ".join(left_out)
        say(
            f"Left out: {names}, on the residual stream, which they cut; edges across them are not defined.\n"
        )
    say(
        f"{arguments.task}, {curve.n_prompts} prompts, {arguments.objective}: {curve.full:.3f} for the plain "
        f"model, {curve.empty:.3f} with all {len(scores):,} {curve.unit} ablated ({curve.ablation}).\n"
    )
    show = edge_table if of_edges else node_table
    say(show(scores, 4 * arguments.top if of_edges else arguments.top, signed=arguments.signed))
    say("\n" + curve_table(curve))


def _saes(arguments: argparse.Namespace, model: Any) -> Any:
    from auto_circuit.model_utils.sparse_autoencoders.checkpoints import load_saes
    from auto_circuit.model_utils.sparse_autoencoders.neuron_autoencoder import neuron_saes

    if arguments.neurons is None:
        sites = arguments.sites.split(",") if arguments.sites else None
        return load_saes(arguments.saes, sites=sites, device=arguments.device)
    if arguments.sites:
        raise InputError("--sites chooses among --saes; with --neurons name the layers instead.")
    if arguments.neurons == "all":
        return neuron_saes(model)
    try:
        layers = [int(layer) for layer in arguments.neurons.split(",")]
    except ValueError as error:
        raise InputError(
            f"--neurons takes 'all' or layers separated by commas, such as 6,12,18; given "
            f"{arguments.neurons!r}."
        ) from error
    return neuron_saes(model, layers)
