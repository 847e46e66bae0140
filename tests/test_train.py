"""Runs of train.py: what they ask, say, refuse, and the files they leave."""

import builtins
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from core import distributed
from core.cli import run_main
from helpers import REPOSITORY
from helpers.stand_ins import (
    QUICK,
    columns,
    epoch_lines,
    forget_log,
    load,
    stand_in,
    stand_in_images,
    stand_in_network,
    without_data,
)
from model import BasicBlock, count_parameters
from train import main
from training.engine import evaluate
from training.recipe import Recipe
from training.settings import NEW_RUN_FLAGS, Settings, build_parser
from utils import make_test_batches

pexpect = pytest.importorskip("pexpect", reason="drives a pseudo-terminal") if os.name == "posix" else None

# The questions; the suggested rate is that of the fixture `finder`.
FINDER = "Do you want to run LR Finder? (y/n, default: y): "
SUGGESTED = "Use suggested LR 2.00e-02? (y/n, default: y): "
RATE = "Enter learning rate (default 1.00e-01): "
EPOCHS = "Select number of epochs for training (default 20): "
SYNTHETIC = "Train on the built-in synthetic images instead? (y/n, default: y): "


def typed(patch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Let standard input be a terminal at which `answers` are typed; returns the list of the questions."""
    terminal, left, questions = io.StringIO(), list(answers), []
    terminal.isatty = lambda: True
    patch.setattr(sys, "stdin", terminal)
    patch.setattr(builtins, "input", lambda question: questions.append(question) or left.pop(0))
    return questions


# ---- one whole run, looked at from all sides ----


@dataclass(frozen=True)
class Finished:
    folder: Path
    out: str
    err: str

    def path(self, ending: str) -> Path:
        return self.folder / f"CNN_Model{ending}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run of 10 epochs with the LR finder and all plots, drops after epochs 4, 7 and 9."""
    folder = tmp_path_factory.mktemp("finished")
    argv = ["--yes", *QUICK[2:], "--epochs", "10", "--output-dir", str(folder), "--target-accuracy", "3"]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main(argv) == 0
        forget_log()
    return Finished(folder, out.getvalue(), err.getvalue())


def test_it_leaves_its_files_and_a_log_of_what_was_shown_without_bars(finished: Finished) -> None:
    endings = ["_best.pth", "_history.csv", "_last.prev.pth", "_last.pth", "_log.txt", "_lr_finder.png"]
    endings += ["_training_plots.png", "_training_results.pth"]
    assert sorted(path.name for path in finished.folder.iterdir()) == [f"CNN_Model{e}" for e in endings]
    log = finished.path("_log.txt").read_text("utf-8").splitlines(keepends=True)
    traces = [line for line in log if line.startswith(("Command: ", "Versions: "))]  # in the file alone
    assert len(traces) == 2 and "".join(line for line in log if line not in traces) == finished.out
    assert finished.err == ""
    assert "\r" not in finished.out and "\x1b" not in finished.out


def test_the_first_lines_say_what_is_trained(finished: Finished) -> None:
    parameters = count_parameters(stand_in_network(BasicBlock))
    device, *others = finished.out.splitlines()[:7]
    assert re.match(r"Device:   .+, fp32, \d+ threads$", device)
    assert others == [
        f"Network:  resnet20, {parameters:,} parameters",
        "Data:     CIFAR-100",
        "          300 training, 200 test images",
        "Recipe:   SGD, batch 100, weight decay 0.0005",
        "          multistep, reference augmentation, seed 0",
        f"Output:   {finished.path('_*')}",
    ]
    log = finished.path("_log.txt").read_text("utf-8")
    assert "\nCommand: python " in log and "\nVersions: code " in log and f"torch {version('torch')}" in log
    assert "\nTraining: 10 epochs, " in finished.out


def test_the_last_lines_are_commands_that_use_the_run(finished: Finished) -> None:
    *_, plots, results, evaluate, predict, export, go_on = finished.out.splitlines()
    assert plots == f"Plots:    {finished.path('_training_plots.png')}"
    assert results == f"Results:  {finished.path('_training_results.pth')}"
    best = finished.path("_best.pth")
    for line, script in ((evaluate, "evaluate.py"), (predict, "predict.py"), (export, "export.py")):
        assert line.partition(":")[2].split()[:4] == ["python", script, "--weights", str(best)]
    assert go_on == f"Go on:    python train.py --init-from {best}"


def test_a_line_an_epoch_in_the_references_form_with_marks(finished: Finished) -> None:
    lines = epoch_lines(finished.out)
    assert [match.group(1, 2, 5) for match in lines] == [(str(n), "10", "Test") for n in range(1, 11)]
    accuracies = [float(match[7]) for match in lines]
    bests = [accuracy > max(accuracies[:n], default=-1) for n, accuracy in enumerate(accuracies)]
    assert [bool(match[9]) for match in lines] == bests
    assert max(accuracies) >= 3, "the stand-in should learn that much"
    first = next(n for n, accuracy in enumerate(accuracies) if accuracy >= 3)
    assert [bool(match[8]) for match in lines] == [n == first for n in range(10)]
    assert not any(match[10] for match in lines)


def test_the_history_holds_what_the_lines_say_and_each_epochs_rate(finished: Finished) -> None:
    table = columns(finished.path("_history.csv"))
    shown = {"train_loss": 3, "train_acc_percent": 4, "test_loss": 6, "test_acc_percent": 7}
    assert list(table) == ["epoch", "learning_rate", *shown]
    assert table["epoch"] == list(range(1, 11))
    for name, group in shown.items():
        values = [float(match[group]) for match in epoch_lines(finished.out)]
        assert table[name] == pytest.approx(values, abs=0.006 if "acc" in name else 0.00006)
    lr = load(finished.path("_last.pth"))["recipe"]["lr"]
    drops = [0] * 4 + [1] * 3 + [2] * 2 + [3]
    assert table["learning_rate"] == pytest.approx([lr * 0.2**n for n in drops], rel=1e-6)
    assert table["train_loss"][-1] < table["train_loss"][0]


def test_the_suggested_rate_is_used_and_its_plot_named(finished: Finished) -> None:
    suggested = re.search(r"LR finder: suggested LR (\S+) \(.+\)\n +loss .+ for rates", finished.out)
    assert suggested and f"{load(finished.path('_best.pth'))['recipe']['lr']:.2e}" == suggested[1]
    assert f"LR finder plot: {finished.path('_lr_finder.png')}" in finished.out


def test_the_checkpoints_load_with_plain_torch_and_say_what_made_them(finished: Finished) -> None:
    table = columns(finished.path("_history.csv"))
    best_epoch = int(np.argmax(table["test_acc_percent"])) + 1
    best, last, results = (
        load(finished.path(e)) for e in ("_best.pth", "_last.pth", "_training_results.pth")
    )
    for state, kind in ((best, "best"), (last, "last"), (results, "results")):
        assert state["kind"] == kind and state["name"] == "CNN_Model"
        assert state["recipe"]["model"] == "resnet20" and state["recipe"]["epochs"] == 10
        assert state["versions"]["torch"] == version("torch") and "albumentations" in state["versions"]
        assert len(state["classes"]) == len(state["superclass_of"]) == 100
        assert len(state["superclasses"]) == 20
    assert best["epoch"] == results["epoch"] == last["best"]["epoch"] == best_epoch
    assert results["accuracy_percent"] == max(table["test_acc_percent"])
    assert len(results["history"]) == len(last["history"]) == 10
    assert results["history"][-1]["test_acc_percent"] == table["test_acc_percent"][-1]
    assert all(torch.equal(value, results["model"][name]) for name, value in best["model"].items())
    assert last["epoch"] == 11 and last["batches_done"] == 0
    assert results["elapsed_s"] > 0 and results["final_test"] == {}


def test_the_results_hold_the_weights_of_the_best_epoch(finished: Finished) -> None:
    batches = make_test_batches(stand_in_images().test, 5000, "cpu")
    model = stand_in_network(BasicBlock)
    for ending, expected in (("_training_results.pth", "accuracy_percent"), ("_last.pth", None)):
        state = load(finished.path(ending))
        model.load_state_dict(state["model"])
        accuracy = evaluate(model, batches).accuracy_percent
        assert accuracy == (state[expected] if expected else state["history"][-1]["test_acc_percent"])


def test_the_run_ends_with_an_analysis(finished: Finished) -> None:
    table = columns(finished.path("_history.csv"))
    words = [
        f"Best test accuracy:  {max(table['test_acc_percent']):.2f}%",
        f"Final test accuracy: {table['test_acc_percent'][-1]:.2f}% (epoch 10)",
        "chosen on the test images, which flatters",
        "Generalisation gap:",
        "Train loss:",
        "Total time:",
    ]
    words += [f"\n  {phase} " for phase in ("1-4", "5-7", "8-9", "10-10")]
    assert all(word in finished.out for word in words), finished.out


# ---- other data, other schedules ----


def test_with_a_validation_split_the_test_images_are_read_once_at_the_end(quick, capsys) -> None:
    tested: list[int] = []

    def counting(model: nn.Module, batches: list, **options: object) -> object:
        tested.append(sum(len(labels) for _, labels in batches))
        metrics = evaluate(model, batches, **options)
        # the validation accuracy falls, so that the best epoch is the first, not the last
        return replace(metrics, accuracy_percent=50.0 - len(tested)) if len(tested) <= 3 else metrics

    quick.setattr(train, "evaluate", counting)
    assert main([*QUICK, "--epochs", "3", "--val-split", "100"]) == 0
    assert tested == [100] * 3 + [200] * 2  # the best and the last epoch
    out = capsys.readouterr().out
    assert "100 held out for validation\n          200 training, 200 test images" in out
    assert [match[5] for match in epoch_lines(out)] == ["Val"] * 3
    table = columns("output/CNN_Model_history.csv")
    assert list(table)[-2:] == ["val_loss", "val_acc_percent"] and "test_acc_percent" not in table
    results = load("output/CNN_Model_training_results.pth")
    assert (results["chosen_on"], results["epoch"]) == ("val", 1)
    batches = make_test_batches(stand_in_images().test, 5000, "cpu")
    for key, state in (("best", results), ("last", load("output/CNN_Model_last.pth"))):
        model = stand_in_network(BasicBlock)
        model.load_state_dict(state["model"])
        stored = results["final_test"][key]
        assert stored["loss"] == pytest.approx(evaluate(model, batches).loss, rel=1e-6)
        assert stored["images"] == 200
        assert f"Test accuracy of the {key} epoch" in out
        assert f"{stored['accuracy_percent']:.2f}% on 200 images that chose nothing" in out
    assert "flatters" not in out


def test_a_subset_says_so_wherever_its_metrics_stand(quick, capsys) -> None:
    titles: list[str] = []
    quick.setattr(train, "plot_history", lambda *_, title, **__: titles.append(title))
    assert main([*QUICK, "--epochs", "1", "--limit-train", "200", "--limit-test", "100"]) == 0
    out = capsys.readouterr().out
    note = "CIFAR-100, 200 training images only, 100 test images only"
    assert f"Data:     {note}\n" in out and f"Analysis (resnet20, {note})" in out
    assert "Training: 1 epoch, " in out
    assert titles and all(note in title for title in titles)
    assert load("output/CNN_Model_best.pth")["recipe"]["limit_train"] == 200


def test_one_cycle_is_stepped_by_the_batch(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert main([*QUICK, "--epochs", "5", "--scheduler", "onecycle", "--max-lr", "0.5"]) == 0
    rates = [0.02, 0.47623253, 0.43326323, 0.23131855, 0.043442133]  # torch's
    assert columns("output/CNN_Model_history.csv")["learning_rate"] == pytest.approx(rates, rel=1e-6)
    assert "onecycle with its peak at learning rate 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("name", [[], ["--name", "mine"], ["--name", "my_synthetic_run"]])
def test_a_synthetic_run_says_so_everywhere(quick, finder, capsys, name) -> None:
    titles: list[str] = []
    quick.setattr(train, "plot_history", lambda *_, title, **__: titles.append(title))
    quick.setattr(train, "plot_lr_finder", lambda *a, title, **_: titles.append(title) or a[3])
    flags = [flag for flag in QUICK if flag != "--no-lr-finder"]
    assert main([*flags, "--epochs", "1", "--dataset", "synthetic", *name]) == 0
    assert all("synthetic" in path.name for path in Path("output").iterdir())
    assert len(titles) >= 2 and all("synthetic data (not CIFAR-100)" in title for title in titles)
    out = capsys.readouterr().out
    assert all("CIFAR-100" not in line.replace("(not CIFAR-100)", "") for line in out.splitlines())
    for start in ("Data: ", "Epoch [", "Analysis ("):
        lines = [line for line in out.splitlines() if line.startswith(start)]
        assert lines and all("synthetic" in line for line in lines), start
    [results] = Path("output").glob("*_training_results.pth")
    assert load(results)["recipe"]["dataset"] == "synthetic"


@pytest.mark.real_data
def test_one_epoch_on_the_real_images(real_data_dir, tmp_path, capsys) -> None:
    flags = ["--yes", "--no-lr-finder", "--model", "resnet20", "--limit-train", "512", "--limit-test", "200"]
    where = ["--data-dir", str(real_data_dir), "--output-dir", str(tmp_path)]
    assert main([*flags, *where, "--epochs", "1", "--batch-size", "32"]) == 0
    forget_log()
    table = columns(tmp_path / "CNN_Model_history.csv")
    assert 3.5 < table["train_loss"][0] < 5.5  # ln 100 = 4.6
    results = load(tmp_path / "CNN_Model_training_results.pth")
    assert results["classes"][0] == "apple" and results["superclasses"][0] == "aquatic_mammals"
    assert "Epoch [1/1] - Train Loss: " in capsys.readouterr().out


# ---- the questions ----


@pytest.mark.parametrize(
    ("answers", "flags", "asked", "expected"),
    [
        ("y y 2", "", [FINDER, SUGGESTED, EPOCHS], (0.02, 2, True)),
        ("- - 1", "", [FINDER, SUGGESTED, EPOCHS], (0.02, 1, True)),
        ("y n 0.3 1", "", [FINDER, SUGGESTED, RATE, EPOCHS], (0.3, 1, True)),
        ("y n - 1", "", [FINDER, SUGGESTED, RATE, EPOCHS], (0.1, 1, True)),
        ("n 1", "", [FINDER, EPOCHS], (0.1, 1, False)),
        ("what n 0 -3 2.5 1", "", [FINDER, EPOCHS], (0.1, 1, False)),
        ("y n fast -1 nan 0.3 1", "", [FINDER, SUGGESTED, RATE, EPOCHS], (0.3, 1, True)),
        ("n", "", [FINDER, EPOCHS], (0.1, 20, False)),
        ("", "", [FINDER, SUGGESTED, EPOCHS], (0.02, 20, True)),
        ("y 1", "--lr-finder", [SUGGESTED, EPOCHS], (0.02, 1, True)),
        ("1", "--no-lr-finder", [EPOCHS], (0.1, 1, False)),
        # fewer than the other flags leave room for: asked again
        ("2 3", "--lr 0.07 --milestones 1 2", [EPOCHS], (0.07, 3, False)),
        ("2 3", "--lr 0.07 --scheduler cosine --warmup-epochs 2", [EPOCHS], (0.07, 3, False)),
        ("1 2", "--lr 0.07 --image-sizes 24 32", [EPOCHS], (0.07, 2, False)),
        ("2 3", "--lr 0.07 --swa-start 3", [EPOCHS], (0.07, 3, False)),
        ("2 3", "--lr 0.07 --sam sam --sam-start 3", [EPOCHS], (0.07, 3, False)),
        ("1", "--lr 0.07", [EPOCHS], (0.07, 1, False)),
        ("1", "--lr 0.07 --lr-finder", [EPOCHS], (0.07, 1, True)),
        ("n", "--epochs 1", [FINDER], (0.1, 1, False)),
        ("", "--lr 0.07 --epochs 1", [], (0.07, 1, False)),
        ("n n 7", "--yes --epochs 1 --no-lr-finder", [], (0.1, 1, False)),
        ("n n 7", "--yes", [], (0.02, 20, True)),
        ("1", "--scheduler onecycle --max-lr 0.4", [EPOCHS], (0.4, 1, False)),
    ],
)
def test_a_flag_given_is_a_question_not_asked(
    quick: pytest.MonkeyPatch,
    finder: list[str],
    capsys: pytest.CaptureFixture,
    answers: str,  # "-" stands for an empty line
    flags: str,
    asked: list[str],
    expected: tuple[float, int, bool],
) -> None:
    lines = answers.split()
    quick.setattr(sys, "stdin", io.StringIO("".join(f"{line.removesuffix('-')}\n" for line in lines)))
    recipes: list[Recipe] = []

    def choose_compile_size(recipe: Recipe, *_: object) -> None:
        recipes.append(recipe)
        raise KeyboardInterrupt  # the questions are over

    quick.setattr(train, "choose_compile_size", choose_compile_size)
    main(["--model", "resnet20", "--batch-size", "100", *flags.split()])
    out = capsys.readouterr().out
    assert (recipes[0].max_lr or recipes[0].lr, recipes[0].epochs, bool(finder)) == expected
    positions = [out.find(question) for question in asked]
    assert -1 not in positions and positions == sorted(positions)
    for question in {FINDER, SUGGESTED, RATE, EPOCHS} - set(asked):
        assert question not in out
    if not lines:
        assert out.count("No answer: taking the default") == len(asked)
    for wrong in {"what", "0", "-3", "2.5", "fast", "-1", "nan"} & set(lines):
        assert out.count(f"not '{wrong}'") == 1
    if FINDER in asked and not finder:
        assert "No LR finder: the learning rate is 1.00e-01, the default." in out


@pytest.mark.parametrize(
    ("flags", "answers", "name"),
    [
        (["--yes"], [], "CNN_Model-3"),
        (["--yes", "--overwrite"], [], "CNN_Model"),
        ([], ["y"], "CNN_Model"),
        ([], ["n"], "CNN_Model-3"),
        ([], [""], "CNN_Model-3"),
    ],
)
def test_an_earlier_run_is_replaced_only_where_that_is_wanted(quick, capsys, flags, answers, name) -> None:
    earlier = [Path(f"output/CNN_Model{ending}_best.pth") for ending in ("", "-2")]
    earlier[0].parent.mkdir()
    for path in earlier:
        path.write_bytes(b"precious")
    questions = typed(quick, *answers)
    assert main([*QUICK[1:], "--epochs", "1", *flags]) == 0
    assert questions == ["output holds a run CNN_Model. Overwrite it? (y/n, default: n): "] * len(answers)
    assert load(f"output/{name}_best.pth")["name"] == name
    replaced = name == "CNN_Model"
    assert [path.read_bytes() == b"precious" for path in earlier] == [not replaced, True]
    kept = "CNN_Model is kept (--resume resumes it); this run writes CNN_Model-3."
    assert (kept in capsys.readouterr().out) != replaced


def test_the_program_itself_with_answers_from_a_pipe(tmp_path: Path) -> None:
    """ResNet-20 on the built-in images, LR finder included, without stand-ins."""
    flags = ["--dataset", "synthetic", "--model", "resnet20", "--batch-size", "8"]
    flags += ["--limit-train", "256", "--limit-test", "200"]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *flags],
        cwd=tmp_path,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        input="y\ny\n2\n",
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    out = done.stdout
    positions = [out.index(words) for words in (FINDER + "y\n", "Use suggested LR ", EPOCHS + "2\n")]
    assert positions == sorted(positions)
    assert len(epoch_lines(out)) == 2
    names = {path.name.removeprefix("CNN_Model_synthetic") for path in (tmp_path / "output").iterdir()}
    assert {"_history.csv", "_lr_finder.png", "_training_plots.png", "_best.pth", "_last.pth"} <= names
    assert not list(tmp_path.glob("data/*"))


AT_A_TERMINAL = """
import sys
import pytest
import train
from core.cli import run_main
from helpers import stand_ins
patch = pytest.MonkeyPatch()
stand_ins.stand_in(patch, plots=False)
stand_ins.without_data(patch)
sys.exit(run_main(train.main, "train.py"))
"""


@pytest.mark.skipif(pexpect is None, reason="no pseudo-terminals here")
def test_a_session_at_a_terminal(tmp_path: Path) -> None:
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    child = pexpect.spawn(
        sys.executable,
        # 10 batches an epoch: in two epochs, the sum of their tenths is more than 2
        ["-c", AT_A_TERMINAL, "--model", "resnet20", "--batch-size", "30", "--data-dir", "nowhere"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        encoding="utf-8",
        timeout=200,
        dimensions=(40, 120),
    )
    child.logfile_read = io.StringIO()
    child.expect_exact("CIFAR-100 could not be downloaded")
    for question, answer, complaint in (
        (SYNTHETIC, "", None),
        (FINDER, "perhaps", "Please answer y or n, not 'perhaps'."),
        (FINDER, "y", None),
        ("? (y/n, default: y): ", "n", None),
        (RATE, "quick", "Please answer again."),
        (RATE, "0.05", None),
        (EPOCHS, "0", "from 1 to 100,000, not '0'. Please answer again."),
        (EPOCHS, "2", "Training: 2 epochs, learning rate 0.05"),
    ):
        child.expect_exact(question)
        child.sendline(answer)
        if complaint:
            child.expect_exact(complaint)
    child.expect(r"epoch 1/2: .*batch")  # a bar
    child.expect(r"Epoch \[2/2\] - .* \(synthetic data\)")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0 and "Warning" not in child.logfile_read.getvalue()
    assert (tmp_path / "output" / "CNN_Model_synthetic_training_results.pth").exists()


# ---- no data, wrong values ----

NO_DATA = [*QUICK[1:], "--epochs", "1", "--data-dir", "nowhere"]


@pytest.mark.parametrize("flags", [["--yes"], []])
def test_without_data_a_pipe_gets_one_message_and_exit_1(quick, capsys, flags) -> None:
    without_data(quick)
    quick.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    code = run_main(lambda: main([*NO_DATA, *flags]), "train.py")
    out, err = capsys.readouterr()
    assert (code, [line.split()[0] for line in out.splitlines()]) == (1, ["Trying", "Trying"])
    assert err.startswith("train.py: error: CIFAR-100 could not be downloaded:\n") and "Traceback" not in err
    for words in ("http://127.0.0.1:9/a.tar.gz: ", "http://127.0.0.1:9/b.tar.gz: ", "--dataset synthetic"):
        assert words in err
    assert "nowhere/cifar-100-python.tar.gz" in err.replace(os.sep, "/")
    assert not list(Path("output").glob("*.pth"))


@pytest.mark.parametrize("answers", [["maybe", "y"], [""], ["n"]])
def test_at_a_terminal_the_synthetic_set_is_offered(quick, capsys, answers) -> None:
    without_data(quick)
    questions = typed(quick, *answers)
    code = run_main(lambda: main(NO_DATA), "train.py")
    out, err = capsys.readouterr()
    assert questions == [SYNTHETIC] * len(answers)
    assert "CIFAR-100 could not be downloaded" in out
    if answers == ["n"]:
        assert (code, err) == (1, "train.py: error: no data to train on\n")
    else:
        assert code == 0
        assert load("output/CNN_Model_synthetic_best.pth")["recipe"]["dataset"] == "synthetic"


@pytest.mark.parametrize(
    "argv",
    [
        ["--epochs", "0"],  # by the flag's own parser
        ["--val-split", "50000"],
        ["--limit-train", "100"],  # by the recipe: fewer images than --batch-size
        ["--scheduler", "onecycle", "--milestones", "3"],
        ["--scheduler", "onecycle", "--max-lr", "0.4", "--lr", "0.1"],  # before the recipe is made
        ["--recipe", "best", "--resume"],
        ["--device", "cuda"],
    ],
    ids=" ".join,
)
def test_a_wrong_value_is_one_line_and_exit_2_before_data_is_touched(quick, capsys, argv) -> None:
    quick.setattr(train, "load_dataset", lambda *_, **__: pytest.fail("data was touched"))
    quick.setattr(torch.cuda, "device_count", lambda: 0)
    try:
        code = run_main(lambda: main(["--yes", *argv]), "train.py")
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("train.py: error: ") and err.count("\n") == 1
    assert any(flag in err for flag in ["--batch-size", *argv] if flag.startswith("--"))
    assert not Path("output").exists()


# ---- the command that resumes ----


def test_every_flag_about_the_machine_is_in_the_command_that_resumes(monkeypatch, tmp_path) -> None:
    machine = [
        *(["--data-dir", "my data"], ["--data-url", "https://example.org/a?b&c"], ["--workers", "0"]),
        *(["--checkpoint-every", "0.123456789"], ["--device", "cpu"], ["--compile", "off"]),
        *(["--tensorboard"], ["--deterministic"], ["--sync-bn"]),
    ]
    for variable in ("CIFAR_DATA", "CIFAR100_URL"):
        monkeypatch.delenv(variable, raising=False)
    parser, state = build_parser(), tmp_path / "my runs" / "a_last.pth"
    recipe_flags = {field.name for field in fields(Recipe)} | {"recipe"}
    tested = {flag.removeprefix("--").replace("-", "_") for flag, *_ in machine}
    assert set(vars(parser.parse_args([]))) - recipe_flags - NEW_RUN_FLAGS == tested
    new_run = ["--yes", "--no-lr-finder", "--name", "a", "--overwrite", "--output-dir", str(tmp_path)]
    given = [*new_run, "--epochs", "3", "--lr", "0.2", "--milestones", "1", "2"]
    for flags in ([], *machine):
        command = Settings.from_args(parser.parse_args([*given, *flags])).resume_command(state)
        assert shlex.split(command) == ["python", "train.py", "--resume", str(state), *flags]
        assert parser.parse_args(shlex.split(command)[2:])


@pytest.mark.parametrize(
    ("processes", "launcher"),
    [
        ("2", "--nproc-per-node=2"),
        ("6", "--nproc-per-node=2 --nnodes=3 --node-rank=0 --master-addr=first --master-port=29500"),
    ],
)
def test_the_command_that_resumes_starts_as_many_processes(monkeypatch, processes, launcher) -> None:
    place = {"RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    for name, value in (place | {"WORLD_SIZE": processes}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_enabled", True)
    command = Settings.from_args(build_parser().parse_args([])).resume_command(Path("a_last.pth"))
    assert command == f"torchrun {launcher} train.py --resume a_last.pth"
