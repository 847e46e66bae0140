"""The long form of the tests of resuming and of hostile input, run by hand; ends with one table.

    python tests/soak.py                                         about ten minutes
    python tests/soak.py --kills 20 --prompts 500 --damaged 50   about a minute

A small run is killed with SIGKILL at random moments and resumed until it is done, then compared bit by bit
with one that was left alone, over and over. Ctrl-C ends it with the table of what was done by then. The exit
code is 1 if anything was lost, taken wrongly or let through.
"""

import argparse
import contextlib
import io
import math
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.cli import as_answer, ask, ask_yes_no, number, whole_number
from core.errors import RunError, UsageError
from helpers.driver import QUICK, Driver, digests
from training.checkpoint import load_checkpoint
from training.run import RunFiles

NAME = "CNN_Model"
LONGEST_S = 2.5  # of computing, from a start to its kill: about as long as a run takes
WORDS = [
    "y",
    "n",
    "YES",
    "0.1",
    "1e-3",
    "20",
    "-1",
    "0",
    "nan",
    "inf",
    "1e999",
    "9" * 400,
    "0x10",
    "1_000",
    "²",
]


def main() -> int:
    """Parse the flags, do the three parts, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills in all (default: 200)")
    parser.add_argument("--prompts", type=int, default=10_000, help="fuzzed answers (default: 10,000)")
    parser.add_argument("--damaged", type=int, default=500, help="damaged checkpoints (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default: 0)")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    losses: list[str] = []
    begin, interrupted = time.monotonic(), False
    try:
        with tempfile.TemporaryDirectory() as folder:
            soak(args, Path(folder), counts, losses)
    except KeyboardInterrupt:
        interrupted = True
    for loss in losses:
        print(f"LOST: {loss}")
    counts["lost"] = len(losses)
    for what, count in counts.items():
        print(f"{what:<36} {count:>14,}")
    print(f"{'time':<36} {(time.monotonic() - begin) / 60:>10.1f} min")
    return 1 if losses else 130 if interrupted else 0


def soak(args: argparse.Namespace, folder: Path, counts: Counter[str], losses: list[str]) -> None:
    """The three parts, one after the other; what they find is in `counts` and `losses`."""
    rng = random.Random(args.seed)
    fuzz_prompts(args.prompts, rng, counts, losses)
    driver = Driver(folder)
    try:
        whole = folder / "whole"
        code, output = driver.run([*QUICK, "--output-dir", whole], folder / "output")
        if code != 0:
            raise SystemExit(f"the undisturbed run failed: {output}")
        damage_files(args.damaged, whole / f"{NAME}_last.pth", rng, counts, losses)
        kill_runs(args.kills, driver, folder, rng, counts, losses)
    finally:
        driver.close()


def kill_runs(
    kills: int,
    driver: Driver,
    folder: Path,
    rng: random.Random,
    counts: Counter[str],
    losses: list[str],
) -> None:
    """Kill and resume runs until so many kills are done and the last run is finished."""
    expected = digests(folder / "whole")
    counts.update({"kills": 0, "resumes": 0, "runs compared": 0, "bytes compared": 0})
    with tqdm(total=kills, desc="kills", unit="kill") as bar:
        while counts["kills"] < kills:
            output = folder / f"run {counts['runs compared']}"
            problem = kill_until_done(kills, driver, output, rng, counts, bar)
            if problem:
                losses.append(problem)
                return
            differing = [key for key, value in digests(output).items() if value != expected[key]]
            if differing:
                losses.append(f"{output.name} differs in {', '.join(differing)}")
            counts["runs compared"] += 1
            compared = [*output.glob(f"{NAME}_*.pth"), output / f"{NAME}_history.csv"]
            counts["bytes compared"] += sum(path.stat().st_size for path in compared)


def kill_until_done(
    kills: int,
    driver: Driver,
    output: Path,
    rng: random.Random,
    counts: Counter[str],
    bar: tqdm,
) -> str | None:
    """Start, kill and resume one run until it is done; what went wrong, or None."""
    output.mkdir()
    at = (0, 0)
    while True:
        resumes = at != (0, 0)
        flags = ["--resume", "--output-dir", output] if resumes else [*QUICK, "--output-dir", output]
        child = driver.start(flags, output / "output", ["checkpoint_each_batch"])
        counts["resumes"] += resumes
        code = child.kill_after(rng.uniform(0, LONGEST_S)) if counts["kills"] < kills else child.wait(600)
        if code == 0:
            return None
        if code != -signal.SIGKILL:
            return f"exit code {code}: {child.output[-500:]}"
        counts["kills"] += 1
        bar.update()
        before, at = at, saved(output)
        if at < before:
            return f"{output.name} fell back from epoch and batch {before} to {at}"


def saved(folder: Path) -> tuple[int, int]:
    """The epoch and batch that a resumed run goes on at; (0, 0) where nothing is saved, or all is lost."""
    try:
        state = RunFiles(folder, NAME).load_last()
    except RunError:
        return 0, 0
    return state["epoch"], state["batches_done"]


def damage_files(count: int, good: Path, rng: random.Random, counts: Counter[str], losses: list[str]) -> None:
    """Load damaged copies of a checkpoint: each must be refused, or come out unharmed."""
    content, expected = good.read_bytes(), repr_of(good)
    path = good.with_name("damaged.pth")
    counts.update({"damaged files tried": 0, "  refused": 0, "  unharmed": 0})
    for _ in tqdm(range(count), desc="damaged files", unit="file"):
        damaged = bytearray(content)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.choice((1, 1, 1, 2, 8))):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        counts["damaged files tried"] += 1
        try:
            unharmed = repr_of(path) == expected
        except RunError:
            counts["  refused"] += 1
            continue
        except Exception as error:
            losses.append(f"a damaged file raised {error!r}")
            continue
        counts["  unharmed"] += unharmed
        if not unharmed:
            losses.append("a damaged file was taken")
    path.unlink(missing_ok=True)


def repr_of(path: Path) -> str:
    """What a checkpoint holds but for its random states, to be compared."""
    state = load_checkpoint(path)
    tensors = {key: value.numpy().tobytes() for key, value in state["model"].items()}
    return repr({key: value for key, value in state.items() if key != "random"} | tensors)


def fuzz_prompts(count: int, rng: random.Random, counts: Counter[str], losses: list[str]) -> None:
    """Answer the questions with noise: each must end with an allowed answer, or with UsageError."""
    questions = {
        "rate": (lambda: ask("? ", 0.1, as_answer(number(1e-8, 100), "The rate"), shown="0.1"), 1e-8, 100),
        "epochs": (
            lambda: ask("? ", 20, as_answer(whole_number(1, 1000), "The number"), shown="20"),
            1,
            1000,
        ),
        "yes or no": (lambda: ask_yes_no("? "), 0, 1),
    }
    counts.update({"fuzzed prompt inputs": 0, "  answered": 0, "  given up": 0})
    stdin = sys.stdin
    try:
        for _ in tqdm(range(count), desc="prompts", unit="input"):
            name = rng.choice(list(questions))
            question, low, high = questions[name]
            text = noise(rng)
            sys.stdin = io.TextIOWrapper(io.BytesIO(text), encoding=rng.choice(("utf-8", "ascii")))
            counts["fuzzed prompt inputs"] += 1
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    answer = question()
            except UsageError:
                counts["  given up"] += 1
            except Exception as error:
                losses.append(f"{name} answered with {text!r:.100} raised {error!r}")
            else:
                counts["  answered"] += 1
                if not (math.isfinite(answer) and low <= answer <= high):
                    losses.append(f"{name} took {text!r:.100} for {answer!r}")
    finally:
        sys.stdin = stdin


def noise(rng: random.Random) -> bytes:
    """A few lines of words, of random bytes, or of control characters, with or without an end of line."""
    lines = []
    for _ in range(rng.choice((0, 1, 1, 2, 5, 150))):
        kind = rng.randrange(4)
        if kind == 0:
            lines.append(rng.choice(WORDS).encode())
        elif kind == 1:
            lines.append(rng.randbytes(rng.choice((1, 3, 20, 300))))
        elif kind == 2:
            lines.append(bytes(rng.randrange(32) for _ in range(rng.randrange(1, 9))))
        else:
            lines.append(str(rng.uniform(-1, 1) * 10.0 ** rng.randrange(-320, 300)).encode())
    return b"\n".join(lines) + rng.choice((b"", b"\n", b"\r\n", b"\0"))


if __name__ == "__main__":
    sys.exit(main())
