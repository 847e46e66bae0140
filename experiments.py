"""Run several recipes with several seeds, and write a table of what they came to.

    python experiments.py --recipes reference fast --seeds 0 1
    python experiments.py --run "plain:" --run "mixup: --mix mixup" --seeds 0 1 -- --model resnet20 --epochs 5
    python experiments.py --networks

Each run is `train.py` in a process of its own. A finished run is skipped and an unfinished one gone on with,
so the same command can be repeated until the table is whole.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from core.cli import LOG, Parser, plain_name, run_main, start_log, whole_number
from core.errors import RunError, UsageError
from core.files import atomic_write_text
from model import MODELS, build_model, count_macs, count_parameters
from training.presets import PRESETS
from training.run import RunFiles

TRAIN = Path(__file__).resolve().parent / "train.py"


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, write the table, print it."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    args, shared = parser().parse_args(argv[:split]), argv[split + 1 :]
    start_log(None)
    if args.networks:
        LOG.info(networks_table())
        return 0
    variants = dict(named_flags(text) for text in args.run)
    variants |= {name: ["--recipe", name] for name in args.recipes}
    if not variants:
        raise UsageError('nothing to run: pass --recipes NAME ..., --run "NAME: FLAGS" or --networks')
    for name, flags in variants.items():
        for seed in args.seeds:
            all_flags = [*shared, *flags, "--seed", str(seed)]  # the later of two flags counts
            run_once(run_files(args.output_dir, name, seed, all_flags), all_flags)
    table = results_table(args.output_dir, variants, args.seeds, shared)
    path = args.output_dir / "experiments.md"
    atomic_write_text(path, table)
    LOG.info(f"{table}\nTable: {path}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags; what stands after `--` goes to every run of train.py."""
    made = Parser(prog="experiments.py", description="Run recipes by seeds; flags after -- go to train.py.")
    made.add_argument(
        "--recipes", nargs="+", default=[], choices=tuple(PRESETS), help="recipes of train.py, by name"
    )
    made.add_argument(
        "--run",
        action="append",
        default=[],
        metavar='"NAME: FLAGS"',
        help="a variant of your own; repeatable",
    )
    made.add_argument(
        "--seeds", nargs="+", type=whole_number(0, 2**32 - 1), default=[0, 1], help="(default: 0 1)"
    )
    made.add_argument(
        "--output-dir",
        type=Path,
        default=Path("output/experiments"),
        metavar="DIR",
        help="folder of the runs and the table (default: output/experiments)",
    )
    made.add_argument("--networks", action="store_true", help="print every network's parameters and MACs")
    return made


def named_flags(text: str) -> tuple[str, list[str]]:
    """ "NAME: FLAGS" as the name and the list of flags.

    Raises:
        UsageError: there is no name, or it cannot begin a file's name.
    """
    name, colon, flags = text.partition(":")
    try:
        return plain_name(name.strip() if colon else ""), flags.split()
    except argparse.ArgumentTypeError:
        raise UsageError(f'--run takes "NAME: FLAGS" with a name for files, not {text!r:.60}') from None


def run_files(folder: Path, name: str, seed: int, flags: Sequence[str]) -> RunFiles:
    """The files of one run: train.py puts "synthetic" into the names of runs on that data."""
    return RunFiles(folder, f"{name}-seed{seed}" + ("_synthetic" if "synthetic" in flags else ""))


def run_once(
    files: RunFiles, flags: Sequence[str], call: Callable[[list[str]], int] = subprocess.call
) -> None:
    """Train unless the run is finished; go on with it where it was begun.

    The LR finder is left out, so that the recipes' rates are compared, unless the flags ask for it.

    Raises:
        RunError: train.py failed, or was interrupted.
    """
    if files.results.exists():
        LOG.info(f"{files.name}: finished")
        return
    if files.last.exists() or files.previous.exists():
        command = ["--resume", str(files.last)]
    else:
        command = ["--yes", "--no-lr-finder", "--output-dir", str(files.folder), "--name", files.name, *flags]
    LOG.info(f"{files.name}: train.py {' '.join(command)}")
    code = call([sys.executable, str(TRAIN), *command])
    if code:
        raise RunError(f"{files.name} ended with {code}: repeat the command to go on with what is missing")


def results_table(
    folder: Path, variants: Mapping[str, Sequence[str]], seeds: Sequence[int], shared: Sequence[str]
) -> str:
    """The Markdown table of all runs, from their histories."""
    lines = [
        f"Accuracy in percent over {len(seeds)} seed{'s' * (len(seeds) > 1)} "
        f"({', '.join(map(str, seeds))}): mean ± standard deviation. The best epoch was chosen by the "
        "figures shown, which flatters it. The difference is between last epochs, seed by seed, to the "
        "first run.",
        "",
        f"Flags of every run: `{' '.join(shared) or 'none'}`.",
        "",
        "| run | flags | epochs | last epoch | best epoch | difference |",
        "|---|---|---|---|---|---|",
    ]
    first: list[float] | None = None
    for name, flags in variants.items():
        runs = [run_files(folder, name, seed, [*shared, *flags]) for seed in seeds]
        curves = [accuracies(run.path("_history.csv")) for run in runs]
        last, best = [curve[-1] for curve in curves], [max(curve) for curve in curves]
        shown = " ".join(flags) or "none"
        cells = [name, f"`{shown}`", str(len(curves[0])), mean_and_deviation(last), mean_and_deviation(best)]
        difference = ""
        if first is not None:
            difference = mean_and_deviation([a - b for a, b in zip(last, first, strict=True)], "+")
        lines.append(f"| {' | '.join([*cells, difference])} |")
        first = first or last
    return "\n".join(lines) + "\n"


def accuracies(history: Path) -> list[float]:
    """The accuracy of each epoch, percent: the averaged weights' where there are such, held-out before test.

    Raises:
        RunError: the file is no history of train.py.
    """
    try:
        rows = list(csv.DictReader(history.open(encoding="utf-8", newline="")))
        prefixes = ("ema_val", "val", "ema_test", "test")
        column = next(f"{p}_acc_percent" for p in prefixes if f"{p}_acc_percent" in rows[0])
        return [float(row[column]) for row in rows]
    except (OSError, IndexError, StopIteration, KeyError, TypeError, ValueError):
        raise RunError(f"{history} is no history of train.py: delete the run's files and repeat") from None


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """ "71.20 ± 0.31"; one value has no deviation (of a sample: n - 1). With `sign` "+": "+1.20 ± 0.31"."""
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def networks_table() -> str:
    """Every network with its parameters and its multiply-adds for a 32x32 image, as Markdown."""
    lines = ["| network | parameters | MACs |", "|---|---:|---:|"]
    for name in MODELS:
        with torch.device("meta"):  # shapes are enough
            model = build_model(name)
        lines.append(f"| {name} | {count_parameters(model):,} | {count_macs(model):,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.py"))
