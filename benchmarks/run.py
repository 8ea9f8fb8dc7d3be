"""Measure our speed and memory against bare matrix products and against auto-circuit 1.0.1.

    make bench-peers     # once: builds the peer's environment, .venv-peers
    make bench           # .venv/bin/python benchmarks/run.py

What is timed: the forward pass of one SAE (`sae`), pruning SAEs on a dataset (`prune`), and edges: scoring
them and running a circuit (`graph`); our_worker.py and peer_worker.py say what each case is, cases.py how
times and memory are taken. Each side runs in processes of its own, ours and the peer's in turn, round after
round in one go, on the same weights and tokens; the sides' answers are compared before their times are.

Prints medians over all rounds, peak memory, ratios of medians (beside them, of the fastest calls) and what
the ratios of medians should be; writes all of it, with every single time, to `results/`. Other work on the
machine slows the two sides unequally (threads that wait for each other suffer most), so a table taken
beside it says so; `--threads 1` is steadier there. Without the peer's environment only our side runs.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent

#: A median this many times the fastest call means that something else was running.
UNSTEADY = 1.5


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians to print: `over` divided by `under`, and what it should be.

    Attributes:
        says: what the row says.
        over, under: cases, as side/case.
        at_least, at_most: the reach; None: there is none.
    """

    says: str
    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """What to run of one benchmark, and what to print.

    Attributes:
        title: what it measures.
        cases: side/case to its label, in the order of the table.
        ours, peer: timed calls of each case in one round.
        peaks: cases whose peak memory is measured.
        same: pairs of cases that must give the same answer.
        ratios: ratios of medians, and of peaks where both have one.
        rounds: rounds at most.
    """

    title: str
    cases: dict[str, str]
    ours: int
    peer: int
    peaks: tuple[str, ...]
    same: tuple[tuple[str, str], ...]
    ratios: tuple[Ratio, ...]
    rounds: int = 1_000


BENCHMARKS = {
    "sae": Benchmark(
        title="SAE forward, 32,768 latents x 768 inputs, 64 tokens, float32",
        cases={
            "ours/products": "two bare matrix products",
            "ours/encoder": "encoder product alone",
            "ours/no_error": "ours, no error nodes",
            "ours/error": "ours, error nodes",
            "ours/error_uncounted": "ours, error nodes, not counting",
            "peer/forward": "auto-circuit 1.0.1",
        },
        ours=20,
        peer=3,
        peaks=("ours/products", "ours/no_error", "ours/error", "peer/forward"),
        same=(("ours/no_error", "peer/forward"),),
        ratios=(
            Ratio("ours / two products", "ours/no_error", "ours/products", at_most=1.2),
            Ratio("ours with error nodes / encoder", "ours/error", "ours/encoder", at_most=1.2),
            Ratio("auto-circuit / ours", "peer/forward", "ours/no_error", at_least=35),
        ),
    ),
    "prune": Benchmark(
        title="Prune 6 x 2,048 latents to 256, 64 prompts x 16 tokens, width 256",
        cases={
            "ours/kl": "ours, no error nodes, KL",
            "ours/kl_error": "ours, error nodes, KL",
            "ours/no_kl": "ours, no error nodes, no KL",
            "peer/prune": "auto-circuit 1.0.1 (with KL)",
        },
        ours=7,
        peer=2,
        peaks=("ours/kl", "peer/prune"),
        same=(("ours/kl", "peer/prune"),),
        ratios=(
            Ratio("auto-circuit / ours", "peer/prune", "ours/kl", at_least=30),
            Ratio("auto-circuit / ours, error nodes", "peer/prune", "ours/kl_error"),
            Ratio("auto-circuit / ours, no KL", "peer/prune", "ours/no_kl"),
        ),
    ),
    "graph": Benchmark(
        title="Edges of 6 x 256 latents and 24 heads (52,363), 8 prompt pairs x 16 tokens, width 256",
        cases={
            "ours/passes": "plain model, 2 forwards, 1 backward",
            "ours/eap": "ours, attribution, no error nodes",
            "ours/eap_error": "ours, attribution, error nodes",
            "ours/passes_many": "plain model, its passes, 64 pairs",
            "ours/eap_many": "ours, error nodes, 64 pairs",
            "ours/circuit": "ours, a circuit of 1,000 edges",
            "ours/half": "ours, a circuit of half the edges",
            "peer/eap": "auto-circuit 1.0.1, attribution",
            "peer/circuit": "auto-circuit 1.0.1, circuit",
        },
        ours=7,
        peer=2,
        peaks=("ours/eap", "ours/circuit", "peer/eap", "peer/circuit"),
        same=(("ours/eap", "peer/eap"), ("ours/circuit", "peer/circuit")),
        ratios=(
            Ratio("auto-circuit / ours, attribution", "peer/eap", "ours/eap", at_least=50),
            Ratio("auto-circuit / ours, error nodes", "peer/eap", "ours/eap_error"),
            Ratio("ours / its passes", "ours/eap", "ours/passes", at_most=1.5),
            Ratio("ours / its passes, 64 pairs", "ours/eap_many", "ours/passes_many", at_most=1.5),
            Ratio("auto-circuit / ours, circuit", "peer/circuit", "ours/circuit", at_least=30),
            Ratio("auto-circuit / ours, half the edges", "peer/circuit", "ours/half"),
        ),
    ),
    "large": Benchmark(
        title="GPT-2 small's shape, 12 x 24,576 latents (6e7 edges), 8 x 16 tokens; under 120 s and 4 GiB",
        cases={"ours/eap": "ours, attribution, all made anew"},
        ours=1,
        peer=0,
        peaks=("ours/eap",),
        same=(),
        ratios=(),
        rounds=1,
    ),
}


