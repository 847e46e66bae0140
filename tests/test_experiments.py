"""experiments.py: what is run, skipped and resumed; the tables; and the one in docs/ablation.md."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import experiments
from core.errors import RunError, UsageError
from model import MODELS
from training.run import RunFiles
from training.settings import build_parser

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEADER = "epoch,learning_rate,train_loss,train_acc_percent,test_loss,test_acc_percent"


class TrainStub:
    """Stands for train.py: records its commands and leaves the files of a finished run."""

    def __init__(self) -> None:
        self.exit_code = 0
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> int:
        self.commands.append(command[2:])
        if self.exit_code:
            return self.exit_code
        args = build_parser().parse_args(command[2:])
        accuracy = (8.0 if args.recipe else 10.0) * args.seed
        rows = [HEADER, f"1,0.1,3,1,3,{accuracy + 1}", f"2,0.1,3,1,3,{accuracy}"]
        files = RunFiles(args.output_dir, args.name)
        files.folder.mkdir(parents=True, exist_ok=True)
        files.path("_history.csv").write_text("\n".join(rows) + "\n")
        files.results.touch()
        return 0


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> TrainStub:
    stub = TrainStub()
    monkeypatch.setattr(subprocess, "call", stub)
    return stub


@pytest.mark.parametrize(("dataset", "suffix"), [([], ""), (["--dataset=synthetic"], "_synthetic")])
def test_every_run_is_made_once_and_the_table_holds_mean_and_deviation(train, tmp_path, dataset, suffix):
    argv = ["--recipes", "fast", "--run", "mine: --mix mixup", "--seeds", "1", "3", "--output-dir"]
    argv += [str(tmp_path), "--", "--epochs", "2", *dataset]
    assert experiments.main(argv) == 0
    assert len(train.commands) == 4
    assert train.commands[0] == [
        *("--yes", "--no-lr-finder", "--output-dir", str(tmp_path), "--name", f"mine-seed1{suffix}"),
        *("--epochs", "2", *dataset, "--mix", "mixup", "--seed", "1"),  # the run's own flags win
    ]
    table = (tmp_path / "experiments.md").read_text()
    assert "| fast | `--recipe fast` | 2 | 16.00 ± 11.31 | 17.00 ± 11.31 | -4.00 ± 2.83 |" in table
    assert "| mine | `--mix mixup` | 2 | 20.00 ± 14.14 | 21.00 ± 14.14 |  |" in table
    assert f"`{' '.join(['--epochs', '2', *dataset])}`" in table
    experiments.main(argv)
    assert len(train.commands) == 4  # all are finished


@pytest.mark.parametrize("state", ["last", "previous"])
def test_an_unfinished_run_is_resumed(train: TrainStub, tmp_path: Path, state: str) -> None:
    files = RunFiles(tmp_path, "x-seed0")
    getattr(files, state).touch()
    train.exit_code = 130
    with pytest.raises(RunError, match="x-seed0 ended with exit code 130: repeat"):
        experiments.run_once(files, ["--epochs", "2"])
    assert train.commands == [["--resume", str(files.last)]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to run"),
        (
            ["--run", "no colon"],
            "experiments.py: error: argument --run: takes \"NAME: FLAGS\", not 'no colon'",
        ),
        (["--run", ": --mix mixup"], "argument --run: takes up to 80 letters"),
        (["--run", "a/b: x"], "argument --run: takes up to 80 letters"),
        (["--run", "fast:", "--recipes", "fast"], "two runs have the same name"),
        (["--run", "good:", "--run", "bad: --mxi 1"], "train.py: error: unrecognized arguments: --mxi 1"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(train, capsys, argv, message) -> None:
    with pytest.raises((UsageError, SystemExit)) as stopped:
        experiments.main(argv)
    assert message in f"{stopped.value}{capsys.readouterr().err}" and not train.commands


def test_a_table_that_cannot_be_written_is_refused_before_anything_runs(train, tmp_path) -> None:
    (tmp_path / "experiments.md").mkdir()
    (tmp_path / "file").touch()
    for folder, message in ((tmp_path, "it is a folder"), (tmp_path / "file", "is a file, not a folder")):
        with pytest.raises((UsageError, RunError), match=message):
            experiments.main(["--recipes", "fast", "--output-dir", str(folder)])
    assert not train.commands


@pytest.mark.parametrize("text", ["", "epoch\n", f"{HEADER}\n", f"{HEADER}\n1,0.1,3,1,3,x\n"])
def test_a_damaged_history_is_reported_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "h.csv").write_text(text)
    with pytest.raises(RunError, match=r"h.csv is not a history of train.py: delete"):
        experiments.accuracies(tmp_path / "h.csv")


def test_averaged_weights_and_held_out_images_come_first_and_one_seed_has_no_deviation(tmp_path) -> None:
    (tmp_path / "x-seed0_history.csv").write_text("epoch,val_acc_percent,ema_val_acc_percent\n1,9,8\n2,7,6\n")
    table = experiments.results_table(tmp_path, {"x": []}, [0], [])
    assert table.endswith("| x | `none` | 2 | 6.00 | 8.00 |  |\n")


def test_the_networks_are_listed_with_parameters_and_macs() -> None:
    table = experiments.networks_table()
    assert len(table.splitlines()) == 2 + len(MODELS)
    assert "| resnet56 | 861,620 | 125,753,600 |" in table
    assert "| wrn_28_10 | 36,536,884 | 5,243,386,368 |" in table


@pytest.mark.parametrize(("number", "folder"), [(0, "ablation"), (1, "bf16")])
def test_the_ablation_page_is_what_its_commands_make_of_the_histories(number: int, folder: str) -> None:
    page = (DOCS / "ablation.md").read_text("utf-8")
    block = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[number]
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:2] == ["python", "experiments.py"]
    split = words.index("--")
    args, shared = experiments.build_parser().parse_args(words[2:split]), words[split + 1 :]
    variants = dict(args.run)
    # its flags are parsed by train.py's parser on the way
    assert experiments.results_table(DOCS / folder, variants, args.seeds, shared) in page
    histories = {path.name for path in (DOCS / folder).iterdir()}
    assert histories == {f"{name}-seed{seed}_history.csv" for name in variants for seed in args.seeds}
