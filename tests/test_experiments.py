"""Experiments: what is run, skipped and gone on with; the table's means and deviations; the networks."""

import subprocess
from pathlib import Path

import pytest

import experiments
from core.errors import RunError, UsageError
from model import MODELS
from training.run import RunFiles

HEADER = "epoch,learning_rate,train_loss,train_acc_percent,test_loss,test_acc_percent"


class Stub:
    """Stands for train.py: notes its commands and leaves the files of a finished run."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.commands = code, []

    def __call__(self, command: list[str]) -> int:
        self.commands.append(command[2:])
        if not self.code:
            name = command[command.index("--name") + 1]
            folder = Path(command[command.index("--output-dir") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            seed = int(command[command.index("--seed") + 1])
            accuracy = (8.0 if "fast" in command else 10.0) * seed
            rows = [HEADER, f"1,0.1,3,1,3,{accuracy + 1}", f"2,0.1,3,1,3,{accuracy}"]
            (folder / f"{name}_history.csv").write_text("\n".join(rows) + "\n")
            (folder / f"{name}_training_results.pth").touch()
        return self.code


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(experiments.run_once, "__defaults__", (made,))
    return made


def test_every_run_is_made_once_and_the_table_holds_mean_and_deviation(stub: Stub, tmp_path: Path) -> None:
    argv = ["--recipes", "fast", "--run", "mine: --mix mixup", "--seeds", "1", "3", "--output-dir"]
    argv += [str(tmp_path), "--", "--epochs", "2"]
    assert experiments.main(argv) == 0
    assert len(stub.commands) == 4
    assert stub.commands[0] == [
        *("--yes", "--no-lr-finder", "--output-dir", str(tmp_path), "--name", "mine-seed1"),
        *("--epochs", "2", "--mix", "mixup", "--seed", "1"),  # the run's own flags win
    ]
    table = (tmp_path / "experiments.md").read_text()
    assert "| fast | `--recipe fast` | 2 | 16.00 ± 11.31 | 17.00 ± 11.31 | -4.00 ± 2.83 |" in table
    assert "| mine | `--mix mixup` | 2 | 20.00 ± 14.14 | 21.00 ± 14.14 |  |" in table
    assert "`--epochs 2`" in table
    experiments.main(argv)
    assert len(stub.commands) == 4  # all are finished


def test_an_unfinished_run_is_gone_on_with(tmp_path: Path) -> None:
    files, stub = RunFiles(tmp_path, "x-seed0"), Stub(code=130)
    files.previous.touch()
    with pytest.raises(RunError, match="x-seed0 ended with 130: repeat"):
        experiments.run_once(files, ["--epochs", "2"], stub)
    assert stub.commands == [["--resume", str(files.last)]]


@pytest.mark.parametrize("argv", [[], ["--run", "no colon"], ["--run", ": --mix mixup"], ["--run", "a/b: x"]])
def test_wrong_usage_is_refused_before_anything_runs(stub: Stub, argv: list[str]) -> None:
    with pytest.raises(UsageError):
        experiments.main(argv)
    assert not stub.commands


@pytest.mark.parametrize("text", ["", "epoch\n", f"{HEADER}\n", f"{HEADER}\n1,0.1,3,1,3,x\n"])
def test_a_damaged_history_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "h.csv").write_text(text)
    with pytest.raises(RunError, match="no history"):
        experiments.accuracies(tmp_path / "h.csv")


def test_averaged_weights_and_held_out_images_come_first(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text("epoch,val_acc_percent,ema_val_acc_percent\n1,5,6\n2,7,8\n")
    assert experiments.accuracies(path) == [6.0, 8.0]


def test_one_seed_has_no_deviation() -> None:
    assert experiments.mean_and_deviation([70.0]) == "70.00"
    assert experiments.mean_and_deviation([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert experiments.mean_and_deviation([1.0, 2.0, 3.0], "+") == "+2.00 ± 1.00"


def test_the_networks_are_listed_with_parameters_and_macs() -> None:
    table = experiments.networks_table()
    assert len(table.splitlines()) == 2 + len(MODELS)
    assert "| resnet56 | 861,620 | 125,753,600 |" in table
    assert "| wrn_28_10 | 36,536,884 | 5,243,386,368 |" in table


def test_synthetic_runs_are_found_by_the_name_that_train_gives_them(tmp_path: Path) -> None:
    assert experiments.run_files(tmp_path, "a", 0, ["--dataset", "synthetic"]).name == "a-seed0_synthetic"
    assert experiments.run_once.__defaults__ == (subprocess.call,)