@dataclass
class Measured:
    """What one case gave: seconds of every timed call, peak memory, and its answer."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    check: list[float] | None = None

    def add(self, line: dict) -> None:
        """Take in one line of a worker."""
        self.check = line["check"]
        if line["peak_bytes"] is None:
            self.seconds += line["seconds"]
        else:
            self.peak_bytes = line["peak_bytes"]


class Workers:
    """Runs the workers of both sides.

    Args:
        peer_python: the Python of the peer's environment; None: run our side only.
        threads: threads of torch on both sides; None: as many as torch takes by itself.
    """

    def __init__(self, peer_python: Path | None, threads: int | None) -> None:
        self.options = [] if threads is None else ["--threads", str(threads)]
        self.pythons = {"ours": Path(sys.executable)} | ({"peer": peer_python} if peer_python else {})
        self.scripts = {"ours": HERE / "our_worker.py", "peer": HERE / "peer_worker.py"}
        self.threads: set[int] = set()

    def run(self, side: str, name: str, repetitions: int, case: str | None = None) -> list[dict]:
        """Run one worker to its end and return its lines."""
        command = [str(self.pythons[side]), str(self.scripts[side]), name, "--repetitions", str(repetitions)]
        command += self.options
        if case is not None:
            command += ["--only", case]
        environment = dict(os.environ)
        if side == "peer":
            environment.pop("PYTHONPATH", None)  # the peer and this library have one import name
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-12:])
            sys.exit(f"The worker of {side} stopped with status {done.returncode} in {name}:\n{last}")
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
        self.threads |= {line["threads"] for line in lines}
        return lines


def measure(name: str, workers: Workers, rounds: int) -> dict[str, Measured]:
    """Run one benchmark: every round our side, then the peer's; then peak memory case by case."""
    benchmark = BENCHMARKS[name]
    repetitions = {"ours": benchmark.ours, "peer": benchmark.peer}
    measured = {case: Measured() for case in benchmark.cases if case.split("/")[0] in workers.pythons}
    for number in range(min(rounds, benchmark.rounds)):
        for side in workers.pythons:
            if repetitions[side] == 0:  # this side has no such case
                continue
            _say(f"{name}: round {number + 1} of {rounds}, {side}")
            for line in workers.run(side, name, repetitions[side]):
                measured[f"{side}/{line['case']}"].add(line)
    for case in benchmark.peaks:
        if case in measured:
            _say(f"{name}: peak memory of {case}")
            side, short = case.split("/")
            line = workers.run(side, name, 0, short)[0]
            measured[case].peak_bytes = line["peak_bytes"]
    _say("")
    return measured


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def check_same(benchmark: Benchmark, measured: dict[str, Measured]) -> None:
    """Stop unless the two sides gave the same answers."""
    for pair in benchmark.same:
        if any(case not in measured for case in pair):
            continue
        a, b = (measured[case].check or [] for case in pair)
        close = [math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-5) for x, y in zip(a, b, strict=False)]
        if not a or len(a) != len(b) or not all(close):
            sys.exit(
                f"{benchmark.title}: the sides disagree, so their times cannot be compared. "
                f"{pair[0]} gave {a}, {pair[1]} gave {b}."
            )


