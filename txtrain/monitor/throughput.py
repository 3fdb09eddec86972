"""Tokens per second, and the share of the hardware's peak that they need.

MFU (2204.02311, appendix B) counts what a step needs; HFU what the device does for it, with what activation checkpointing computes again.
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
    """flops: per second, of one device. source: where the number is from."""

    flops: float
    source: str

    @property
    def is_measured(self) -> bool:
        return self.source.startswith("measured")


class Machine(NamedTuple):
    """name: of the device. peak: FLOP/s against which the MFU is counted. measure: that peak once more; None where it is published.
    tries: how often it still is, as each takes a fifth of a second."""

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
        """This one, or, where it has done more FLOP/s than its measured peak, with the peak measured again: something else had the device then."""
        if self.measure is None or flops <= self.peak.flops or not self.tries:
            return self
        return self._replace(peak=max(self.peak, self.measure()), tries=self.tries - 1)

    def __str__(self) -> str:
        return f"{self.name}; MFU against {_si(self.peak.flops)}FLOP/s, {self.peak.source}"


def _si(n: float) -> str:
    return count(n).replace("B", "G")


@cache
def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The published figure of a known GPU; else what a matrix product reaches here, now."""
    if device.type == "cuda":
        tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        known = named(torch.cuda.get_device_name(device))
        if known is not None and (flops := known.flops("tf32" if tf32 else str(dtype).removeprefix("torch."))):
            return Peak(flops, f"published: {known.source}")
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype) -> Peak:
    size = 512 if device.type == "cpu" else 8192  # 512: over in a millisecond, so that some go undisturbed on a machine that is shared
    a, b = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))  # no random numbers: measuring changes nothing

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
    """Counts tokens and operations against time spent in training: waiting for data counts, validating, sampling and saving do not.

    Args:
        seconds: of training before this process.
    """

    def __init__(self, seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = seconds
        self._clock = clock
        self._mark: float | None = None
        self._tokens, self._flops, self._again, self._since = 0, 0.0, 0.0, 0.0

    def start(self) -> None:
        """Training goes on from here."""
        self._mark = self._clock()

    def count(self, tokens: int, flops: float, again: float = 0.0) -> None:
        """A step is done. again: operations that were done a second time."""
        now = self._clock()
        passed = now - (now if self._mark is None else self._mark)
        self._mark = now
        self.seconds += passed
        self._since += passed
        self._tokens += tokens
        self._flops += flops
        self._again += again

    def rates(self) -> tuple[float, float, float]:
        """Per second since the last call: tokens; floating-point operations; these and what was done a second time."""
        tokens, flops, again, seconds = self._tokens, self._flops, self._again, self._since
        self._tokens, self._flops, self._again, self._since = 0, 0.0, 0.0, 0.0
        return (tokens / seconds, flops / seconds, (flops + again) / seconds) if seconds > 0 else (0.0, 0.0, 0.0)


def memory(device: torch.device) -> int:
    """Bytes at the fullest moment so far: of a GPU what tensors held, of a processor what the process held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
