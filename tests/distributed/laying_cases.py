"""What each rank of test_laying.py does: `python -m tests.distributed.laying_cases FILE`.

FILE is JSON: a list of [name of a function below, its arguments].
"""

from __future__ import annotations

import dataclasses as dc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.group import as_worker
from txtrain import compose
from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import save as saving
from txtrain.checkpoint.load import load, open_weights
from txtrain.checkpoint.run_folder import RunFolder
from txtrain.checkpoint.state import RunState
from txtrain.config.schema import Train
from txtrain.hf.fit import fitted
from txtrain.hf.pieces import fill
from txtrain.model.init import init_weights
from txtrain.monitor import start_screen
from txtrain.parallel.build import make_parallel
from txtrain.parallel.gradient_buckets import local
from txtrain.parallel.one_process import OneProcess, whole
from txtrain.training.batches import seed_everything
from txtrain.training.initial_weights import initial_weights
from txtrain.training.models_read import described
from txtrain.training.module import LitModule


def composed(overrides: list[str]) -> Train:
    """Once for all: it takes as long as what is tested. The model is named beside its weights, and may be larger."""
    where, *given = overrides
    patterns = tuple(o.partition("=")[2] for o in given if o.startswith("init_allow_missing="))
    given = [o for o in given if not o.startswith("init_allow_missing=")]
    made: list[Any] = [compose([*given, f"trainer.devices={dist.get_world_size()}"]) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return dc.replace(made[0], init_from=where, init_allow_missing=patterns)


def laid(config: Train, parallel: OneProcess) -> LitModule:
    assert config.init_from is not None
    module = LitModule(config, None, parallel, None, open_weights(config.init_from, "init_from"))
    module.configure_model()
    return module


def alone(config: Train) -> dict[str, Tensor]:
    """What the weights are in one process."""
    model = described(config)
    source, fit = fitted(open_weights(config.init_from or ""), model, config.model, config.init_allow_missing)
    model.to_empty(device="cpu")
    seed_everything(config.seed)
    init_weights(model, fit.loaded)
    fill(model.state_dict(), source.pieces)
    source.close()
    return model.state_dict()


def has_the_values_of_one_process(overrides: list[str]) -> None:
    config = composed(overrides)
    wanted = alone(config)
    parallel = make_parallel(config)
    with parallel.started():
        module = laid(config, parallel)
        found = dict(module.model.state_dict())
        if config.strategy.stage:
            module.plan(1)
            module.configure_optimizers()
            tensors = parallel.training_tensors(module.model, None, None)  # type: ignore[arg-type]
            found = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
            for part in parallel._parts:  # type: ignore[attr-defined]
                mine = wanted[part.name].flatten()[part.offset : part.offset + part.length]
                is_cut = config.strategy.stage == 3
                multiplied = part.parameter.ds_tensor if is_cut else part.parameter.detach().flatten()[part.offset :]
                assert multiplied[: part.length].equal(mine.to(multiplied.dtype)), part.name
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert whole(tensor).equal(wanted[name]), name


def tells_where_they_come_from(overrides: list[str]) -> None:
    """The same on every rank: each makes the start screen."""
    config = composed(overrides)
    parallel = make_parallel(config)
    with parallel.started():
        weights = initial_weights(config, None, parallel)
        assert weights is not None
        _, fit = fitted(weights.source, described(config), config.model, config.init_allow_missing)
        parallel.agree({"the weights": json.dumps(weights.record(fit))})
        (first, *_) = start_screen.weights(weights.record(fit))
        assert first.startswith(f"{config.init_from}, "), first
        weights.source.close()


def is_saved(overrides: list[str], run: str) -> None:
    """A checkpoint of the weights, as these ranks hold them."""
    config = composed(overrides)
    parallel = make_parallel(config)
    with parallel.started():
        module = laid(config, parallel)
        tensors = {f"model.{name}": tensor for name, tensor in module.model.state_dict().items()}

        def beside(folder: Path) -> None:
            RunFolder(folder).write_config(config, folder)

        saving.save(checkpoint.path_of(Path(run), 1), tensors, RunState(step=1), beside, parallel.checkpoint_group)


def reads_a_second_model(overrides: list[str]) -> None:
    """It lies as the first, computes what it computes alone, and neither learns nor stays gathered."""
    config = composed(overrides)
    where = config.init_from or ""
    ids = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    parallel = make_parallel(config)
    with parallel.started(), torch.enable_grad():
        first, device = described(config), torch.device("cpu")
        parallel.set_up(first, device)
        parallel.materialise(first, device)
        source = open_weights(where, "objective.teacher")
        parallel.check_read(source.model.config, "objective.teacher")
        read: Any = parallel.lay_read_only(source, device)
        half = bool(config.strategy.stage) and config.trainer.precision == "bf16-mixed"
        alone = load(where).model.to(torch.bfloat16 if half else torch.float32)
        asked = {"input_ids": ids} | ({"decoder_input_ids": ids} if source.model.config.encoder_layers else {})
        for _ in range(2):
            logits = read(**asked).logits
            with torch.no_grad():
                allowed = 1e-2 if half else 1e-5
                torch.testing.assert_close(logits, alone(**asked).logits, rtol=allowed, atol=allowed)
            assert not logits.requires_grad
            assert not any(p.requires_grad for p in source.model.parameters())
            assert n_held(source.model) == n_held(first)
        assert not source.model.training


def n_held(model: nn.Module) -> int:
    """Elements that this rank has."""
    return sum(getattr(p, "ds_tensor", local(p)).numel() for p in model.parameters())


def takes_its_share_of_memory(overrides: list[str], small: list[str]) -> None:
    """At the peak: what the rank holds, the largest tensor, and a tenth of both.

    Beside what the libraries have taken for a small model.
    """
    config, first = composed(overrides), composed(small)
    parallel = make_parallel(config)
    with parallel.started():
        laid(first, parallel)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
        before = peak()
        module = laid(config, parallel)
        taken = peak() - before
        tensors = module.model.state_dict().values() if config.strategy.stage < 3 else module.model.parameters()
        share = sum(nbytes(getattr(tensor, "ds_tensor", tensor)) for tensor in tensors)
        with torch.device("meta"):
            every = open_weights(config.init_from or "").model.state_dict().values()
            sizes = [tensor.nelement() * tensor.element_size() for tensor in every]
        allowed = 1.1 * (share + max(sizes))
        numbers = {"taken": taken, "allowed": allowed, "share": share, "whole": sum(sizes)}
        told = f"{config.strategy.type}: {', '.join(f'{name} {n / 2**20:.0f} MiB' for name, n in numbers.items())}"
        print(told, flush=True)
        assert taken <= allowed, told


def nbytes(tensor: Tensor | nn.Parameter) -> int:
    mine: Any = local(tensor)
    return int(mine.nelement() * mine.element_size())


def peak() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['TXTRAIN_STORE']}", rank=rank, world_size=size)
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()):
        print(f"--- {name} {arguments}", flush=True)
        globals()[name](*arguments)


if __name__ == "__main__":
    as_worker(main)
