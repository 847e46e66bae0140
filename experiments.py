"""Run several recipes with several seeds, and write a table of their accuracies.

    python experiments.py --recipes reference fast --seeds 0 1
    python experiments.py --run "plain:" --run "mixup: --mix mixup" --seeds 0 1 -- --model resnet20 --epochs 5
    python experiments.py --networks

Each run is `train.py` in a process of its own. A finished run is skipped and an unfinished one is resumed, so
the same command can be repeated until the table is complete.

Two commands may run at once, in one folder too if their runs differ in name or seed; a run that another
process is training ends the command. Each writes the table of its own runs, the later one over the earlier:
afterwards, the command with all of them writes the whole table.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import core  # noqa: F401 (before torch: it sets up torch's threads)

# isort: split
import torch

from core.cli import LOG, Parser, plain_name, run_main, start_log, whole_number
from core.errors import RunError, UsageError, printable
from core.files import atomic_write_text, check_output
from model import MODELS, build_model, count_macs, count_parameters
from training import settings
from training.presets import PRESETS
from training.run import RunFiles

TRAIN = Path(__file__).resolve().parent / "train.py"


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, write the table, print it."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    args, shared = build_parser().parse_args(argv[:split]), argv[split + 1 :]
    start_log(None)
    if args.networks:
        LOG.info(networks_table())
        return 0
    variants = [*args.run, *((name, ["--recipe", name]) for name in args.recipes)]
    if not variants:
        raise UsageError('nothing to run: pass --recipes NAME ..., --run "NAME: FLAGS" or --networks')
    if len(dict(variants)) < len(variants):
        raise UsageError("two runs have the same name: each --run and each of --recipes needs its own")
    runs = []
    for name, flags in variants:
        for seed in args.seeds:
            all_flags = [*shared, *flags, "--seed", str(seed)]  # the later of two flags counts
            # before the first run starts, since this refuses flags that train.py does not have
            runs.append((run_files(args.output_dir, name, seed, all_flags), all_flags))
    path = args.output_dir / "experiments.md"
    RunFiles(args.output_dir, path.stem).prepare()
    check_output(path, [".md"])
    for files, flags in runs:
        run_once(files, flags)
    table = results_table(args.output_dir, dict(variants), args.seeds, shared)
    atomic_write_text(path, table)
    LOG.info(f"{table}\nTable: {path}")
    return 0


def build_parser() -> Parser:
    """The parser of experiments.py; what follows `--` goes to every run of train.py."""
    parser = Parser(prog="experiments.py", description="Run recipes by seeds; flags after -- go to train.py.")
    flag = parser.add_argument
    flag("--recipes", nargs="+", default=[], choices=tuple(PRESETS), help="presets of train.py's --recipe")
    run = {"type": named_flags, "action": "append", "default": [], "metavar": '"NAME: FLAGS"'}
    flag("--run", **run, help="a run of your own; repeatable")
    flag("--seeds", nargs="+", type=whole_number(0, 2**32 - 1), default=[0, 1], help="(default: 0 1)")
    folder_help = "folder of the runs and the table (default: output/experiments)"
    flag("--output-dir", type=Path, default=Path("output/experiments"), metavar="DIR", help=folder_help)
    flag("--networks", action="store_true", help="print every network's parameters and MACs")
    return parser


def named_flags(text: str) -> tuple[str, list[str]]:
    """A flag type: "NAME: FLAGS" as the name, which begins file names, and the list of flags."""
    name, colon, flags = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f'takes "NAME: FLAGS", not {printable(text, 60)!r}')
    return plain_name(name.strip()), flags.split()


def run_files(folder: Path, name: str, seed: int, flags: Sequence[str]) -> RunFiles:
    """The files of one run: train.py adds "synthetic" to the names of runs on that dataset."""
    synthetic = settings.build_parser().parse_args(flags).dataset == "synthetic"
    return RunFiles(folder, f"{name}-seed{seed}{'_synthetic' * synthetic}")


def run_once(files: RunFiles, flags: Sequence[str]) -> None:
    """Train unless the run is finished; resume it if it was started.

    The LR finder is skipped, so that the recipes' own rates are compared, unless the flags ask for it.

    Raises:
        RunError: train.py failed or was interrupted.
    """
    if files.results.exists():
        LOG.info(f"{files.name}: finished")
        return
    command = ["--yes", "--no-lr-finder", "--output-dir", str(files.folder), "--name", files.name, *flags]
    if files.last.exists() or files.previous.exists():
        command = ["--resume", str(files.last)]
    LOG.info(f"{files.name}: train.py {' '.join(command)}")
    code = subprocess.call([sys.executable, str(TRAIN), *command])
    if code:
        raise RunError(f"{files.name} ended with exit code {code}: repeat the command to resume it")


def results_table(
    folder: Path, variants: Mapping[str, Sequence[str]], seeds: Sequence[int], shared: Sequence[str]
) -> str:
    """The Markdown table of all runs, from their histories."""
    of = f"with seed {seeds[0]}"
    if len(seeds) > 1:
        of = f"over {len(seeds)} seeds ({', '.join(map(str, seeds))}): mean ± standard deviation"
    table = f"""\
Accuracy in percent {of}. The best epoch is chosen on the accuracy shown, so it is optimistic. \
The difference is that of the last epoch to the first run's, by seed.

Flags of every run: `{" ".join(shared) or "none"}`.

| run | flags | epochs | last epoch | best epoch | difference |
|---|---|---|---|---|---|
"""
    first: list[float] = []
    for name, flags in variants.items():
        runs = [run_files(folder, name, seed, [*shared, *flags]) for seed in seeds]
        curves = [accuracies(run.path("_history.csv")) for run in runs]
        last, best = [curve[-1] for curve in curves], [max(curve) for curve in curves]
        difference = (
            mean_and_deviation([a - b for a, b in zip(last, first, strict=True)], "+") if first else ""
        )
        cells = [name, f"`{' '.join(flags) or 'none'}`", str(len(curves[0]))]
        cells += [mean_and_deviation(last), mean_and_deviation(best), difference]
        table += f"| {' | '.join(cells)} |\n"
        first = first or last
    return table


def accuracies(history: Path) -> list[float]:
    """The accuracy of each epoch in percent: of averaged weights before raw ones, held-out before test.

    Raises:
        RunError: the file is not a history of train.py.
    """
    try:
        rows = list(csv.DictReader(history.read_text("utf-8").splitlines()))
        columns = (f"{prefix}_acc_percent" for prefix in ("ema_val", "val", "ema_test", "test"))
        column = next(name for name in columns if name in rows[0])
        return [float(row[column]) for row in rows]
    except (OSError, IndexError, StopIteration, KeyError, TypeError, ValueError):
        raise RunError(f"{history} is not a history of train.py: delete the run's files and repeat") from None


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """ "71.20 ± 0.31", by the sample deviation (n - 1); one value has none. `sign` "+" is for differences."""
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def networks_table() -> str:
    """Every network with its parameters and its multiply-adds for a 32x32 image, as Markdown."""
    with torch.device("meta"):  # shapes are enough
        models = {name: build_model(name) for name in MODELS}
    rows = [f"| {name} | {count_parameters(m):,} | {count_macs(m):,} |" for name, m in models.items()]
    return "\n".join(["| network | parameters | MACs |", "|---|---:|---:|", *rows])


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.py"))
