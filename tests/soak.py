"""The long form of the tests of resuming and of hostile input, run by hand; ends with one table.

    python tests/soak.py                                         about ten minutes
    python tests/soak.py --kills 20 --prompts 500 --damaged 50   about a minute

A small run is killed with SIGKILL at random moments and resumed until it is done, then compared bit by bit
with an undisturbed one, over and over. Ctrl-C ends it with the table of what was done by then. The exit code
is 1 if anything was lost, or accepted that should have been refused.
"""

import argparse
import contextlib
import io
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.cli import as_answer, ask, ask_yes_no, number, progress_bar, whole_number
from core.errors import RunError, UsageError
from helpers.driver import QUICK, Driver, digests
from training.checkpoint import load_checkpoint
from training.run import RunFiles

NAME = "CNN_Model"
LONGEST_S = 2.5  # of computing, from a start to its kill: about as long as a run takes
WORDS = [
    "y", "n", "YES", "0.1", "1e-3", "20", "-1", "0", "nan", "inf", "1e999", "9" * 400, "0x10", "1_0", "²",
]  # fmt: skip


def main() -> int:
    """Parse the flags, do the three parts, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills in all (default: 200)")
    parser.add_argument("--prompts", type=int, default=10_000, help="fuzzed answers (default: 10,000)")
    parser.add_argument("--damaged", type=int, default=500, help="damaged checkpoints (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()
    begin, interrupted = time.monotonic(), False
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), args.seed)
        try:
            soak.run(args.prompts, args.damaged, args.kills)
        except KeyboardInterrupt:
            interrupted = True
    for loss in soak.losses:
        print(f"LOST: {loss}")
    for what, count in (soak.counts | {"lost": len(soak.losses)}).items():
        print(f"{what:<36} {count:>14,}")
    print(f"{'time':<36} {(time.monotonic() - begin) / 60:>10.1f} min")
    return 1 if soak.losses else 130 if interrupted else 0


class Soak:
    """The three parts, what they did (`counts`), and what went wrong (`losses`)."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.losses: list[str] = []

    def run(self, prompts: int, damaged: int, kills: int) -> None:
        """The three parts, one after the other."""
        for _ in progress_bar(iterable=range(prompts), desc="prompts", unit="input"):
            self.fuzz_prompt()
        driver = Driver(self.folder)
        try:
            whole = self.folder / "whole"
            code, output = driver.run([*QUICK, "--output-dir", whole], self.folder / "output")
            if code != 0:
                raise SystemExit(f"the undisturbed run failed: {output}")
            content, expected = (whole / f"{NAME}_last.pth").read_bytes(), digests(whole)
            for _ in progress_bar(iterable=range(damaged), desc="damaged files", unit="file"):
                self.load_damaged(content)
            while self.counts["kills"] < kills and self.kill_until_done(driver, kills, expected):
                pass
        finally:
            driver.close()

    def kill_until_done(self, driver: Driver, kills: int, expected: dict[str, str]) -> bool:
        """Start, kill and resume one run until it is done, and compare it; whether it could be completed."""
        output = self.folder / f"run {self.counts['runs compared']}"
        at, flags = (0, 0), QUICK
        while True:
            child = driver.start([*flags, "--output-dir", output], output / "log", ["checkpoint_each_batch"])
            again = self.counts["kills"] < kills
            code = child.kill_after(self.rng.uniform(0, LONGEST_S)) if again else child.wait(600)
            if code == 0:
                break
            before, at = at, saved(output)
            if code != -signal.SIGKILL or at < before:
                self.losses.append(
                    f"{output.name}, from {before} to {at}: exit {code}, {child.output[-500:]}"
                )
                return False
            self.counts["kills"] += 1
            flags = ["--resume"] if at != (0, 0) else QUICK
            self.counts["resumes"] += at != (0, 0)
        found = digests(output)
        if differing := [key for key, value in found.items() if value != expected[key]]:
            self.losses.append(f"{output.name} differs in {', '.join(differing)}")
        self.counts["runs compared"] += 1
        compared = [*output.glob(f"{NAME}_*.pth"), output / f"{NAME}_history.csv"]
        self.counts["bytes compared"] += sum(path.stat().st_size for path in compared)
        return True

    def load_damaged(self, content: bytes) -> None:
        """Load a damaged copy of a checkpoint: it must be refused, or come out unharmed."""
        rng, damaged = self.rng, bytearray(content)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.choice((1, 1, 1, 2, 8))):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path = self.folder / "damaged.pth"
        path.write_bytes(damaged)
        self.counts["damaged files tried"] += 1
        try:
            found = contents_of(path)
        except RunError:
            self.counts["  refused"] += 1
            return
        except Exception as error:
            self.losses.append(f"a damaged file raised {error!r}")
            return
        path.write_bytes(content)
        if found == contents_of(path):
            self.counts["  unharmed"] += 1
        else:
            self.losses.append("a damaged file was accepted")

    def fuzz_prompt(self) -> None:
        """Answer a question with noise: it must end with an allowed answer, or with UsageError."""
        text, encoding = noise(self.rng), self.rng.choice(("utf-8", "ascii"))
        question, low, high = self.rng.choice(QUESTIONS)
        stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(text), encoding=encoding)
        self.counts["fuzzed prompt inputs"] += 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answer = question()
        except UsageError:
            self.counts["  given up"] += 1
        except Exception as error:
            self.losses.append(f"a question answered with {text!r:.100} raised {error!r}")
        else:
            self.counts["  answered"] += 1
            if not low <= answer <= high:
                self.losses.append(f"a question took {text!r:.100} as {answer!r}")
        finally:
            sys.stdin = stdin


# questions of train.py, with the smallest and largest answer
QUESTIONS = (
    (lambda: ask("? ", 0.1, as_answer(number(1e-8, 100), "The rate"), shown="0.1"), 1e-8, 100),
    (lambda: ask("? ", 20, as_answer(whole_number(1, 1000), "The number"), shown="20"), 1, 1000),
    (lambda: ask_yes_no("? "), 0, 1),
)


def saved(folder: Path) -> tuple[int, int]:
    """The epoch and batch that a resumed run continues at; (0, 0) where nothing is saved, or all is lost."""
    try:
        state = RunFiles(folder, NAME).load_last()
    except RunError:
        return 0, 0
    return state["epoch"], state["batches_done"]


def contents_of(path: Path) -> str:
    """What a checkpoint holds but for its random states, to be compared."""
    state = load_checkpoint(path)
    tensors = {key: value.numpy().tobytes() for key, value in state["model"].items()}
    return repr({key: value for key, value in state.items() if key != "random"} | tensors)


def noise(rng: random.Random) -> bytes:
    """A few lines of words, of random bytes, or of control characters, with or without an end of line."""
    lines = []
    for _ in range(rng.choice((0, 1, 1, 2, 5, 150))):
        kinds = (
            rng.choice(WORDS).encode(),
            rng.randbytes(rng.choice((1, 3, 20, 300))),
            bytes(rng.randrange(32) for _ in range(rng.randrange(1, 9))),
            str(rng.uniform(-1, 1) * 10.0 ** rng.randrange(-320, 300)).encode(),
        )
        lines.append(rng.choice(kinds))
    return b"\n".join(lines) + rng.choice((b"", b"\n", b"\r\n", b"\0"))


if __name__ == "__main__":
    sys.exit(main())
