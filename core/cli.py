"""The command line of every script: questions, flag types, signals, the log, errors in one line."""

import argparse
import contextlib
import functools
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from tqdm import tqdm

from core import distributed
from core.errors import RunError, UsageError, printable

T = TypeVar("T")
LOG = logging.getLogger("cifar100")
# Limits on the characters of one answer and on wrong answers: a question ends whatever is piped into it.
MAX_ANSWER = 4096
MAX_ATTEMPTS = 100
# How long ranks other than 0 wait before they print an error.
ERROR_DELAY_S = 2.0
PRECISIONS = ("fp32", "bf16", "fp16")
DATA_DIR = Path("data")  # default of --data-dir


def ask(question: str, default: T, parse: Callable[[str], T], *, shown: str) -> T:
    """Ask `question` on standard input until `parse` accepts the answer; an empty answer means `default`.

    Works at a terminal and from a pipe, where a line before the first question says how to answer, and each
    answer is echoed to keep the log readable. At the end of input the default is used, and announced as
    `shown`. A wrong answer, for which `parse` raises ValueError, is explained. Only rank 0 asks; every rank
    gets its answer.

    Raises:
        UsageError: MAX_ATTEMPTS answers were wrong.
    """
    answer = _ask_here(question, default, parse, shown) if distributed.is_main() else None
    return distributed.broadcast_object(answer)


def _ask_here(question: str, default: T, parse: Callable[[str], T], shown: str) -> T:
    if not is_interactive():
        _say_how_to_answer()
    for _ in range(MAX_ATTEMPTS):
        try:
            text = _read_line(question)
        except (AttributeError, EOFError, OSError, RuntimeError, ValueError):  # absent, closed or at its end
            print(f"\nNo answer: taking the default, {shown}.", flush=True)
            return default
        if not text:
            return default
        try:
            return parse(text)
        except ValueError as error:
            print(f"  {error}", flush=True)
    raise UsageError(f"{MAX_ATTEMPTS} wrong answers to {question.strip()!r}: pass a flag instead, or --yes")


@functools.cache
def _say_how_to_answer() -> None:
    """Where standard input is no terminal, say once what answers the questions."""
    print("No terminal: pipe the answers, one per line, or pass --yes or the flags instead.", flush=True)


def _read_line(question: str) -> str:
    """One line of standard input, stripped; from a pipe, at most MAX_ANSWER characters, which are echoed."""
    if is_interactive():
        return input(question).strip()
    print(question, end="", flush=True)
    line = sys.stdin.readline(MAX_ANSWER)
    if not line:
        raise EOFError
    print(printable(line.rstrip("\r\n"), 40), flush=True)
    return line.strip()


def ask_yes_no(question: str, default: bool = True) -> bool:
    """Ask a yes-or-no question, as `ask` does."""

    def parse(text: str) -> bool:
        if text.lower() not in ("y", "yes", "n", "no"):
            raise ValueError(f"Please answer y or n, not {printable(text, 40)!r}.")
        return text.lower() in ("y", "yes")

    return ask(question, default, parse, shown="y" if default else "n")


def shell_command(words: Sequence[str]) -> str:
    """`words` quoted as one line for a POSIX shell, or on Windows for cmd.exe."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def is_interactive() -> bool:
    """Whether standard input is a terminal."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def whole_number(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """A flag type: a whole number from `low` to `high`."""

    def whole_number(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,19}", text.strip()) or not low <= int(text) <= high:
            limit = f"from {low:,} to {high:,}" if high < 2**62 else f"of at least {low:,}"
            raise argparse.ArgumentTypeError(f"takes a whole number {limit}, not {printable(text, 40)!r}")
        return int(text)

    return whole_number


def number(low: float, high: float) -> Callable[[str], float]:
    """A flag type: a finite number from `low` to `high`."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high:
                return float(text)
        limits = f"from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"takes a number {limits}, not {printable(text, 40)!r}")

    return number


def as_answer(parse: Callable[[str], T], what: str) -> Callable[[str], T]:
    """Turn a flag type into a `parse` for `ask`: the same bounds, and errors that begin with `what`."""

    def parse_answer(text: str) -> T:
        try:
            return parse(text)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{what} {error}. Please answer again.") from None

    return parse_answer


def plain_name(text: str) -> str:
    """A flag type: a name that is safe as the beginning of file names."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}", text):
        raise argparse.ArgumentTypeError(
            f"takes up to 80 letters, digits, '.', '_' or '-', not {printable(text)!r}"
        )
    return text


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; exit code 2 as usual."""

    def error(self, message: str) -> NoReturn:
        """Print `message` on one line and exit with 2."""
        # argparse quotes some arguments as they are: line breaks, terminal codes, a megabyte
        self.exit(2, f"{self.prog}: error: {printable(message, 300)} (see {self.prog} --help)\n")


