"""The two kinds of error that a person sees as one line, and the exit code of each."""


class RunError(RuntimeError):
    """Something failed at run time (a download, a file, a diverged loss): one line, exit code 1."""

    exit_code = 1


class UsageError(ValueError):
    """The command, a flag or an argument is wrong: one line that says what to do, exit code 2."""

    exit_code = 2
