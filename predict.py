"""Say what is in images: the likeliest of a trained network's classes, for any number of image files.

    python predict.py photo.jpg more/*.png          a table of the five likeliest classes of each
    python predict.py --json photos/ > found.jsonl  a folder and all below it, one JSON object a line
    find . -name '*.jpg' | python predict.py -      the files that standard input names, one a line
    python predict.py 'photos/**/*.jpg' --save out  a pattern; each image with its bars, as PNG in out/

The table and JSON go to standard output, as the images come; errors and the bar to standard error. A file
that cannot be read is reported, the rest goes on, and the exit code is 1.
"""

import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

from core.cli import progress_bar, run_main, whole_number
from core.errors import RunError, UsageError, printable
from core.machine import autocast, choose_device, set_up_torch, usable_cores
from image_files import Found, Picture, find_images, lines_of, read_image
from inspection.evaluation_plots import plot_prediction
from training.flags import Parser, add_processor, add_weights
from training.trained import LoadedModel, find_weights, load_model
from utils import normalize

PREVIEW_PX = 384  # the longer side of an image drawn beside its bars
# Threads that unpack files; each may hold a whole image, of up to a gigabyte for the largest ones allowed.
MAX_READERS = 4


@dataclass(frozen=True, eq=False)
class Prediction:
    """What came of one file: either `error`, or the likeliest `labels` int64 [K] with their `probabilities`
    float32 [K], falling, and its `preview` uint8 [H, W, 3] where one was asked for."""

    path: str
    error: str | None = None
    labels: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    preview: np.ndarray | None = None


