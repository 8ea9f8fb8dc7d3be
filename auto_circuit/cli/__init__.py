"""The command line: `auto-circuit VERB …`; each verb is a file, a few calls into the rooms beside this one.

Nothing heavy is imported until a verb runs, so that `--help` answers at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from auto_circuit.cli import find, hooks, saes, train
from auto_circuit.errors import AutoCircuitError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 2 wrong input, 130 interrupted."""
    arguments = parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except AutoCircuitError as error:
        sys.stderr.write(f"auto-circuit: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("auto-circuit: interrupted; what was written so far is whole.\n")
        return 130
    except BrokenPipeError:
        with suppress(BrokenPipeError):
            sys.stdout.close()
        return 0
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    whole = argparse.ArgumentParser(
        prog="auto-circuit",
        description="Circuits of sparse-autoencoder latents and errors in TransformerLens models.",
    )
    verbs = whole.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in (hooks, find, train, saes):
        verb.add(verbs)
    return whole
