"""Two ranks without --sync-bn: the same weights and averaged network on both, and exact resume."""

import datetime
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import train
from cifar.dataset import Split
from core import distributed
from core.cli import Interrupts
from helpers.small_net import CLASSES, small_net
from training.engine import TrainStep, evaluate
from training.recipe import Recipe
from training.run import Interrupted, Run, RunFiles, SavedRun
from training.techniques import bn_update_batches, build_techniques
from utils import make_test_batches, make_train_loader

CASES = {
    "ema": {"ema_decay": 0.9},
    "swa": {"swa_start": 2},
    "sam": {"sam": "sam"},
    "mixing": {"mix": "both", "ema_decay": 0.9},
}
STOP = (3, 2)  # the interrupted runs stop after this epoch's batch of that number
PATIENCE = datetime.timedelta(minutes=4)


def images_of(count: int, seed: int) -> Split:
    """Random images, brighter for higher labels, so that there is something to learn."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, CLASSES, count)
    images = draws.integers(0, 100, (count, 32, 32, 3)) + 15 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels)


TEST = images_of(51, seed=1)


def train_on_this_rank(folder: Path, recipe: Recipe, stop: bool = False, resume: bool = False) -> Run:
    """Train as train.py does on this rank's part of the images; with `stop`, to STOP alone."""
    model = small_net()
    split = images_of(84, seed=0)  # batches of 16: the last one has 4 images
    loader = make_train_loader(
        split,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        augment="none",
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    optimizer = recipe.build_optimizer(model)
    step = TrainStep(
        model,
        recipe.build_criterion(),
        optimizer,
        recipe.build_scheduler(optimizer, len(loader)),
        techniques=build_techniques(
            recipe,
            model,
            classes=CLASSES,
            batches_per_epoch=len(loader),
            bn_batches=bn_update_batches(split, recipe, torch.device("cpu")),
        ),
    )
    folder.mkdir(exist_ok=True)
    files = RunFiles(folder, "run")
    run = Run(files, recipe, step, batches_per_epoch=len(loader), interrupts=Interrupts(), resume_command="")
    if resume:
        run.restore(SavedRun.load(None, files))

    def after_batch(number: int) -> None:
        run.batches_done = number
        if stop and (run.epoch, number) == STOP:
            run.save()
            raise Interrupted

    run.after_train_batch = after_batch
    batches = make_test_batches(train.rank_shard(TEST), recipe.test_batch_size, "cpu")
    train.plot_curves = lambda run: None
    train.train_epochs(run, loader, batches, board=None)
    return run


def train_case(rank: int, folder: Path, fields: dict[str, object]) -> None:
    """One of the two processes: train unbroken, and stopped and resumed; store what came of both."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    distributed._enabled = True  # enable() asks for an address, which a rendezvous by file has not
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=PATIENCE)
    recipe = Recipe(batch_size=16, epochs=4, lr=0.05, **fields)
    unbroken = train_on_this_rank(folder / "unbroken", recipe)
    with pytest.raises(Interrupted):
        train_on_this_rank(folder / "resumed", recipe, stop=True)
    dist.barrier()  # rank 1 must not read before rank 0 has written
    resumed = train_on_this_rank(folder / "resumed", recipe, resume=True)
    found = [
        {
            "weights": run.model.state_dict(),
            "kept": run.eval_model.state_dict(),
            "best": run.best["model"],
            "history": run.history,
        }
        for run in (unbroken, resumed)
    ]
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def assert_same(ours: dict, theirs: dict) -> None:
    """Both hold the same networks bit for bit, and the same history."""
    assert ours["history"] == theirs["history"]
    for kind in ("weights", "kept", "best"):
        assert list(ours[kind]) == list(theirs[kind])
        for name, value in ours[kind].items():
            assert torch.equal(value, theirs[kind][name]), f"{kind}: {name}"


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_have_one_network_and_resume_exactly(case: str, tmp_path: Path) -> None:
    mp.spawn(train_case, args=(tmp_path, CASES[case]), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    unbroken, resumed = first
    assert_same(unbroken, second[0])
    assert_same(unbroken, resumed)
    assert_same(unbroken, second[1])

    model = small_net()
    start = model[4].weight.clone()
    model.load_state_dict(unbroken["kept"])
    assert (model[4].weight - start).abs().max() > 1e-3  # it did train
    alone = evaluate(model, make_test_batches(TEST, 5000, "cpu"))
    row, prefix = unbroken["history"][-1], "" if case == "sam" else "ema_"
    assert alone.images == len(TEST)
    assert row[f"{prefix}test_loss"] == pytest.approx(alone.loss, rel=1e-6)
    assert row[f"{prefix}test_acc_percent"] == pytest.approx(alone.accuracy_percent)
