"""A short seeded training whose losses are kept in expected/loss_curve.json: what changes them shows.

`python tests/helpers/loss_curve.py` rewrites that file; say in the commit what moved the losses.
"""

import itertools
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STORED = REPOSITORY / "tests" / "expected" / "loss_curve.json"
STEPS = 20


def loss_curve() -> list[float]:
    """The mean loss, in nats an image, of each of the first 20 steps of ResNet-20 on drawn images, on one
    CPU thread: the real loader and training step, at a rate that keeps rounding small."""
    from cifar.dataset import Split
    from cifar.synthetic import CLASSES, draw_class
    from model import build_model
    from training.engine import TrainStep
    from training.recipe import Recipe
    from utils import make_train_loader

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images = np.concatenate([draw_class(label, 3, 0) for label in range(len(CLASSES))])
        split = Split(images, np.repeat(np.arange(len(CLASSES), dtype=np.int64), 3))
        recipe = Recipe(model="resnet20", batch_size=16, lr=0.01)
        model = build_model(recipe.model).to(memory_format=torch.channels_last).train()
        draw_weights(model)
        # OpenCV's versions warp differently: the images as they are, in the loader's order
        loader = make_train_loader(split, batch_size=recipe.batch_size, seed=recipe.seed, augment="none")
        optimizer = recipe.build_optimizer(model)
        scheduler = recipe.build_scheduler(optimizer, len(loader))
        step = TrainStep(model, recipe.build_criterion(), optimizer, scheduler)

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for epoch in itertools.count(1):
                loader.batch_sampler.set_epoch(epoch)
                yield from loader

        return [step(*batch)[0].item() / len(batch[1]) for batch in itertools.islice(batches(), STEPS)]
    finally:
        torch.set_num_threads(threads)


def draw_weights(model: torch.nn.Module) -> None:
    """Weights as `build_model` draws them, but by NumPy: torch's differ between its versions."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                fan_out = weight.numel() / weight.shape[1]
                std = (2 / fan_out) ** 0.5 if weight.ndim == 4 else 0.01
                drawn = rng.standard_normal(tuple(weight.shape)) * std
                weight.copy_(torch.from_numpy(drawn))
            elif weight.shape[0] == 100:  # the last layer's bias
                weight.zero_()


def conditions() -> dict[str, str]:
    """What may change the last bits of a loss: versions, and the processor and its instructions."""
    from core.machine import versions

    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    processor = info.get("model name") or platform.processor() or platform.machine()
    flags = info.get("flags") or info.get("Features", "")
    wanted = ("avx", "fma", "amx", "asimd", "sve", "bf16")
    vector = " ".join(sorted(flag for flag in flags.split() if flag.startswith(wanted)))
    capability = torch.backends.cpu.get_cpu_capability()
    return {**versions(), "processor": processor, "vector_flags": vector, "torch_capability": capability}


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(json.dumps({"conditions": conditions(), "losses": loss_curve()}, indent=1) + "\n")
    print(f"wrote {STORED}")
