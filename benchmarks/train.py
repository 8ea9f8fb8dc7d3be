"""Measure SAE training beside SAELens: samples a second, and what they buy (FVU at equal L0).

    make bench-peers            # once: builds the peers' environments
    make bench-train            # both parts, on the fixtures beside the repository

Each architecture is trained by one side and then by the other, in processes of their own, on the same cached
activations (SmolLM2, blocks.12.hook_mlp_out) for the same number of steps, and measured on the same held-out
ones; then eight sites at once from text. The table gives medians of steps, their ratio, what DESIGN wants it
to be, and FVU, L0 and dead latents of both. Each side takes its own defaults, learning rate included;
`--peer-rate` gives SAELens another, since its default of 3e-4 is made for longer runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parents[1] / "shared" / "fixtures"
REACH = {"topk": 2.0, "batchtopk": 2.0, "matryoshka": 2.0, "jumprelu": 1.2, "standard": 1.2, "gated": 1.2}
SITES = ",".join(f"blocks.{layer}.hook_mlp_out" for layer in range(2, 18, 2))


def run(python: Path, script: str, *arguments: str) -> dict:
    """Run one worker; return its line."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if python == Path(sys.executable):
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [str(python), str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-12:])
        sys.exit(f"{script} {arguments[0]} stopped with status {done.returncode}:\n{last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def one_site(args: argparse.Namespace) -> list[dict]:
    """Train every architecture on cached activations, on both sides."""
    train, held_out = args.activations / "train.safetensors", args.activations / "held_out.safetensors"
    rows = []
    print(f"\n576 inputs, 2,048 latents, batch 2,048, L0 32, {args.steps} steps, cached activations")
    print(f"  {'':12}{'samples/s':>22}{'':8}{'FVU':>16}{'L0':>14}{'dead':>14}")
    print(
        f"  {'':12}{'ours':>11}{'SAELens':>11}{'ratio':>8}"
        + f"{'ours':>8}{'SL':>8}"
        + f"{'ours':>7}{'SL':>7}" * 2
    )
    for architecture in args.architectures:
        common = ["cached", "--architecture", architecture, "--steps", str(args.steps)]
        common += ["--activations", str(train), "--held-out", str(held_out)]
        peer_only = ["--learning-rate", str(args.peer_rate)] if args.peer_rate else []
        ours = run(Path(sys.executable), "train_worker.py", *common)
        peer = run(args.peer_python, "sae_lens_worker.py", *common, *peer_only)
        rows.append({"ours": ours, "peer": peer})
        ratio = ours["samples_per_s"] / peer["samples_per_s"]
        verdict = "reached" if ratio >= REACH[architecture] else "MISSED"
        print(
            f"  {architecture:12}{ours['samples_per_s']:11,.0f}{peer['samples_per_s']:11,.0f}{ratio:8.2f}"
            f"{ours['fvu']:8.4f}{peer['fvu']:8.4f}{ours['l0']:7.1f}{peer['l0']:7.1f}"
            f"{ours['dead_share']:7.1%}{peer['dead_share']:7.1%}  >= {REACH[architecture]} {verdict}",
            flush=True,
        )
    return rows


def many_sites(args: argparse.Namespace) -> dict:
    """Train eight sites at once from text, on both sides."""
    command = [sys.executable, "-c", _FOLDER]
    model = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
    common = ["sites", "--model", model.stdout.strip().splitlines()[-1], "--sites", SITES]
    common += ["--text", str(args.text), "--tokens", str(args.tokens)]
    ours = run(Path(sys.executable), "train_worker.py", *common)
    peer = run(args.peer_python, "sae_lens_worker.py", *common)
    ratio = ours["samples_per_s"] / peer["samples_per_s"]
    print(
        f"\nEight sites at once from SmolLM2 text, {args.tokens:,} tokens: activations of each site a second"
    )
    verdict = "reached" if ratio >= 1.5 else "MISSED"
    speeds = f"ours {ours['samples_per_s']:,.0f}, SAELens {peer['samples_per_s']:,.0f}"
    print(f"  {speeds}: {ratio:.2f} (>= 1.5 {verdict})")
    for site, found in ours["by_site"].items():
        theirs = peer["by_site"][site]
        print(
            f"  {site:24} FVU {found['fvu']:.4f} {theirs['fvu']:.4f}  L0 {found['l0']:.1f} {theirs['l0']:.1f}"
        )
    return {"ours": ours, "peer": peer}


_FOLDER = "from auto_circuit.model_utils.model_loading import smollm2_folder; print(smollm2_folder())"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure SAE training beside SAELens.")
    default = HERE.parent / ".venv-saelens" / "bin" / "python"
    parser.add_argument("--peer-python", type=Path, default=default, help="Python of SAELens' environment")
    parser.add_argument("--activations", type=Path, default=HERE / "results" / "activations")
    parser.add_argument("--text", type=Path, default=FIXTURES / "text" / "prose.txt.gz")
    parser.add_argument("--architectures", nargs="*", choices=REACH, default=list(REACH))
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--tokens", type=int, default=200_000, help="of the eight sites; 0 leaves them out")
    parser.add_argument("--peer-rate", type=float, help="SAELens' learning rate (its default)")
    args = parser.parse_args()
    args.peer_python = args.peer_python.absolute()
    if not args.peer_python.is_file():
        sys.exit(f"There is no {args.peer_python}. Build it with: make bench-peers")
    if args.architectures and not (args.activations / "train.safetensors").is_file():
        print(f"Recording activations into {args.activations} first (some minutes).", flush=True)
        script = [sys.executable, str(HERE / "make_activations.py"), "--text", str(args.text)]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        subprocess.run([*script, "--out", str(args.activations)], check=True, env=environment)
    results = {"one_site": one_site(args), "sites": many_sites(args) if args.tokens else None}
    path = HERE / "results" / time.strftime("train-%Y%m%d-%H%M%S.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nEverything measured is in {path.relative_to(HERE.parent)}.")


if __name__ == "__main__":
    main()
