"""Classify images: the most likely classes according to a trained network, for any number of image files.

    python predict.py photo.jpg more/*.png          a table of the five most likely classes of each
    python predict.py --json photos/ > found.jsonl  a folder and all below it, one JSON object per line
    find . -name '*.jpg' | python predict.py -      the files named on standard input, one per line
    python predict.py 'photos/**/*.jpg' --save out  a pattern; each image with its bars, as PNG in out/

The results go to standard output, image by image; errors and the progress bar go to standard error. A file
that cannot be read is reported, the others are classified all the same, and the exit code is 1.
"""

import glob
import itertools
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import core  # noqa: F401 (before torch: it sets up torch's threads)

# isort: split
import numpy as np
import torch
from tqdm import tqdm

from core.cli import LOG, Parser, add_processor, add_weights, progress_bar, run_main, start_log, whole_number
from core.errors import RunError, UsageError, printable
from core.machine import autocast, choose_device, report_out_of_memory, set_up_torch, usable_cores
from inspection.evaluation_plots import prediction_figure
from inspection.images import OTHER_EXTENSIONS, image_formats, read_image
from inspection.inference import VIEWS, mean_probabilities, shifted
from inspection.style import write_png
from training.checkpoint import LoadedModel, find_weights, load_model
from utils import normalize

PREVIEW_PX = 384  # the longer side of an image drawn beside its bars
# Threads that decode files; each may hold a whole image, up to a gigabyte for the largest ones allowed.
MAX_READERS = 4


@dataclass(eq=False)
class Result:
    """Result for one file: its `error`, or the fields below it, as far as they are known yet.

    `pixels` is the uint8 RGB [32, 32, 3] that the network takes; `preview` the whole image for people, uint8
    [H, W, 3], if asked for; `predictions` has the keys "class", "superclass", "label" and "probability" for
    each of the K most likely classes, the most likely first.
    """

    path: str
    error: str | None = None
    pixels: np.ndarray | None = None
    preview: np.ndarray | None = None
    predictions: list[dict[str, Any]] | None = None


