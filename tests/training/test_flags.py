"""The flags of train.py: every wrong value is one line and exit code 2; any arguments at all have an end."""

import contextlib
import dataclasses
import io
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.errors import UsageError
from model import MODELS
from training.flags import (
    DEFAULT_NAME,
    RECIPE_FIELDS,
    build_parser,
    check_resume_flags,
    plain_name,
    recipe_from,
)
from training.recipe import Recipe

PARSER = build_parser()
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
    assert not args.yes and args.lr_finder is None and args.lr is None and args.epochs is None
    assert all(getattr(args, name, None) is None for name in RECIPE_FIELDS)
    assert recipe_from(args, "fp32") == Recipe()


def test_the_parser_is_built_the_same_in_any_environment(monkeypatch: pytest.MonkeyPatch) -> None:
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


BEYOND = [
    *("--warmup-epochs=2", "--label-smoothing=0.1", "--no-decay-bn", "--clip-norm=1", "--accumulate=2"),
    *("--image-sizes", "24", "32", "--mix=both", "--mix-probability=0.5", "--mixup-alpha=0.3"),
    *("--cutmix-alpha=0.5", "--ema-decay=0.9", "--sam=asam", "--sam-rho=0.5", "--teacher=t.pth"),
    *("--distill-alpha=0.5", "--distill-temperature=2", "--zero-init-residual", "--drop-path=0.1"),
    *("--dropout=0.3", "--scheduler=cosine", "--model=wrn_16_4"),
]
BEYOND_FIELDS = {part[2:].split("=")[0].replace("-", "_") for part in BEYOND if part[:2] == "--"}
BEYOND_FIELDS = BEYOND_FIELDS - {"no_decay_bn", "scheduler", "model"} | {"decay_bn"}


def test_each_recipe_flag_reaches_the_recipe() -> None:
    given_flags = {
        "model": ("resnet20",),
        "dataset": ("synthetic",),
        "limit_train": ("1000",),
        "limit_test": ("100",),
        "val_split": ("50",),
        "epochs": ("9",),
        "batch_size": ("64",),
        "test_batch_size": ("32",),
        "lr": ("0.05",),
        "momentum": ("0.8",),
        "weight_decay": ("0.001",),
        "scheduler": ("multistep",),
        "milestones": ("2", "5"),
        "gamma": ("0.3",),
        "seed": ("7",),
        "target_accuracy": ("50.0",),
    }
    argv = [part for name, text in given_flags.items() for part in (f"--{name.replace('_', '-')}", *text)]
    recipe = recipe_from(parse(*argv)[0], "bf16")
    for name, text in given_flags.items():
        value = getattr(recipe, name)
        shown = tuple(map(str, value)) if isinstance(value, tuple) else (str(value),)
        assert shown == text, name
    assert recipe.precision == "bf16"
    assert recipe_from(parse("--scheduler", "onecycle", "--max-lr", "0.4")[0], "fp32").max_lr == 0.4
    others = recipe_from(parse(*BEYOND)[0], "fp32")
    assert all(getattr(others, name) != getattr(Recipe(), name) for name in BEYOND_FIELDS)
    assert (others.image_sizes, others.decay_bn, others.zero_init_residual) == ((24, 32), False, True)
    untried = set(RECIPE_FIELDS) - set(given_flags) - {"precision", "max_lr", "augment", "swa_start"}
    untried -= BEYOND_FIELDS
    assert untried == set()


def test_an_augmentation_takes_its_numbers_with_it() -> None:
    assert recipe_from(parse("--augment", "randaugment:1,9")[0], "fp32").augment == "randaugment:1,9"


def test_every_recipe_field_has_its_flag() -> None:
    assert {f"--{name.replace('_', '-')}" for name in RECIPE_FIELDS} <= set(FLAGS)


WRONG = [
    ("--epochs", ["0", "-1", "1.5", "nan", "", "x", "100001", "9" * 100]),
    ("--lr", ["0", "-0.1", "nan", "inf", "", "x", "101", "1e-9"]),
    ("--max-lr", ["0", "nan", "101"]),
    ("--batch-size", ["0", "-5", "x", "1e3"]),
    ("--test-batch-size", ["0", "-5"]),
    ("--momentum", ["1", "-0.1", "nan"]),
    ("--weight-decay", ["-1", "2", "nan"]),
    ("--gamma", ["0", "1.1", "nan"]),
    ("--milestones", ["0", "-3", "x", "1.5"]),
    ("--seed", ["-1", "4294967296", "x"]),
    ("--workers", ["-1", "257", "many"]),
    ("--target-accuracy", ["-1", "101", "nan"]),
    ("--limit-train", ["0", "-1"]),
    ("--limit-test", ["0", "-1"]),
    ("--val-split", ["-1", "x"]),
    ("--checkpoint-every", ["0", "-1", "nan", "inf"]),
    ("--model", ["resnet57", "", "ResNet56"]),
    ("--dataset", ["cifar10", ""]),
    ("--scheduler", ["exponential"]),
    ("--augment", ["", "randaugment:", "randaugment:2", "randaugment:0,9", "standard:1,2", "x" * 1000]),
    ("--warmup-epochs", ["-1", "x"]),
    ("--label-smoothing", ["-0.1", "1", "nan"]),
    ("--clip-norm", ["-1", "inf", "nan"]),
    ("--accumulate", ["0", "1.5"]),
    ("--image-sizes", ["15", "33", "x"]),
    ("--mix", ["cut", ""]),
    ("--mix-probability", ["1.1", "nan"]),
    ("--ema-decay", ["1", "-0.1", "nan"]),
    ("--swa-start", ["0", "-1"]),
    ("--sam", ["x"]),
    ("--sam-rho", ["0", "nan"]),
    ("--distill-temperature", ["0", "nan"]),
    ("--drop-path", ["1", "nan"]),
    ("--device", ["gpu", "cuda:9"]),
    ("--precision", ["fp16"]),
    ("--name", ["", "a/b", "../x", ".hidden", "a b", "x" * 81, "ä", "a\nb", "-x"]),
]


