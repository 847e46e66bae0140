"""The two errors that are reported as one line, with their exit codes, and text that fits into a line."""


class RunError(RuntimeError):
    """Something failed at run time (a download, a file, a diverged loss): one line, exit code 1."""

    exit_code = 1


class UsageError(ValueError):
    """A command, flag or argument is wrong: one line that says what to do, exit code 2."""

    exit_code = 2


def printable(text: object, length: int = 200) -> str:
    """`text` for a message: each unprintable character as "?", cut after `length` characters."""
    clean = "".join(c if c.isprintable() else "?" for c in str(text))
    return clean if len(clean) <= length else clean[:length] + "..."
