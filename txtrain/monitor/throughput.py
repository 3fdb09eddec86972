"""Tokens per second, MFU and HFU.

MFU (2204.02311, appendix B) counts the FLOPs that a step needs; HFU also those recomputed by activation checkpointing.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from txtrain.config.hardware import named
from txtrain.monitor.start_screen import count


class Peak(NamedTuple):
    """flops: FLOP/s of one device. source: where the number is from."""

    flops: float
    source: str

    @property
    def is_measured(self) -> bool:
        return self.source.startswith("measured")


class Machine(NamedTuple):
    """A device.

    Attributes:
        peak: FLOP/s that MFU and HFU are shares of.
        measure: measures the peak again; None if it is a published figure.
        tries: re-measurements left, as each takes a fifth of a second.
    """

    name: str
    peak: Peak
    measure: Callable[[], Peak] | None = None
    tries: int = 5

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {_threads()}"
        found = peak(device, dtype)
        return cls(name, found, partial(_measured, device, dtype) if found.is_measured else None)

    def reaching(self, flops: float) -> Machine:
        """This machine; its peak is measured again if `flops` exceed it: something else used the device before."""
        if self.measure is None or flops <= self.peak.flops or not self.tries:
            return self
        return self._replace(peak=max(self.peak, self.measure()), tries=self.tries - 1)

    def __str__(self) -> str:
        return f"{self.name}; MFU against {_si(self.peak.flops)}FLOP/s, {self.peak.source}"


def _si(n: float) -> str:
    return count(n).replace("B", "G")


@cache
def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The published figure of a known GPU; else what a matrix product reaches here."""
    if device.type == "cuda":
        tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        known = named(torch.cuda.get_device_name(device))
        if known is not None and (flops := known.flops("tf32" if tf32 else str(dtype).removeprefix("torch."))):
            return Peak(flops, f"published: {known.source}")
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype) -> Peak:
    # 512 on a CPU: a product takes a millisecond, so that some run undisturbed on a shared machine.
    size = 512 if device.type == "cpu" else 8192
    # No random numbers: measuring changes no generator.
    a, b = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))

    def once() -> float:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    once()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.2 and len(times) < 200):
        times.append(once())
    threads = f", {_threads()}" if device.type == "cpu" else ""
    return Peak(2 * size**3 / min(times), f"measured: {size}-cube matmul, {str(dtype).removeprefix('torch.')}{threads}")


def _threads() -> str:
    n = torch.get_num_threads()
    return "1 thread" if n == 1 else f"{n} threads"


class Meter:
    """Counts tokens and FLOPs over training time: waiting for data counts, validation, sampling and saving do not.

    Args:
        seconds: of training before this process.
    """

    def __init__(self, seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = seconds
        self._clock = clock
        self._mark: float | None = None
        self._tokens, self._flops, self._again, self._since = 0, 0.0, 0.0, 0.0

    def start(self) -> None:
        """Training begins, or goes on, now."""
        self._mark = self._clock()

    def count(self, tokens: int, flops: float, again: float = 0.0) -> None:
        """A step is done. again: recomputed FLOPs."""
        now = self._clock()
        passed = now - (now if self._mark is None else self._mark)
        self._mark = now
        self.seconds += passed
        self._since += passed
        self._tokens += tokens
        self._flops += flops
        self._again += again

    def rates(self) -> tuple[float, float, float]:
        """Per second since the last call: tokens; FLOPs; FLOPs with the recomputed ones."""
        tokens, flops, again, seconds = self._tokens, self._flops, self._again, self._since
        self._tokens, self._flops, self._again, self._since = 0, 0.0, 0.0, 0.0
        return (tokens / seconds, flops / seconds, (flops + again) / seconds) if seconds > 0 else (0.0, 0.0, 0.0)


def memory(device: torch.device) -> int:
    """Peak bytes so far: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
