"""What several verbs share: the model, the text, numbers, and printing."""

import argparse
import sys
from typing import Any

from auto_circuit.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text) if text.strip().lstrip("+-").isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, given {text!r}")
    return number


def add_model(parser: argparse.ArgumentParser) -> None:
    """Say which model, and where it computes."""
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help="tiny, smollm2-135m, a folder, or a name on the hub (%(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="where to compute, such as cpu or cuda (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (%(default)s)")


def load_model(arguments: argparse.Namespace) -> Any:
    """Load the model that the arguments name."""
    import torch

    from auto_circuit.model_utils import model_loading

    return model_loading.load_model(
        arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype)
    )


def say(text: str) -> None:
    """Print a text."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def add_text(parser: argparse.ArgumentParser) -> None:
    """Say which text and prompts to run the model on."""
    parser.add_argument(
        "--text",
        action="append",
        metavar="PATH",
        help="a text file, a folder of them, or a dataset on the hub; give it again for more",
    )
    parser.add_argument("--task", metavar="NAME", help="also the prompts of a task, or of a JSON file")
    parser.add_argument(
        "--prompts", type=positive, default=1_000, metavar="N", help="prompt pairs of --task (%(default)s)"
    )
    parser.add_argument(
        "--task-share",
        type=float,
        default=0.2,
        metavar="X",
        help="share of the tokens that are prompts, where there is text too (%(default)s)",
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens of a text context (128, or what fits)"
    )


def text_of(arguments: argparse.Namespace, model: Any) -> Any:
    """Return what `token_source` takes, from the arguments of `add_text`."""
    from auto_circuit.data.tasks import load_prompts

    texts, share = arguments.text or [], arguments.task_share
    if arguments.task is None:
        if not texts:
            raise InputError("Give --text PATH, --task NAME, or both: there is nothing to run the model on.")
        return [(text, 1.0) for text in texts]
    prompts = load_prompts(arguments.task, model, arguments.prompts, seed=0)
    if not texts:
        return prompts
    if not 0 < share < 1:
        raise InputError(f"--task-share is a share above 0 and below 1; given {share}.")
    return [*((text, (1 - share) / len(texts)) for text in texts), (prompts, share)]


def site_names(model: Any, given: str) -> list[str]:
    """Return sites from names and families of sites separated by commas."""
    from auto_circuit.model_utils.hooked_model import SITE_FAMILIES, SITE_KINDS, hooked_model

    hooked = hooked_model(model)
    names: list[str] = []
    for name in filter(None, (part.strip() for part in given.split(","))):
        names += hooked.family(name) if name in SITE_FAMILIES or name in SITE_KINDS else [name]
    return names