def build_parser() -> Parser:
    """The parser of predict.py."""
    parser = Parser(
        prog="predict.py",
        description="Say what is in images, with a network that train.py trained.",
        epilog="Each image is turned upright, put over white where it is transparent, cropped to the largest "
        "square at its centre and resized to 32x32 (antialiased); a 32x32 image is taken as it is.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="an image file; a folder, with all below it; a quoted pattern ('photos/**/*.jpg'); - for "
        "paths on standard input, one a line",
    )
    add_weights(parser, "folder of the runs, where --weights is not given")
    parser.add_argument(
        "--topk", type=whole_number(1), default=5, metavar="K", help="classes an image (default: 5)"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line and image, instead of the table"
    )
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="also draw each image with its bars, as PNG in DIR"
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number(1, 100_000),
        default=128,
        metavar="N",
        help="images held and classified at a time (default: 128)",
    )
    add_processor(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Classify what the arguments name; 1 if anything could not be read, else 0."""
    args = build_parser().parse_args(argv)
    device = choose_device(args.device)
    trained = load_model(args.weights or find_weights(args.output_dir), device)
    if args.topk > len(trained.classes):
        raise UsageError(f"--topk {args.topk}: the network knows {len(trained.classes)} classes")
    set_up_torch(trained.recipe.seed, device, deterministic=False)
    if args.save is not None:
        make_folder(args.save)
    if not args.json:
        say(f"{trained.recipe.model} of {printable(str(trained.path), 300)}, {trained.recipe.data_note}\n")

    images, failed = 0, 0
    with warnings.catch_warnings(), progress_bar(total=count_inputs(args.inputs), unit="image") as bar:
        warnings.simplefilter("ignore")  # Pillow warns of odd tags, matplotlib of letters that its font lacks
        predictions = predict(
            trained,
            find_images(args.inputs, lines_of(sys.stdin)),
            batch_size=args.batch_size,
            topk=args.topk,
            precision=args.precision or trained.recipe.precision,
            preview_px=PREVIEW_PX if args.save is not None else 0,
        )
        for batch in predictions:
            for prediction in batch:
                images += 1
                if prediction.error is not None:
                    failed += 1
                    path = printable(prediction.path, 300)
                    say(f"predict.py: error: {path}: {printable(prediction.error, 300)}\n", sys.stderr)
                    continue
                say(as_json(prediction, trained) if args.json else as_table(prediction, trained))
                if args.save is not None:
                    save_drawing(prediction, trained, args.save, images)
            bar.update(len(batch))
    if not images:
        raise RunError("no image was named: the list on standard input is empty")
    if failed:
        say(f"predict.py: {failed:,} of {images:,} inputs could not be read\n", sys.stderr)
    return 1 if failed else 0


def count_inputs(inputs: list[str]) -> int | None:
    """How many files there are, for the bar; None where only reading standard input could tell, or where
    there is no terminal to show a bar on."""
    if "-" in inputs or sys.stderr is None or not sys.stderr.isatty():
        return None
    return sum(1 for _ in find_images(inputs))


def predict(
    trained: LoadedModel,
    found: Iterable[Found],
    *,
    batch_size: int,
    topk: int = 5,
    precision: str = "fp32",
    preview_px: int = 0,
) -> Iterator[list[Prediction]]:
    """The predictions for `found`, in order, up to `batch_size` at a time.

    No file is looked for or read before its batch is due, so memory does not grow with their number.
    """
    found = iter(found)
    with ThreadPoolExecutor(min(MAX_READERS, usable_cores())) as readers:
        while batch := list(itertools.islice(found, batch_size)):
            pictures = list(readers.map(lambda item: _read(item, preview_px), batch))
            read = [picture for picture in pictures if isinstance(picture, Picture)]
            tops = iter(
                classify(trained, np.stack([p.pixels for p in read]), topk, precision) if read else ()
            )
            yield [
                Prediction(item.path, *((None, *next(tops), p.preview) if isinstance(p, Picture) else (p,)))
                for item, p in zip(batch, pictures, strict=True)
            ]


def _read(item: Found, preview_px: int) -> Picture | str:
    """The picture, or the reason why there is none."""
    if item.error is not None:
        return item.error
    try:
        return read_image(item.path, preview_px)
    except RunError as error:
        return str(error)


def classify(
    trained: LoadedModel, images: np.ndarray, topk: int, precision: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each of `images` (uint8 [N, 32, 32, 3]) the `topk` likeliest labels, int64 [K], and their
    probabilities, float32 [K]; equal ones in the order of their labels.

    Raises:
        RunError: a logit is NaN or infinite: the weights are spoilt.
    """
    logits = compute_logits(trained, images, precision)
    if not bool(torch.isfinite(logits).all()):
        raise RunError(f"{trained.path} gives NaN or infinite logits: its weights are spoilt")
    # on the CPU: the sort there is stable, and topk is not
    probabilities, labels = logits.cpu().softmax(1).sort(dim=1, descending=True, stable=True)
    yield from zip(labels[:, :topk].numpy(), probabilities[:, :topk].numpy(), strict=True)


@torch.inference_mode()
def compute_logits(trained: LoadedModel, images: np.ndarray, precision: str) -> torch.Tensor:
    """Logits float32 [N, classes] of `images` (uint8 [N, 32, 32, 3]), by the way that testing takes.

    With batches of the same size they are the same bits as in testing. With others the processor may add in
    another order, which changes the last bits of float32 (and more with bf16), on some processors.
    """
    device = next(trained.model.parameters()).device
    batch = normalize(torch.from_numpy(images).to(device))
    with autocast(device, precision):
        return trained.model(batch).float()


def as_table(prediction: Prediction, trained: LoadedModel) -> str:
    """The path, and below it a line for each class: rank, probability, class, superclass."""
    lines = [printable(prediction.path, 300)]
    width = max(len(name) for name in trained.classes)
    for rank, (name, superclass, _, probability) in enumerate(_rows(prediction, trained), start=1):
        lines.append(f"{rank:>4}  {100 * probability:6.2f} %  {name:<{width}}  {superclass}")
    return "\n".join(lines) + "\n"


def as_json(prediction: Prediction, trained: LoadedModel) -> str:
    """The prediction as one line of JSON: {"path": ..., "predictions": [{"class", "superclass", "label",
    "probability"}, ...]}, the likeliest class first."""
    keys = ("class", "superclass", "label", "probability")
    rows = [dict(zip(keys, row, strict=True)) for row in _rows(prediction, trained)]
    return json.dumps({"path": prediction.path, "predictions": rows}) + "\n"


def _rows(prediction: Prediction, trained: LoadedModel) -> Iterator[tuple[str, str, int, float]]:
    for label, probability in zip(prediction.labels.tolist(), prediction.probabilities.tolist(), strict=True):
        superclass = trained.superclasses[trained.superclass_of[label]]
        yield trained.classes[label], superclass, label, probability


def save_drawing(prediction: Prediction, trained: LoadedModel, folder: Path, number: int) -> Path:
    """Draw the image with its bars as NUMBER_NAME.png in `folder`: NAME is the file's, and NUMBER, the
    input's from 1, keeps files of one name in several folders apart."""
    name = Path(prediction.path).name
    safe = re.sub(r"[^\w.-]", "_", os.path.splitext(name)[0])[:80]
    return plot_prediction(
        prediction.preview,
        [trained.classes[label] for label in prediction.labels.tolist()],
        prediction.probabilities,
        folder / f"{number:05d}_{safe}.png",
        title=f"{printable(name, 60)} ({trained.recipe.model}, {trained.recipe.data_note})",
    )


def make_folder(folder: Path) -> None:
    """Make `folder` where it is not there yet.

    Raises:
        RunError: it cannot be made; the message says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error.strerror}") from None


def say(text: str, stream: TextIO | Any = None) -> None:
    """Write `text` to standard output, or `stream`, without tearing a bar on the terminal."""
    stream = sys.stdout if stream is None else stream
    if stream is not None:  # None: closed by the shell, >&-
        tqdm.write(text, file=stream, end="")
        stream.flush()


if __name__ == "__main__":
    sys.exit(run_main(main, "predict.py"))