@pytest.mark.parametrize(
    ("flag", "value"),
    [(flag, value) for flag, values in WRONG for value in values],
    ids=lambda text: repr(text[:20]),
)
def test_a_wrong_value_is_one_line_that_names_its_flag(flag: str, value: str) -> None:
    code, out, err = parse(f"{flag}={value}")
    assert (code, out) == (2, "")
    assert err.startswith("train.py: error: ") and err.count("\n") == 1 and err.endswith("--help)\n")
    assert flag in err and len(err) < 500


@pytest.mark.parametrize(
    "argv",
    [
        ["--unknown"],
        ["--epoch", "3"],  # no abbreviations: a later flag would make them ambiguous
        ["stray"],
        ["--epochs"],
        ["--milestones"],
        ["--yes=1"],
        ["a\nb", "\x1b[2J", "x" * 100_000],
        ["--no-lr-finder=x"],
        ["--\udcff"],
    ],
)
def test_wrong_usage_is_one_line(argv: list[str]) -> None:
    code, out, err = parse(*argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err[:-1].isprintable() and len(err) < 500


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--milestones", "9", "5"], ["--milestones", "9 5"]),
        (["--epochs", "5", "--milestones", "5"], ["--milestones", "epochs - 1"]),
        (["--max-lr", "1"], ["--max-lr", "onecycle"]),
        (["--scheduler", "onecycle", "--milestones", "5"], ["--milestones", "multistep"]),
        (["--batch-size", "50001"], ["--batch-size", "50,000"]),
        (["--limit-train", "100"], ["--batch-size", "100 images"]),
        (["--limit-train", "50001"], ["--limit-train", "50,000"]),
        (["--val-split", "50000"], ["--val-split", "49,999"]),
        (["--test-batch-size", "10001"], ["--test-batch-size", "10,000"]),
    ],
)
def test_values_that_contradict_each_other_are_refused(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_from(parse(*argv)[0], "fp32")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_help_explains_every_flag_in_groups() -> None:
    code, out, err = parse("--help")
    assert (code, err) == (0, "")
    assert all(flag in out for flag in FLAGS)
    assert all(name in out for name in MODELS)
    assert all(action.help for action in PARSER._actions)
    for group in ("answers to the questions:", "data:", "recipe:", "run:"):
        assert f"\n{group}\n" in out


def test_names_are_safe_beginnings_of_file_names() -> None:
    for name in (DEFAULT_NAME, "run-2", "a.b_c", "7"):
        assert plain_name(name) == name


# ---- resumed runs ----


def test_a_resumed_recipe_may_be_repeated_but_not_changed() -> None:
    stored = Recipe(epochs=9, lr=0.05, milestones=(3, 7), precision="bf16")
    for argv in (
        [],
        ["--yes", "--workers", "2"],
        ["--epochs", "9", "--lr", "5e-2", "--milestones", "3", "7"],
        ["--precision", "auto"],
        ["--precision", "bf16"],
        ["--precision", "fp32"],  # the run goes on on another processor
    ):
        check_resume_flags(parse(*argv)[0], stored)
    for argv, words in (
        (["--epochs", "10"], ["--epochs 10", "9"]),
        (["--lr", "0.1"], ["--lr 0.1", "0.05"]),
        (["--milestones", "3"], ["--milestones 3", "3 7"]),
        (["--batch-size", "64"], ["--batch-size 64", "128"]),
        (["--val-split", "0", "--limit-train", "500"], ["--limit-train 500"]),
        (["--dataset", "synthetic"], ["--dataset synthetic", "cifar100"]),
    ):
        with pytest.raises(UsageError) as caught:
            check_resume_flags(parse(*argv)[0], stored)
        assert all(word in str(caught.value) for word in words), caught.value


def test_milestones_given_as_the_default_ones_are_no_contradiction() -> None:
    args = parse("--milestones", "8", "14", "17")[0]
    check_resume_flags(args, Recipe(epochs=20))
    with pytest.raises(UsageError, match="--milestones 8 14 17"):
        check_resume_flags(args, Recipe(epochs=30))


# ---- any arguments ----

words = st.one_of(
    st.sampled_from(FLAGS),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.text(max_size=12)),
    st.sampled_from(["-1", "1e400", "--", "-", "nan", "%s", "%(prog)s", "{}", "@/etc/passwd", "9" * 5000]),
    st.text(st.characters(), max_size=20),  # lone surrogates, control characters and all
    st.integers().map(str),
    st.floats().map(str),
    st.binary(max_size=8).map(lambda data: data.decode("utf-8", "surrogateescape")),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(words, max_size=6))
@example(["\ud800", "--name=\ud800\n"])
@example(["--milestones", "1", "--", "2"])
def test_any_arguments_end_in_flags_or_in_one_line(argv: list[str]) -> None:
    result, out, err = parse(*argv)
    if result == 0:
        assert out and not err
    elif result == 2:
        assert not out and err.endswith("\n") and err[:-1].isprintable() and len(err) < 500
    else:
        assert (out, err) == ("", "")
        assert all(hasattr(result, name) for name in RECIPE_FIELDS)
        try:
            recipe = recipe_from(result, "fp32")
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert dataclasses.replace(recipe) == recipe
