"""The two kinds of error that a person sees as one line, the exit code of each, and text fit for a line."""


class RunError(RuntimeError):
    """Something failed at run time (a download, a file, a diverged loss): one line, exit code 1."""

    exit_code = 1


class UsageError(ValueError):
    """The command, a flag or an argument is wrong: one line that says what to do, exit code 2."""

    exit_code = 2


def printable(text: object, length: int = 200) -> str:
    """`text` without control characters and not longer than `length`, to be shown in a message."""
    clean = "".join(c if c.isprintable() else "?" for c in str(text))
    return clean if len(clean) <= length else clean[:length] + "..."
