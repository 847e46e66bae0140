"""The table in docs/ablation.md: what its own command would write from the histories beside it."""

import re
import shlex
from pathlib import Path

import experiments
from training.settings import build_parser

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "ablation.md").read_text("utf-8")


def command() -> tuple[dict[str, list[str]], list[int], list[str]]:
    """The variants, seeds and shared flags of the page's command."""
    block = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1]
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:2] == ["python", "experiments.py"]
    split = words.index("--")
    args = experiments.parser().parse_args(words[2:split])
    return dict(experiments.named_flags(text) for text in args.run), args.seeds, words[split + 1 :]


def test_the_table_follows_from_the_histories() -> None:
    variants, seeds, shared = command()
    assert len(variants) > 10
    table = experiments.results_table(DOCS / "ablation", variants, seeds, shared)
    assert table in PAGE
    histories = {path.name for path in (DOCS / "ablation").iterdir()}
    assert histories == {f"{name}-seed{seed}_history.csv" for name in variants for seed in seeds}


def test_its_flags_are_those_of_train() -> None:
    variants, _, shared = command()
    for flags in variants.values():
        assert build_parser().parse_args([*shared, *flags]).epochs == 2