def add_data_dir(group: argparse._ActionsContainer, *, download: bool = True) -> None:
    """Add --data-dir and, for the scripts that may download the data set, --data-url."""
    if_missing = "it is downloaded there if missing" if download else "nothing is downloaded"
    text = f"folder with cifar-100-python/; {if_missing} (default: $CIFAR_DATA, else data, here or beside "
    text += "the scripts)"
    folder = Path(os.environ.get("CIFAR_DATA") or DATA_DIR)
    group.add_argument("--data-dir", type=Path, default=folder, metavar="DIR", help=text)
    if download:
        text = "try this address or local archive first (default: $CIFAR100_URL)"
        address = os.environ.get("CIFAR100_URL") or None
        group.add_argument("--data-url", default=address, metavar="URL", help=text)


def add_weights(group: argparse._ActionsContainer, folder_help: str) -> None:
    """Add --weights, --model and --output-dir, for the scripts that use a trained network."""
    text = "checkpoint of train.py (default: the best run in the output folder, else the included weights)"
    group.add_argument("--weights", type=Path, metavar="FILE", help=text)
    text = "network of --weights, for weights that another program saved (a state dict by torch.save)"
    group.add_argument("--model", metavar="NAME", help=text)
    text = f"{folder_help} (default: output)"
    group.add_argument("--output-dir", type=Path, default=Path("output"), metavar="DIR", help=text)


def add_device(group: argparse._ActionsContainer) -> None:
    """Add --device, for the scripts that compute."""
    text = "where to compute; auto: CUDA if available, else MPS, else the CPU (default: auto)"
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)


def add_processor(group: argparse._ActionsContainer) -> None:
    """Add --device and --precision, for the scripts that compute with a trained network."""
    add_device(group)
    group.add_argument("--precision", choices=PRECISIONS, help="(default: as the run was tested)")


class Interrupts:
    """SIGINT and SIGTERM, recorded so that a loop can stop between two batches.

    While `busy` is true, the first signal only sets `signal_number`; while it is false there is nothing to
    save, and the first signal raises KeyboardInterrupt. A second signal always ends the program at once.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.busy = False

    def _handle(self, number: int, frame: object) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)  # no clean-up, which could hang
        self.signal_number = number
        if not self.busy:
            raise KeyboardInterrupt
        if not distributed.is_main():
            return
        # Ctrl-C also ends the tee in `2>&1 | tee`; a broken pipe must not prevent the state from being saved
        with contextlib.suppress(OSError):
            os.write(2, b"\nInterrupted: saving after this batch (once more to quit at once).\n")

    @contextlib.contextmanager
    def caught(self) -> Iterator["Interrupts"]:
        """Handle both signals within the block, then restore the earlier handlers."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        earlier = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.signal_number or signal.SIGINT)


def run_main(main: Callable[[], int], program: str) -> int:
    """Run a script's `main` and return its exit code; a known error becomes one line on standard error."""
    # an answer, and a path that is printed, may hold what the stream's encoding cannot represent
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # absent, closed, or no text layer
            stream.reconfigure(errors=errors)
    try:
        return main()
    except (RunError, UsageError) as error:
        if not distributed.is_main():
            # rank 0 most often has the same error; torchrun then ends this process before it repeats it
            time.sleep(ERROR_DELAY_S)
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except RuntimeError as error:
        if not distributed.is_peer_failure(error):
            raise
        print(f"{program}: error: another process of this run ended; see its message", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # the reader has gone (`| head`); Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        distributed.stop()


class _TqdmHandler(logging.Handler):
    """Writes lines to standard output without breaking a progress bar on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stdout is not None:  # closed by the shell: >&-
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def start_log(path: Path | None) -> None:
    """Send LOG to standard output and, if a path is given, append it to that file, with the debug lines.

    Ranks other than 0 log errors only, and to standard output alone.

    Raises:
        RunError: the file cannot be written.
    """
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()
    LOG.setLevel(logging.DEBUG if distributed.is_main() else logging.ERROR)
    LOG.propagate = False
    LOG.addHandler(_TqdmHandler(logging.INFO))
    if path is not None and distributed.is_main():
        try:
            file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from None
        file.handleError = lambda _: None  # a full disk: the next checkpoint reports it, not each line
        LOG.addHandler(file)


def progress_bar(**options: object) -> tqdm:
    """A tqdm bar on standard error; disabled without a terminal and on ranks other than 0."""
    quiet = sys.stderr is None or not sys.stderr.isatty() or not distributed.is_main()
    return tqdm(disable=quiet, dynamic_ncols=True, leave=False, **options)
