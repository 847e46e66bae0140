"""The flags of train.py: a wrong value is one line and exit code 2; any arguments at all have an end."""

import contextlib
import io
from pathlib import Path

import pytest

from core.cli import plain_name
from model import MODELS
from training.recipe import Recipe, given_flags, recipe_from
from training.settings import DEFAULT_NAME, build_parser

PARSER = build_parser()
BAD_NAMES = ["", "a/b", "../x", ".hidden", "a b", "x" * 81, "ä", "a\nb", "-x"]
FLAGS = [option for action in PARSER._actions for option in action.option_strings]


def parse(*argv: str) -> tuple[object, str, str]:
    """The namespace, or the exit code; and what went to standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = build_parser().parse_args(list(argv))
        except SystemExit as end:
            result = end.code
    return result, out.getvalue(), err.getvalue()


def test_no_flags_leave_every_question_and_default_open() -> None:
    args, out, err = parse()
    assert (out, err) == ("", "")
    assert not args.yes and args.lr_finder is None and given_flags(args) == {}
    assert plain_name(DEFAULT_NAME) == DEFAULT_NAME
    assert recipe_from(given_flags(args)) == Recipe()


def test_the_environment_gives_the_data_folder_and_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR_DATA", raising=False)
    monkeypatch.delenv("CIFAR100_URL", raising=False)
    args, _, _ = parse()
    assert (args.data_dir, args.data_url) == (Path("data"), None)
    monkeypatch.setenv("CIFAR_DATA", "/elsewhere")
    monkeypatch.setenv("CIFAR100_URL", "http://localhost/x 100%")
    args, _, _ = parse()
    assert (args.data_dir, args.data_url) == (Path("/elsewhere"), "http://localhost/x 100%")
    assert parse("--help")[0] == 0
    monkeypatch.setenv("CIFAR_DATA", "")
    assert parse()[0].data_dir == Path("data")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epochs=1.5"], "argument --epochs: takes a whole number from 1 to 100,000, not '1.5'"),
        (["--momentum=nan"], "argument --momentum: takes a number from 0 to 0.9999, not 'nan'"),
        (["--image-sizes", "24", "33"], "argument --image-sizes: takes a whole number from 16 to 32"),
        (["--sam=x"], "argument --sam: invalid choice: 'x'"),
        (["--augment=randaugment:0,9"], "argument --augment: 'randaugment:0,9' is not randaugment:N,M"),
        (["--augment=" + "x" * 1000], "argument --augment: unknown augmentation"),
        (["--epoch", "3"], "--epoch"),  # no abbreviations: a later flag would make them ambiguous
        (["--milestones"], "argument --milestones: expected at least one argument"),
        (["a\nb", "\x1b[2J", "x" * 100_000, "--\udcff"], "a?b"),
        *(([f"--name={name}"], "argument --name: takes up to 80 letters") for name in BAD_NAMES),
    ],
    ids=lambda words: repr(words[:20]) if isinstance(words, str) else "",
)
def test_wrong_usage_is_one_line(argv: list[str], words: str) -> None:
    code, out, err = parse(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("train.py: error: ") and words in err
    assert err.count("\n") == 1 and err.endswith("--help)\n") and err[:-1].isprintable() and len(err) < 500


def test_help_explains_every_flag() -> None:
    code, out, err = parse("--help")
    assert (code, err) == (0, "")
    assert all(text in out for text in (*FLAGS, *MODELS, "\nanswers to the questions:\n", "\nrun:\n"))
    assert all(action.help for action in PARSER._actions)