def ratios(benchmark: Benchmark, measured: dict[str, Measured]) -> list[dict]:
    """Return every ratio that can be taken, as rows of the results."""
    rows = []
    for ratio in benchmark.ratios:
        if ratio.over not in measured or ratio.under not in measured:
            continue
        over, under = measured[ratio.over], measured[ratio.under]
        times = median(over.seconds) / median(under.seconds)
        fastest = min(over.seconds) / min(under.seconds)
        peaks = over.peak_bytes / under.peak_bytes if over.peak_bytes and under.peak_bytes else None
        reached = (ratio.at_least is None or times >= ratio.at_least) and (
            ratio.at_most is None or times <= ratio.at_most
        )
        reach = f">= {ratio.at_least:g}" if ratio.at_least is not None else ""
        reach = f"<= {ratio.at_most:g}" if ratio.at_most is not None else reach
        rows.append(
            {
                "ratio": ratio.says,
                "times": times,
                "fastest": fastest,
                "peaks": peaks,
                "reach": reach,
                "reached": reached,
            }
        )
    return rows


def print_table(benchmark: Benchmark, measured: dict[str, Measured], rows: list[dict]) -> None:
    """Print one benchmark's table."""
    print(f"\n{benchmark.title}")
    print(f"  {'':34} {'median':>10} {'fastest':>10} {'calls':>6} {'peak memory':>12}")
    for case, label in benchmark.cases.items():
        if case in measured:
            m = measured[case]
            peak = "" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:,.0f} MiB"
            times = f"{_time(median(m.seconds)):>10} {_time(min(m.seconds)):>10} {len(m.seconds):>6}"
            print(f"  {label:34} {times} {peak:>12}")
    print(f"  {'':34} {'medians':>10} {'fastest':>10} {'memory':>10} {'reach':>7}")
    for row in rows:
        peaks = "" if row["peaks"] is None else f"{row['peaks']:.2f}"
        verdict = ("reached" if row["reached"] else "MISSED") if row["reach"] else ""
        both = f"{row['times']:>10.2f} {row['fastest']:>10.2f}"
        print(f"  {row['ratio']:34} {both} {peaks:>10} {row['reach']:>7} {verdict}")
    unsteady = [
        benchmark.cases[case] for case, m in measured.items() if median(m.seconds) > UNSTEADY * min(m.seconds)
    ]
    if unsteady:
        print(
            f"  Something else was running: medians more than {UNSTEADY} times the fastest call in "
            f"{'; '.join(unsteady)}. Repeat on an idle machine before trusting the ratios."
        )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def find_peer(given: Path) -> Path | None:
    """Return the peer's Python, or None after saying how to build its environment."""
    if given.is_file():
        # Not resolved: a virtual environment's python is a link, and where it lies says what it imports.
        return given.absolute()
    print(f"There is no peer environment at {given}, so only our side runs. Build it with: make bench-peers")
    return None


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description="Measure our speed and memory against the peer's.")
    default = HERE.parent / ".venv-peers" / "bin" / "python"
    parser.add_argument(
        "--peer-python", type=Path, default=default, help="Python of the peer's environment (.venv-peers)"
    )
    parser.add_argument("--only", choices=BENCHMARKS, help="run one benchmark; all unless given")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with both sides")
    parser.add_argument(
        "--threads", type=int, help="threads of torch on both sides; its own choice unless given"
    )
    args = parser.parse_args()
    if args.rounds < 1 or (args.threads is not None and args.threads < 1):
        parser.error(f"--rounds and --threads must be at least 1; given {args.rounds} and {args.threads}.")
    workers = Workers(find_peer(args.peer_python), args.threads)
    results = {}
    for name in [args.only] if args.only else BENCHMARKS:
        measured = measure(name, workers, args.rounds)
        check_same(BENCHMARKS[name], measured)
        rows = ratios(BENCHMARKS[name], measured)
        print_table(BENCHMARKS[name], measured, rows)
        results[name] = {"cases": {case: vars(m) for case, m in measured.items()}, "ratios": rows}
    setting = {
        "python": platform.python_version(),
        "torch": version("torch"),
        "machine": platform.machine(),
        "threads": sorted(workers.threads),
        "rounds": args.rounds,
    }
    path = HERE / "results" / time.strftime("%Y%m%d-%H%M%S.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"setting": setting, "benchmarks": results}, indent=1) + "\n")
    print(f"\nEvery time is in {path.relative_to(HERE.parent)}. Threads: {setting['threads']}.")


if __name__ == "__main__":
    main()
