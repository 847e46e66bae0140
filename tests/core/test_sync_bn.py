"""BatchNorm over two gloo processes against torch's BatchNorm2d on the whole batch in one."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from core import sync_bn

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# Each of two processes puts its part of one batch through its own copy of a small network.
WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from core import sync_bn

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
task = torch.load(f"{folder}/task.pt", weights_only=False)
network = sync_bn.convert(task["network"])
images = task["images"].split([5, 2])[rank].to(memory_format=torch.channels_last).requires_grad_()
out = network(images)
(out * task["weights"].split([5, 2])[rank]).sum().backward()
grads = [p.grad for p in network.parameters()]
for grad in grads:
    dist.all_reduce(grad)
half_network = sync_bn.convert(torch.load(f"{folder}/task.pt", weights_only=False)["network"]).float()
with torch.autocast("cpu", dtype=torch.bfloat16):
    half_out = half_network(images.detach().float())
half_out.float().pow(2).sum().backward()
torch.save({"half_out": half_out.detach(), "half_grads": [p.grad for p in half_network.parameters()],
            "out": out.detach(), "image_grad": images.grad, "grads": grads,
            "state": network.state_dict()}, f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


def in_two_processes(folder: Path, task: dict) -> list[dict]:
    """What WORKER saves on each of the two ranks."""
    torch.save(task, folder / "task.pt")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(folder)], env=environment, cwd=folder)
        for rank in (0, 1)
    ]
    try:
        codes = [worker.wait(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_two_uneven_parts_give_what_the_whole_batch_gives(tmp_path: Path) -> None:
    network = small_network().double()
    torch.manual_seed(1)
    images = torch.randn(7, 3, 8, 8).double() * 2 + 5
    weights = torch.randn(7, 4, 4, 4).double()
    parts = in_two_processes(tmp_path, {"network": network, "images": images, "weights": weights})

    whole = images.clone().requires_grad_()
    out = network(whole)
    (out * weights).sum().backward()
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.cat([part["out"] for part in parts]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([part["image_grad"] for part in parts]), whole.grad, **close)
    for part in parts:
        for grad, parameter in zip(part["grads"], network.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad, **close)
        assert list(part["state"]) == list(network.state_dict())
        for name, value in network.state_dict().items():
            torch.testing.assert_close(part["state"][name], value, **close)
        # under bf16 autocast the statistics stay float32 and near those of the float32 pass
        assert part["half_out"].dtype == torch.bfloat16
        assert all(torch.isfinite(grad).all() for grad in part["half_grads"])
    half = torch.cat([part["half_out"] for part in parts]).double()
    assert (half - out.detach()).abs().mean() < 0.02


def test_converting_keeps_the_very_tensors_and_the_state_dict() -> None:
    network = small_network().eval()
    before = network.state_dict()
    parameters = [id(parameter) for parameter in network.parameters()]
    converted = sync_bn.convert(network)
    assert converted is network
    assert sum(isinstance(module, sync_bn.SyncBatchNorm2d) for module in network.modules()) == 2
    assert [id(parameter) for parameter in network.parameters()] == parameters
    assert not any(module.training for module in network.modules())
    assert list(network.state_dict()) == list(before)


def test_alone_it_is_batch_norm() -> None:
    one, two = small_network(), sync_bn.convert(small_network())
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(one(images), two(images))
    assert torch.equal(one.eval()(images), two.eval()(images))