def build_parser() -> Parser:
    """The parser of predict.py."""
    parser = Parser(
        prog="predict.py",
        description="Classify images with a network that train.py trained.",
        epilog="Each image is turned upright, put over white where it is transparent, cropped to the largest "
        "square at its centre and resized to 32x32 (antialiased); a 32x32 image is used as it is. White is "
        "the largest level of the file's bits. 16-bit levels all below 16384 may be those of a camera with "
        "12 or 14 bits: they are refused, unless a PNG file says so (sBIT). Signed, 32-bit and "
        "floating-point levels are taken to lie between 0 and 255, or floating-point ones between 0 and 1, "
        "and refused if they do not, or reach less than a quarter of that.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    text = "an image file; a folder, with all below it; a quoted pattern ('photos/**/*.jpg'); - for paths on "
    flag("inputs", nargs="+", metavar="INPUT", help=f"{text}standard input, one per line")
    add_weights(parser, "folder of the runs, where --weights is not given")
    flag("--topk", type=whole_number(1), default=5, metavar="K", help="classes per image (default: 5)")
    flag("--json", action="store_true", help="print one JSON object per line and image instead of the table")
    text = "also draw each image with its bars, as PNG in DIR; replaces earlier drawings, never an input"
    flag("--save", type=Path, metavar="DIR", help=text)
    text = f"average the probabilities over {len(VIEWS)} views of each image, as evaluate.py --tta does: "
    text += f"shifted by a pixel in four directions or not, mirrored or not ({len(VIEWS)} times the work)"
    flag("--tta", action="store_true", help=text)
    text = "images per batch (default: 128)"
    flag("--batch-size", type=whole_number(1, 100_000), default=128, metavar="N", help=text)
    add_processor(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Classify the images that the arguments name; 1 if any could not be read or drawn, else 0."""
    args = build_parser().parse_args(argv)
    device = choose_device(args.device)
    trained = load_model(args.weights or find_weights(args.output_dir), device, args.model)
    if args.topk > len(trained.classes):
        raise UsageError(f"--topk {args.topk}: the network has {len(trained.classes)} classes")
    set_up_torch(trained.recipe.seed, device, deterministic=False)
    protected = set()
    if args.save is not None:
        protected = prepare_folder(args.save, [*args.inputs, str(trained.path)])
    start_log(None)
    if not args.json:
        path = printable(trained.path, 300)
        trained_on = f", trained on {trained.trained_on}" if trained.trained_on else ""
        LOG.info(f"{trained.recipe.model} from {path}{trained_on}")

    number, failed, not_drawn, width = 0, 0, 0, max(map(len, trained.classes))
    with warnings.catch_warnings(), progress_bar(unit="image") as bar:
        if not bar.disable and "-" not in args.inputs:  # standard input can be read only once
            bar.reset(total=sum(1 for _ in find_images(args.inputs)))
        warnings.simplefilter("ignore")  # Pillow warns of odd tags, matplotlib of letters that its font lacks
        results = predict(
            trained,
            find_images(args.inputs),
            batch_size=args.batch_size,
            topk=args.topk,
            tta=args.tta,
            precision=args.precision or trained.recipe.precision,
            preview_px=PREVIEW_PX if args.save is not None else 0,
        )
        for number, result in enumerate(results, start=1):
            if result.error is not None:
                failed += 1
                report(f"error: {printable(result.path, 300)}: {printable(result.error, 300)}")
            else:
                as_json = {"path": result.path, "predictions": result.predictions}
                LOG.info(json.dumps(as_json) if args.json else as_table(result, width))
                if args.save is not None:
                    try:
                        save_drawing(result, trained, args.save, number, protected)
                    except RunError as error:
                        not_drawn += 1
                        report(f"error: {printable(error, 600)}")
            bar.update()
    if not number:
        raise RunError("no image was named: the list on standard input is empty")
    if failed:
        report(f"{failed:,} of {number:,} inputs could not be read")
    if not_drawn:
        report(f"{not_drawn:,} of {number - failed:,} drawings could not be written")
    return 1 if failed or not_drawn else 0


def report(message: str) -> None:
    """Write `message` to standard error, unless the shell closed it, without tearing the progress bar."""
    if sys.stderr is not None:
        tqdm.write(f"predict.py: {message}", file=sys.stderr)


def find_images(arguments: Iterable[str]) -> Iterator[Result]:
    """The files that the arguments mean, in order, each found only when it is asked for.

    An argument is a file of any name; a folder, for all files in it and below it that have the extension of
    an image, also one that cannot be read (hidden ones and links to folders left out), sorted by name; a
    pattern with *, ? or [...] (** for folders of any depth), unless a file has that very name, for the files
    that match; or "-" for the files and folders named on standard input, one per line. Where there is
    nothing, a Result with an error says so.

    Raises:
        RunError: standard input is closed or cannot be read.
    """
    for argument in arguments:
        if argument == "-":
            for name in filter(None, _lines_of_stdin()):
                yield from _file_or_folder(name)
        elif not os.path.lexists(argument) and glob.has_magic(argument):
            names = sorted(itertools.filterfalse(os.path.isdir, glob.iglob(argument, recursive=True)))
            yield from map(Result, names)
            if not names:
                start = os.path.dirname(re.split(r"[*?[]", argument, maxsplit=1)[0]) or "."
                denied = os.path.isdir(start) and not os.access(start, os.R_OK | os.X_OK)
                yield Result(argument, "permission denied" if denied else "no file matches this pattern")
        else:
            yield from _file_or_folder(argument)


def _lines_of_stdin() -> Iterator[str]:
    """The lines of standard input, decoded like the paths of the file system: a path need not be text."""
    if sys.stdin is None:
        raise RunError("'-' reads paths from standard input, which is closed")
    try:
        for line in iter(lambda: sys.stdin.buffer.readline(65_536), b""):  # no path is longer
            yield os.fsdecode(line.rstrip(b"\r\n"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read paths from standard input: {error}") from None


def _file_or_folder(name: str) -> Iterator[Result]:
    if not os.path.isdir(name):
        yield Result(name)
        return
    found, problems = False, []
    extensions = image_formats().keys() | OTHER_EXTENSIONS
    for here, folders, files in os.walk(name, onerror=problems.append):
        # macOS leaves ._photo.jpg beside photo.jpg on foreign disks
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in extensions:
                found = True
                yield Result(os.path.join(here, file))
    for problem in problems:
        yield Result(problem.filename, problem.strerror or str(problem))
    if not found and not problems:
        yield Result(name, "no image files in this folder")


def prepare_folder(folder: Path, arguments: Iterable[str]) -> set[tuple[int, int]]:
    """Create the folder of the drawings and check that files can be written there.

    Returns:
        The files in it that the arguments mean and that no drawing may replace, by device and inode; all of
        them where the inputs are listed on standard input, which can be read only once.

    Raises:
        RunError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        files = {_identity(path) for path in folder.iterdir()} - {None}
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}, or write there: {error.strerror}") from None
    if files and "-" not in arguments:
        files.intersection_update(_identity(found.path) for found in find_images(arguments))
    return files


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def read(found: Result, preview_px: int) -> Result:
    """`found` with the pixels of its file, and its preview if `preview_px` is not 0; or with the error."""
    if found.error is None:
        try:
            found.pixels, found.preview = read_image(found.path, preview_px)
        except RunError as error:
            found.error = str(error)
    return found


def predict(
    trained: LoadedModel,
    found: Iterable[Result],
    *,
    batch_size: int,
    topk: int = 5,
    tta: bool = False,
    precision: str = "fp32",
    preview_px: int = 0,
) -> Iterator[Result]:
    """The results for `found`, in order, read and classified `batch_size` at a time.

    No file is looked for or read before its batch is due, so memory does not grow with their number.
    """
    found = iter(found)
    with ThreadPoolExecutor(min(MAX_READERS, usable_cores())) as readers:
        while batch := list(itertools.islice(found, batch_size)):
            batch = list(readers.map(read, batch, itertools.repeat(preview_px)))
            if images := [result for result in batch if result.error is None]:
                pixels = np.stack([result.pixels for result in images])
                labels, probabilities = classify(trained, pixels, topk, precision, tta)
                for result, *top in zip(images, labels.tolist(), probabilities.tolist(), strict=True):
                    result.predictions = [
                        {
                            "class": trained.classes[label],
                            "superclass": trained.superclasses[trained.superclass_of[label]],
                            "label": label,
                            "probability": probability,
                        }
                        for label, probability in zip(*top, strict=True)
                    ]
            yield from batch


@torch.inference_mode()
def classify(
    trained: LoadedModel, images: np.ndarray, topk: int, precision: str, tta: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `topk` most likely labels, int64 [N, K], of `images` (uint8 [N, 32, 32, 3]) and their
    probabilities, float32 [N, K], descending; equal ones in the order of their labels.

    Computed as in testing: with batches of the same size the logits equal those of testing bit for bit. With
    others, some processors add in another order, which changes the last bits of float32 (more with bf16).
    With `tta`, the probabilities are averaged over views of each image, as those of `evaluate.py --tta` are.

    Raises:
        RunError: a logit is NaN or infinite: the weights are corrupt; or out of memory.
    """
    device = next(trained.model.parameters()).device

    def logits_of(batch: torch.Tensor) -> torch.Tensor:
        with autocast(device, precision):
            logits = trained.model(batch).float().cpu()
        if not logits.isfinite().all():
            raise RunError(f"{trained.path} gives NaN or infinite logits: its weights are corrupt")
        return logits

    with report_out_of_memory("pass a smaller --batch-size"):
        batch = normalize(torch.from_numpy(images).to(device))
        if tta:
            mean = mean_probabilities(logits_of(shifted(batch, *view)) for view in VIEWS).float()
        else:
            mean = logits_of(batch).softmax(1)
    # on the CPU: the sort there is stable, and topk is not
    probabilities, labels = mean.sort(dim=1, descending=True, stable=True)
    return labels[:, :topk], probabilities[:, :topk]


def as_table(result: Result, width: int) -> str:
    """The path, and a line for each class: rank, probability, class (`width` columns), superclass."""
    lines = [printable(result.path, 300)]
    for rank, row in enumerate(result.predictions, start=1):
        percent = 100 * row["probability"]
        lines.append(f"{rank:>4}  {percent:6.2f} %  {row['class']:<{width}}  {row['superclass']}")
    return "\n".join(lines)


def save_drawing(
    result: Result, trained: LoadedModel, folder: Path, number: int, protected: Container[tuple[int, int]]
) -> Path:
    """Draw the image with its bars as NUMBER_NAME.png in `folder`: NAME is the file's, and NUMBER, counted
    from 1 over all inputs, distinguishes files of one name in several folders.

    Raises:
        RunError: it cannot be written, or would replace one of the files `protected` (`prepare_folder`).
    """
    name = Path(result.path).name
    safe = re.sub(r"[^\w.-]", "_", os.path.splitext(name)[0])
    # in bytes, which file systems count: at most 255, some 143, with what is added here and while writing
    safe = safe.encode()[:100].decode(errors="ignore")
    path = folder / f"{number:05d}_{safe}.png"
    if _identity(path) in protected:
        raise RunError(f"{path} exists and is, or may be, an input: no drawing replaces it, see --save")
    names, values = zip(*((row["class"], row["probability"]) for row in result.predictions), strict=True)
    network = ", ".join(filter(None, (trained.recipe.model, trained.trained_on)))
    title = f"{printable(name, 60)} ({network})"
    figure = prediction_figure(result.preview, names, values, title)
    return write_png(figure, path)


if __name__ == "__main__":
    sys.exit(run_main(main, "predict.py"))
