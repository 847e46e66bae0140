"""Classify images: the most likely classes according to a trained network, for any number of image files.

    python predict.py photo.jpg more/*.png          a table of the five most likely classes of each
    python predict.py --json photos/ > found.jsonl  a folder and all below it, one JSON object per line
    find . -name '*.jpg' | python predict.py -      the files named on standard input, one per line
    python predict.py 'photos/**/*.jpg' --save out  a pattern; each image with its bars, as PNG in out/

The results go to standard output, image by image; errors and the progress bar go to standard error. A file
that cannot be read is reported, the others are classified all the same, and the exit code is 1.
"""

import functools
import glob
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
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from core.cli import LOG, Parser, add_processor, add_weights, progress_bar, run_main, start_log, whole_number
from core.errors import RunError, UsageError, printable
from core.machine import autocast, choose_device, set_up_torch, usable_cores
from inspection.evaluation_plots import prediction_figure
from inspection.style import write_png
from training.checkpoint import LoadedModel, find_weights, load_model
from utils import normalize

SIZE = 32  # pixels, side of the square that the network takes
PREVIEW_PX = 384  # the longer side of an image drawn beside its bars
# Threads that decode files; each may hold a whole image, up to a gigabyte for the largest ones allowed.
MAX_READERS = 4
# Pillow reads more, but some of those start other programs (EPS), and photographs come in none of them.
# Formats that this build of Pillow lacks are left out.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI")
FORMATS += ("TGA", "TIFF", "WEBP")
# Pillow's limit against decompression bombs: a quarter of a gigabyte of RGB. Pillow itself only warns there,
# and refuses twice as many. Here it holds for the decoded size: JPEG files are decoded at a reduced one.
MAX_PIXELS = 89_478_485
# A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster, as long as its sides
# stay this many times those of the result: the rest of the reduction is still antialiased.
DRAFT_MARGIN = 4


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
        "square at its centre and resized to 32x32 (antialiased); a 32x32 image is used as it is.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    text = "an image file; a folder, with all below it; a quoted pattern ('photos/**/*.jpg'); - for paths on "
    flag("inputs", nargs="+", metavar="INPUT", help=f"{text}standard input, one per line")
    add_weights(parser, "folder of the runs, where --weights is not given")
    flag("--topk", type=whole_number(1), default=5, metavar="K", help="classes per image (default: 5)")
    flag("--json", action="store_true", help="print one JSON object per line and image instead of the table")
    flag("--save", type=Path, metavar="DIR", help="also draw each image with its bars, as PNG in DIR")
    text = "images per batch (default: 128)"
    flag("--batch-size", type=whole_number(1, 100_000), default=128, metavar="N", help=text)
    add_processor(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Classify the images that the arguments name; 1 if any could not be read, else 0."""
    args = build_parser().parse_args(argv)
    device = choose_device(args.device)
    trained = load_model(args.weights or find_weights(args.output_dir), device, args.model)
    if args.topk > len(trained.classes):
        raise UsageError(f"--topk {args.topk}: the network has {len(trained.classes)} classes")
    set_up_torch(trained.recipe.seed, device, deterministic=False)
    if args.save is not None:
        try:
            args.save.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder {args.save}: {error.strerror}") from None
    start_log(None)
    if not args.json:
        path = printable(trained.path, 300)
        trained_on = f", trained on {trained.trained_on}" if trained.trained_on else ""
        LOG.info(f"{trained.recipe.model} from {path}{trained_on}")

    number, failed, width = 0, 0, max(map(len, trained.classes))
    with warnings.catch_warnings(), progress_bar(unit="image") as bar:
        if not bar.disable and "-" not in args.inputs:  # standard input can be read only once
            bar.reset(total=sum(1 for _ in find_images(args.inputs)))
        warnings.simplefilter("ignore")  # Pillow warns of odd tags, matplotlib of letters that its font lacks
        results = predict(
            trained,
            find_images(args.inputs),
            batch_size=args.batch_size,
            topk=args.topk,
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
                    save_drawing(result, trained, args.save, number)
            bar.update()
    if not number:
        raise RunError("no image was named: the list on standard input is empty")
    if failed:
        report(f"{failed:,} of {number:,} inputs could not be read")
    return 1 if failed else 0


def report(message: str) -> None:
    """Write `message` to standard error, unless the shell closed it, without tearing the progress bar."""
    if sys.stderr is not None:
        tqdm.write(f"predict.py: {message}", file=sys.stderr)


def find_images(arguments: Iterable[str]) -> Iterator[Result]:
    """The files that the arguments mean, in order, each found only when it is asked for.

    An argument is a file of any name; a folder, for all files in it and below it that have the extension of
    an image (hidden ones and links to folders left out), sorted by name; a pattern with *, ? or [...] (** for
    folders of any depth), unless a file has that very name, for the files that match; or "-" for the files
    and folders named on standard input, one per line. Where there is nothing, a Result with an error says so.

    Raises:
        RunError: standard input is closed or cannot be read.
    """
    for argument in arguments:
        if argument == "-":
            for name in filter(None, _lines_of_stdin()):
                yield from _file_or_folder(name)
        elif not os.path.lexists(argument) and glob.has_magic(argument):
            names = sorted(filter(os.path.isfile, glob.iglob(argument, recursive=True)))
            yield from map(Result, names)
            if not names:
                yield Result(argument, "no file matches this pattern")
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
    for here, folders, files in os.walk(name, onerror=problems.append):
        # macOS leaves ._photo.jpg beside photo.jpg on foreign disks
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in _formats():
                found = True
                yield Result(os.path.join(here, file))
    for problem in problems:
        yield Result(problem.filename, problem.strerror or str(problem))
    if not found and not problems:
        yield Result(name, "no image files in this folder")


@functools.cache
def _formats() -> dict[str, str]:
    """From extension (.jpg) to format, for those of FORMATS that this build of Pillow reads."""
    extensions = Image.registered_extensions()
    return {key: name for key, name in extensions.items() if name in FORMATS and name in Image.OPEN}


def read_image(path: str, preview_px: int = 0) -> Result:
    """The image file at `path`, upright, with transparent parts over white: the square at its centre as
    `pixels`, and with `preview_px` the whole image as `preview`, at most that high and wide.

    White, since browsers and viewers show it behind transparent parts. The largest square at the centre is
    resized by Pillow's bicubic filter: it averages all pixels that fall into one of the result, so it
    antialiases at every ratio (the box filter does so for whole ratios only, Lanczos draws halos), and it
    enlarges smoothly too. A 32x32 image is unchanged. Of 16-bit grey levels the high byte is used, as Pillow
    does with 16-bit colour; of an animation the first frame. Colour profiles are not applied.
    """
    if not os.path.isfile(path):  # reading a pipe or a device might never end
        return Result(path, "not a regular file" if os.path.lexists(path) else "no such file")
    try:
        with Image.open(path, formats=tuple(dict.fromkeys(_formats().values()))) as image:
            return Result(path, None, *_pixels_and_preview(image, preview_px))
    except RunError as error:
        reason = str(error)
    except Image.UnidentifiedImageError:
        reason = "not an image that can be read (JPEG, PNG, WebP, TIFF, BMP, GIF, ...)"
    except Image.DecompressionBombError:
        reason = f"more than {2 * MAX_PIXELS // 10**6} million pixels: refused"
    except MemoryError:
        reason = "too large for the available memory"
    except Exception as error:  # Pillow's readers raise many types on a damaged file
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        reason = f"cannot be read: {reason}"
    return Result(path, reason)


def _pixels_and_preview(image: Image.Image, preview_px: int) -> tuple[np.ndarray, np.ndarray | None]:
    side = max(DRAFT_MARGIN * SIZE, preview_px)
    image.draft(None, (side, side))  # has an effect on JPEG alone
    if image.width * image.height > MAX_PIXELS:
        raise RunError(f"more than {MAX_PIXELS // 10**6} million pixels: refused")
    ImageOps.exif_transpose(image, in_place=True)
    upright = _to_rgb(image)
    width, height = upright.size
    left, top = max(width - height, 0) / 2, max(height - width, 0) / 2
    box = (left, top, width - left, height - top)
    # reducing_gap: first by whole factors to 3 times the size, then the filter; faster, and looks the same
    square = upright.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    if not preview_px:
        return np.array(square), None
    upright.thumbnail((preview_px, preview_px), Image.Resampling.BICUBIC)
    return np.array(square), np.array(upright)


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, transparent parts over white.

    Raises:
        RunError: its levels are floating-point numbers in no range that images have.
    """
    if image.mode.startswith("I"):  # Pillow's modes I;16, I;16B, ..., and I for the same in older versions
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.mode == "F":
        levels = np.asarray(image)
        if not (levels.min() >= 0 and levels.max() <= 255):  # nor with NaN
            raise RunError("floating-point levels outside 0 to 1 and 0 to 255")
        scale = 255 if levels.max() <= 1 else 1
        image = Image.fromarray(np.rint(levels * scale).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    background = Image.new("RGB", layer.size, "white")
    background.paste(layer, mask=layer.getchannel("A"))
    return background


def predict(
    trained: LoadedModel,
    found: Iterable[Result],
    *,
    batch_size: int,
    topk: int = 5,
    precision: str = "fp32",
    preview_px: int = 0,
) -> Iterator[Result]:
    """The results for `found`, in order, read and classified `batch_size` at a time.

    No file is looked for or read before its batch is due, so memory does not grow with their number.
    """
    found = iter(found)
    with ThreadPoolExecutor(min(MAX_READERS, usable_cores())) as readers:
        while batch := list(itertools.islice(found, batch_size)):
            batch = list(readers.map(lambda x: x if x.error else read_image(x.path, preview_px), batch))
            if images := [result for result in batch if result.error is None]:
                pixels = np.stack([result.pixels for result in images])
                labels, probabilities = classify(trained, pixels, topk, precision)
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
    trained: LoadedModel, images: np.ndarray, topk: int, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `topk` most likely labels, int64 [N, K], of `images` (uint8 [N, 32, 32, 3]) and their
    probabilities, float32 [N, K], descending; equal ones in the order of their labels.

    Computed as in testing: with batches of the same size the logits equal those of testing bit for bit. With
    others, some processors add in another order, which changes the last bits of float32 (more with bf16).

    Raises:
        RunError: a logit is NaN or infinite: the weights are corrupt.
    """
    device = next(trained.model.parameters()).device
    batch = normalize(torch.from_numpy(images).to(device))
    with autocast(device, precision):
        logits = trained.model(batch).float().cpu()
    if not logits.isfinite().all():
        raise RunError(f"{trained.path} gives NaN or infinite logits: its weights are corrupt")
    # on the CPU: the sort there is stable, and topk is not
    probabilities, labels = logits.softmax(1).sort(dim=1, descending=True, stable=True)
    return labels[:, :topk], probabilities[:, :topk]


def as_table(result: Result, width: int) -> str:
    """The path, and a line for each class: rank, probability, class (`width` columns), superclass."""
    lines = [printable(result.path, 300)]
    for rank, row in enumerate(result.predictions, start=1):
        percent = 100 * row["probability"]
        lines.append(f"{rank:>4}  {percent:6.2f} %  {row['class']:<{width}}  {row['superclass']}")
    return "\n".join(lines)


def save_drawing(result: Result, trained: LoadedModel, folder: Path, number: int) -> Path:
    """Draw the image with its bars as NUMBER_NAME.png in `folder`: NAME is the file's, and NUMBER, counted
    from 1 over all inputs, distinguishes files of one name in several folders."""
    name = Path(result.path).name
    safe = re.sub(r"[^\w.-]", "_", os.path.splitext(name)[0])[:80]
    names, values = zip(*((row["class"], row["probability"]) for row in result.predictions), strict=True)
    network = ", ".join(filter(None, (trained.recipe.model, trained.trained_on)))
    title = f"{printable(name, 60)} ({network})"
    figure = prediction_figure(result.preview, names, values, title)
    return write_png(figure, folder / f"{number:05d}_{safe}.png")


if __name__ == "__main__":
    sys.exit(run_main(main, "predict.py"))
