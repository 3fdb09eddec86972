"""One process of the groups that test_experts.py starts: what the exchange of rows must do, then runs. `python -m tests.distributed.expert_cases FILE`

FILE is JSON: {"properties": bool, "starts": [overrides, ...], "counted": [overrides, ...], "cases": {name: {"overrides": [...], "callbacks": [...]}}}.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import txtrain
from tests.distributed.callbacks import named
from tests.distributed.group import as_worker
from txtrain import compose
from txtrain.model.build import build_model
from txtrain.model.ffn.moe import Experts
from txtrain.parallel.build import make_parallel
from txtrain.parallel.expert_parallel import Exchange, by_expert
from txtrain.parallel.gradient_buckets import local
from txtrain.parallel.one_process import whole
from txtrain.planning.memory.count import memory
from txtrain.training.batches import seed_everything
from txtrain.training.models_read import described
from txtrain.training.module import LitModule

D, F = 6, 10


def drawn(generator: torch.Generator, n_experts: int, n_rows: int) -> Tensor:
    """How many rows each expert gets: some none."""
    chosen = torch.randint(0, n_experts, (n_rows,), generator=generator)
    closed = torch.randint(0, n_experts, (), generator=generator)
    return torch.bincount(chosen[chosen != closed], minlength=n_experts)


def inputs(seed: int, rank: int, n_experts: int) -> tuple[Tensor, Tensor]:
    """Of one process: rows, and counts. In every third draw all visit the first process' experts, in every seventh nobody visits any."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    counts_E = drawn(generator, n_experts, int(torch.randint(0, 30, (), generator=generator)))
    counts_E[n_experts // 2 :] *= int(seed % 3 > 0)
    counts_E *= int(seed % 7 > 0)
    return torch.randn(int(counts_E.sum()), D, generator=generator, dtype=torch.float64), counts_E


def filled(n_experts: int) -> Experts:
    experts = Experts(D, F, n_experts, "silu").double()
    generator = torch.Generator().manual_seed(n_experts)
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(generator=generator)
    return experts


def rows_reach_their_experts(exchange: Exchange, rank: int, seed: int, n_here: int) -> None:
    """Each row meets its own expert, in groups of the right size, and comes back to its place."""
    _, counts_E = inputs(seed, rank, exchange.size * n_here)
    ids_R = torch.arange(len(counts_E)).repeat_interleave(counts_E)
    x_RD = torch.stack((ids_R, torch.arange(len(ids_R)) + 100 * rank), dim=1).double().requires_grad_(bool(seed % 2))

    def experts(x_SD: Tensor, counts_L: Tensor) -> Tensor:
        mine_L = torch.arange(n_here) + rank * n_here
        assert x_SD[:, 0].equal(mine_L.repeat_interleave(counts_L).double()), (seed, x_SD, counts_L)
        return x_SD

    with torch.set_grad_enabled(bool(seed % 2)):
        assert exchange.through(experts, x_RD, counts_E).equal(x_RD), seed


def equals_all_experts_in_one_place(exchange: Exchange, rank: int, seed: int, n_here: int) -> None:
    """Outputs, gradients of the rows, and gradients of the experts: the sums over both processes' rows."""
    experts, here = filled(exchange.size * n_here), filled(n_here)
    mine = slice(rank * n_here, (rank + 1) * n_here)
    for name, p in here.named_parameters():
        p.data.copy_(experts.get_parameter(name)[mine])
    for process in range(exchange.size):
        x_RD, counts_E = inputs(seed, process, exchange.size * n_here)
        x_RD.requires_grad_()
        y_RD = experts(x_RD, counts_E)
        y_RD.square().sum().backward()
        if process == rank:
            expected = y_RD.detach(), x_RD.grad
    x_RD, counts_E = inputs(seed, rank, exchange.size * n_here)
    x_RD.requires_grad_()
    y_RD = exchange.through(here, x_RD, counts_E)
    y_RD.square().sum().backward()
    torch.testing.assert_close((y_RD.detach(), x_RD.grad), expected, rtol=1e-12, atol=1e-12)
    for name, p in here.named_parameters():
        assert p.grad is not None, f"{name}: an expert that nobody visits has a gradient, and it is 0"
        whole_grad = experts.get_parameter(name).grad
        assert whole_grad is not None
        torch.testing.assert_close(p.grad, whole_grad[mine], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(exchange.through(here, x_RD, counts_E), expected[0], rtol=1e-12, atol=1e-12)


def same_rows_same_bits(exchange: Exchange, seed: int) -> None:
    """Without gradients, processes that ask the same get the same."""
    generator = torch.Generator().manual_seed(seed)
    counts_E = drawn(generator, 2 * exchange.size, 37)
    x_RD = torch.randn(int(counts_E.sum()), 32, generator=generator)
    here = Experts(32, 20, 2, "silu")
    with torch.no_grad():
        for p in here.parameters():
            p.normal_(generator=generator)
        y_RD = exchange.through(here, x_RD, counts_E)
    theirs = [torch.empty_like(y_RD) for _ in range(exchange.size)]
    dist.all_gather(theirs, y_RD)
    assert all(y.equal(y_RD) for y in theirs), seed


def orders_are_permutations(seed: int) -> None:
    counts_WL = torch.randint(0, 4, (3, 1 + seed % 4), generator=torch.Generator().manual_seed(seed))
    order = by_expert(counts_WL, int(counts_WL.sum()))
    assert order.sort().values.equal(torch.arange(len(order)))
    assert order[order.argsort()].equal(torch.arange(len(order)))


def properties(rank: int) -> None:
    exchange = Exchange(dist.group.WORLD)  # type: ignore[arg-type]
    for seed in range(21):
        orders_are_permutations(seed)
        rows_reach_their_experts(exchange, rank, seed, 1 + seed % 3)
        equals_all_experts_in_one_place(exchange, rank, seed, 1 + seed % 3)
        same_rows_same_bits(exchange, seed)


def starts_as_alone(overrides: list[str]) -> None:
    """Built in parts, or given whole, every parameter is bit for bit the unsharded model's; and each element lies once among the shards."""
    config: Any = compose(overrides)
    parallel = make_parallel(config)
    seed_everything(config.seed)
    alone = build_model(config.model)
    with parallel.started():
        for model in (described(config), copy.deepcopy(alone)):
            module = LitModule(config, model, parallel)
            module.configure_model()
            here = {name: p.detach() for name, p in module.model.named_parameters()}
            for name, p in here.items():
                assert whole(p).equal(alone.get_parameter(name)), name
            n = torch.tensor(sum(local(p).numel() for p in here.values()))
            dist.all_reduce(n)
            assert int(n) == config.model.n_params * parallel.layout.replicate


def sends_what_plan_says(overrides: list[str]) -> None:
    """Over all processes: of one alone it depends on what its experts are asked."""
    config: Any = compose(overrides)
    real, sent = dist.all_to_all_single, torch.zeros((), dtype=torch.int64)

    def counting(out: Tensor, x: Tensor, *given: Any, **more: Any) -> Any:
        if x.is_floating_point():
            sent.add_(x.numel() * x.element_size())
        return real(out, x, *given, **more)

    dist.all_to_all_single = counting  # type: ignore[assignment]
    try:
        txtrain.train(config)
    finally:
        dist.all_to_all_single = real
    dist.all_reduce(sent)
    size = dist.get_world_size()
    assert int(sent) == config.trainer.max_steps * size * memory(config, size).communicated["all_to_all"], (overrides, int(sent))


def main() -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['TXTRAIN_STORE']}", rank=rank, world_size=size)
    given = json.loads(Path(sys.argv[1]).read_text())
    if given["properties"]:
        properties(rank)
    for overrides in given["starts"]:
        starts_as_alone(overrides)
    for overrides in given["counted"]:
        sends_what_plan_says(overrides)
    for name, case in given["cases"].items():
        print(f"--- {name}", flush=True)
        txtrain.train(txtrain.compose(case["overrides"]), callbacks=[named(what) for what in case["callbacks"]])


if __name__ == "__main__":
    as_worker(main)
