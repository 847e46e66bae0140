"""What the scripts share at the command line: questions, flag types, the log, errors as one line."""

import argparse
import contextlib
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from core import distributed
from core.errors import RunError, UsageError, printable

T = TypeVar("T")
LOG = logging.getLogger("cifar100")
# A question ends, whatever is piped into it: so many characters are read as one answer, so many wrong
# answers are taken.
MAX_ANSWER = 4096
MAX_ATTEMPTS = 100
# How long other processes than the main one wait before they print an error.
ERROR_DELAY_S = 2.0


def ask(question: str, default: T, parse: Callable[[str], T], *, shown: str) -> T:
    """Ask `question` on standard input until `parse` takes the answer; an empty answer means `default`.

    Works for a terminal and for a pipe, where the answer is echoed so that the log reads well. The end
    of input takes the default and says so. A wrong answer (parse raises ValueError) is explained.

    Raises:
        UsageError: MAX_ATTEMPTS answers were wrong.
    """
    if not distributed.is_main():
        return distributed.broadcast_object(None)
    answer = _ask_here(question, default, parse, shown)
    return distributed.broadcast_object(answer)


def _ask_here(question: str, default: T, parse: Callable[[str], T], shown: str) -> T:
    interactive = is_interactive()
    for _ in range(MAX_ATTEMPTS):
        try:
            text = _read_line(question, interactive)
        except (EOFError, RuntimeError, OSError, ValueError):  # closed, or never there
            print(f"\nNo answer: taking the default, {shown}.", flush=True)
            return default
        if not interactive:
            print(printable(text, 40), flush=True)
        text = text.strip()
        if not text:
            return default
        try:
            return parse(text)
        except ValueError as error:
            print(f"  {error}", flush=True)
    raise UsageError(f"{MAX_ATTEMPTS} wrong answers to {question.strip()!r}: pass a flag instead, or --yes")


def _read_line(question: str, interactive: bool) -> str:
    """One line of standard input; from a pipe, of at most MAX_ANSWER characters.

    Raises:
        EOFError, RuntimeError, OSError, ValueError: there is no input, or no more of it.
    """
    _tolerate(sys.stdin, "replace")
    if interactive:
        return input(question)
    print(question, end="", flush=True)
    line = sys.stdin.readline(MAX_ANSWER) if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _tolerate(stream: object, errors: str) -> None:
    """Let bytes that are not text, or text that the stream's encoding lacks, through in another form."""
    if getattr(stream, "errors", errors) != errors and hasattr(stream, "reconfigure"):
        with contextlib.suppress(OSError, ValueError):  # closed, or read from already
            stream.reconfigure(errors=errors)


def ask_yes_no(question: str, default: bool = True) -> bool:
    """Ask a y/n question; `question` is shown as it is."""

    def parse(text: str) -> bool:
        if text.lower() in ("y", "yes"):
            return True
        if text.lower() in ("n", "no"):
            return False
        raise ValueError(f"Please answer y or n, not {printable(text, 40)!r}.")

    return ask(question, default, parse, shown="y" if default else "n")


def shell_command(words: Sequence[str]) -> str:
    """`words` as one line to paste into a shell: a POSIX one, or on Windows cmd.exe."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def is_interactive() -> bool:
    """Whether a person sits at standard input."""
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
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"takes a number from {low:g} to {high:g}, not {printable(text, 40)!r}"
            )
        return value

    return number


def as_answer(parse: Callable[[str], T], what: str) -> Callable[[str], T]:
    """A flag type as the parser of a question: the same bounds, a sentence instead of a usage error."""

    def parse_answer(text: str) -> T:
        try:
            return parse(text)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{what} {error}. Please answer again.") from None

    return parse_answer


class Interrupts:
    """SIGINT and SIGTERM as a flag that loops read between two batches.

    While `busy` is false there is nothing to save, and the first signal ends the program at once; while
    it is true the first one only sets `signal_number`, and the second one ends the program at once.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.busy = False

    def _handle(self, number: int, frame: object) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)  # asked twice: no clean-up that could hang
        self.signal_number = number
        if not self.busy:
            raise KeyboardInterrupt
        if not distributed.is_main():
            return
        # `2>&1 | tee` dies of the same Ctrl-C: a broken pipe must not keep the state from being saved
        with contextlib.suppress(OSError):
            os.write(2, b"\nInterrupted: saving after this batch (once more to quit at once).\n")

    @contextlib.contextmanager
    def caught(self) -> Iterator["Interrupts"]:
        """Handle both signals in the block; the earlier handlers come back after it."""
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
    """Run a script's `main`: known errors become one line on standard error and an exit code."""
    _tolerate(sys.stdout, "backslashreplace")  # a path may hold what standard output cannot encode
    try:
        return main()
    except (RunError, UsageError) as error:
        if not distributed.is_main():
            # most often the main process met the same error: torchrun then ends this one before it repeats it
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
        # the reader went away (`| head`); keep Python from complaining while it shuts down
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        distributed.stop()


class _TqdmHandler(logging.Handler):
    """Lines to standard output that do not tear a progress bar on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stdout is not None:  # closed by the shell: >&-
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """The log on disk; on a full disk it falls silent, and the next checkpoint says what happened."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Instead of a traceback for each line."""


def start_log(path: Path | None) -> None:
    """Send LOG to standard output and, where a path is given, to the end of that file.

    Processes other than the main one say nothing but errors.
    """
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()
    LOG.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
    LOG.propagate = False
    LOG.addHandler(_TqdmHandler())
    if path is not None and distributed.is_main():
        try:
            LOG.addHandler(_LogFile(path, encoding="utf-8", errors="backslashreplace"))
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def progress_bar(**options: object) -> tqdm:
    """A tqdm bar on standard error: none without a terminal, none on other ranks than the main one."""
    quiet = sys.stderr is None or not sys.stderr.isatty() or not distributed.is_main()
    return tqdm(disable=quiet, dynamic_ncols=True, leave=False, **options)
