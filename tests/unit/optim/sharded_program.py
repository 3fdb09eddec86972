"""Started once for each process by test_sharded.py: rank, world size, a folder to meet in. Every difference is an AssertionError."""

import dataclasses as dc
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from txtrain.optim.average import Average
from txtrain.optim.config import AdafactorConfig, AdamConfig, EMAConfig, LionConfig, MuonConfig
from txtrain.optim.groups import parameter_groups, set_rates
from txtrain.registry import make

# 5 rows and 3 experts: no number of processes from 2 to 4 divides both
SHAPES = {"wide.weight": (5, 8), "tall.weight": (9, 3), "experts": (3, 4, 6), "norm.weight": (5,), "embedding.weight": (7, 4), "one.weight": (1, 6)}
OPTIMIZERS = {
    "adamw": AdamConfig(type="adamw", lr=0.1, weight_decay=0.2),
    "lion": LionConfig(type="lion", lr=0.1, weight_decay=0.2),
    "muon": MuonConfig(type="muon", lr=0.1, weight_decay=0.2, ns_dtype="float32"),
    "adafactor": AdafactorConfig(type="adafactor", lr=0.3, weight_decay=0.2),
    "adafactor, momentum": AdafactorConfig(type="adafactor", lr=0.3, beta1=0.9, clip_threshold=0.5),
}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # sums over a parameter are in another order, and vectors begin at other values


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def stepped(config, place):
    parameters = {name: nn.Parameter(place(value)) for name, value in draw(0).items()}
    optimizer = make("optimizer", config, params=parameter_groups(parameters.items(), config))
    for step in range(1, 6):
        for name, grad in draw(step).items():
            parameters[name].grad = place(grad)
        set_rates(optimizer, 1 / step)
        optimizer.step()
    return parameters, optimizer


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()


def check_placements(mesh: DeviceMesh) -> None:
    """Parameters and gradients cut along each dimension, or not at all, make the same steps as whole ones; so does their state."""
    for name, config in OPTIMIZERS.items():
        want, plain = stepped(config, lambda x: x)
        for placement in (Shard(0), Shard(1), Replicate()):

            def place(x, placement=placement):
                return distribute_tensor(x, mesh, [placement if x.ndim > getattr(placement, "dim", -1) else Replicate()])

            got, optimizer = stepped(config, place)
            for key, p in want.items():
                assert got[key].placements == place(p.detach()).placements, (name, placement, key)
                torch.testing.assert_close(whole(got[key]), p.detach(), msg=lambda m, case=(name, placement, key): f"{case}: {m}", **TOLERANCE)
                for part, value in plain.state[p].items():
                    held = optimizer.state[got[key]][part]
                    torch.testing.assert_close(whole(held), value, msg=lambda m, case=(name, placement, key, part): f"{case}: {m}", **TOLERANCE)
                    if value.ndim and value.shape[0] > 1 and placement == Shard(0):
                        split = part != "col" or value.ndim > 1
                        assert (held.to_local().shape[0] < value.shape[0]) == split, f"{name} {key} {part}: cut where the parameter is, else everywhere"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)) for _ in range(2))
        self.head = nn.Linear(6, 11)

    def forward(self, x):
        h = self.embedding(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


def sharded(model: Net, mesh: DeviceMesh) -> None:
    if mesh.ndim == 2:
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fsdp = mesh["fsdp"] if mesh.ndim == 2 else mesh
    for block in model.blocks:
        fully_shard(block, mesh=fsdp)
    fully_shard(model, mesh=fsdp, reshard_after_forward=False)


def trained(config, mesh: DeviceMesh | None, ema: EMAConfig) -> list[float]:
    """Losses of eight steps on batches that all processes share, with a validation in between, and of the last validation."""
    torch.manual_seed(0)
    model = Net()
    if mesh is not None:
        sharded(model, mesh)
    optimizer = make("optimizer", config, params=parameter_groups(model.named_parameters(), config))
    average, losses = Average(model, ema), []

    def loss(step):
        x = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
        return nn.functional.cross_entropy(model(x).flatten(0, 1), (x * 3 + 1).flatten() % 11)

    for step in range(1, 9):
        losses.append(loss(step))
        losses[-1].backward()
        set_rates(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        if step % 3 == 0:
            average.swap_in()
            with torch.no_grad():
                losses.append(loss(100))
            average.swap_out()
            with torch.no_grad():
                losses.append(loss(100))
    return [float(x.detach()) for x in losses]


def check_training(mesh: DeviceMesh) -> None:
    """Under fully_shard, whose root stays gathered after a validation, training and the averaged weights are those of one process."""
    for name, config in OPTIMIZERS.items():
        small = dc.replace(config, lr=0.02)
        for ema in (EMAConfig(), EMAConfig(decay=0.6, every_n_steps=2)):
            want, got = trained(small, None, ema), trained(small, mesh, ema)
            if ema.decay is not None:
                assert want[3] != want[4], "the averaged weights have another loss"
            torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=0, msg=lambda m, case=(name, ema): f"{case}: {m}")


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    check_placements(init_device_mesh("cpu", (world,)))
    check_training(init_device_mesh("cpu", (world,)))
    if world == 4:
        check_training(init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp")))
    dist.destroy_process_group()
    print("equal")
