"""What the makers publish of their accelerators. No torch."""

from __future__ import annotations

import dataclasses as dc


@dc.dataclass(frozen=True)
class Accelerator:
    """Dense matrix products in FLOP/s: bfloat16 on tensor cores; float32 without TF32. called: a part of the name that torch gives it."""

    called: str
    bfloat16: float
    float32: float

    def flops(self, dtype: str) -> float | None:
        """None: nothing is published here for that dtype."""
        return {"bfloat16": self.bfloat16, "float32": self.float32}.get(dtype)


PUBLISHED = {
    "A100": Accelerator("A100", 312e12, 19.5e12),
    "H100_PCIe": Accelerator("H100 PCIe", 756e12, 51e12),
    "H100": Accelerator("H100 80GB HBM3", 989e12, 67e12),
    "H200": Accelerator("H200", 989e12, 67e12),
    "L40S": Accelerator("L40S", 362e12, 91.6e12),
    "L4": Accelerator("L4", 121e12, 30.3e12),
}


def named(device: str) -> Accelerator | None:
    """The one that torch calls so; of several parts of a name the longest counts (an L40S is no L4)."""
    found = [a for a in PUBLISHED.values() if a.called in device]
    return max(found, key=lambda a: len(a.called), default=None)
