"""Published peak FLOP/s and memory bandwidth of accelerators. No torch.

From the makers' data sheets and architecture papers: one device as torch counts it, dense (half of the figure "with
sparsity"), with float32 accumulation. A device not listed here, or a slice of one (MIG), is measured.
"""

from __future__ import annotations

import dataclasses as dc
import re


@dc.dataclass(frozen=True)
class Accelerator:
    """Dense matrix products in FLOP/s; None: not published, or not supported.

    called: part of its name in torch. bandwidth: of its memory, bytes a second; of several versions the one named, A100
    80 GB. float32: without TF32; AMD: on matrix cores.
    """

    called: str
    source: str
    bandwidth: float
    bfloat16: float | None
    float16: float
    tf32: float | None
    float32: float

    def flops(self, dtype: str) -> float | None:
        """dtype: torch's name, or tf32."""
        return {
            "bfloat16": self.bfloat16, "float16": self.float16, "tf32": self.tf32, "float32": self.float32
        }.get(dtype)


def _device(
    called: str, source: str, bandwidth: float, bfloat16: float | None, tf32: float | None, float32: float,
    float16: float | None = None,
) -> Accelerator:
    """Figures in TB/s and TFLOP/s. float16=None: as bfloat16."""
    half = bfloat16 if float16 is None else float16
    assert half is not None
    flops = bfloat16 and bfloat16 * 1e12, half * 1e12, tf32 and tf32 * 1e12, float32 * 1e12
    return Accelerator(called, source, bandwidth * 1e12, *flops)


_AMPERE, _ADA = "NVIDIA GA102 architecture paper", "NVIDIA Ada architecture paper"
PUBLISHED = {
    "A100": _device("A100", "NVIDIA A100 data sheet", 2.039, 312, 156, 19.5),
    "H100_PCIe": _device("H100 PCIe", "NVIDIA H100 data sheet", 2, 756, 378, 51),
    "H100": _device("H100 80GB HBM3", "NVIDIA H100 data sheet", 3.35, 989, 494.5, 67),
    "H100_NVL": _device("H100 NVL", "NVIDIA H100 data sheet", 3.9, 835.5, 417.5, 60),
    "H200": _device("H200", "NVIDIA H200 data sheet", 4.8, 989, 494.5, 67),
    "H200_NVL": _device("H200 NVL", "NVIDIA H200 data sheet", 4.8, 835.5, 417.5, 60),
    "GH200": _device("GH200", "NVIDIA GH200 data sheet", 4, 990, 494.5, 67),
    "B200": _device("B200", "NVIDIA HGX B200 data sheet", 8, 2250, 1125, 75),
    "GB200": _device("GB200", "NVIDIA GB200 data sheet", 8, 2500, 1250, 80),
    "L4": _device("L4", "NVIDIA L4 data sheet", 0.3, 121, 60, 30.3),
    "L40": _device("L40", "NVIDIA L40 data sheet", 0.864, 181, 90.5, 90.5),
    "L40S": _device("L40S", "NVIDIA L40S data sheet", 0.864, 362, 183, 91.6),
    "A10": _device("A10", "NVIDIA A10 data sheet", 0.6, 125, 62.5, 31.2),
    "A10G": _device("A10G", "NVIDIA A10G data sheet", 0.6, 70, 35, 35),
    "A30": _device("A30", "NVIDIA A30 data sheet", 0.933, 165, 82, 10.3),
    "A40": _device("A40", "NVIDIA A40 data sheet", 0.696, 149.7, 74.8, 37.4),
    "V100": _device("V100-SXM2", "NVIDIA V100 data sheet", 0.9, None, None, 15.7, float16=125),
    "V100_PCIe": _device("V100-PCIE", "NVIDIA V100 data sheet", 0.9, None, None, 14, float16=112),
    "T4": _device("T4", "NVIDIA T4 data sheet", 0.32, None, None, 8.1, float16=65),
    "RTX_A6000": _device("RTX A6000", _AMPERE, 0.768, 154.8, 77.4, 38.7),
    "RTX_3090": _device("RTX 3090", _AMPERE, 0.936, 71, 35.6, 35.6),
    "RTX_4090": _device("RTX 4090", _ADA, 1.008, 165.2, 82.6, 82.6),
    "RTX_5090": _device("RTX 5090", "NVIDIA RTX Blackwell architecture paper", 1.792, 209.5, 104.8, 104.8),
    "MI250X": _device("MI250X", "AMD MI250X data sheet, one of its two dies", 1.6, 191.5, None, 47.85),
    "MI250": _device("MI250", "AMD MI250 data sheet, one of its two dies", 1.6, 181, None, 45.25),
    "MI210": _device("MI210", "AMD MI210 data sheet", 1.6, 181, None, 45.3),
    "MI300X": _device("MI300X", "AMD MI300X data sheet", 5.3, 1307.4, 653.7, 163.4),
    "MI300A": _device("MI300A", "AMD MI300A data sheet", 5.3, 980.6, 490.3, 122.6),
    "MI325X": _device("MI325X", "AMD MI325X data sheet", 6, 1307.4, 653.7, 163.4),
}
_BESIDE = re.compile(r"nvidia|geforce|tesla|amd|instinct|\d+gb|sxm\d?|hbm\d?e?")  # words that do not identify a device
_ANOTHER = re.compile(r"\b(Laptop|Max-Q|Ti|SUPER|D|MIG)\b")  # marks another device of similar name


def key_of(spelling: str) -> str | None:
    """The key of PUBLISHED for any spelling: case, separators, maker and memory size are ignored (a100-80gb: A100)."""
    words = [word for word in re.split(r"[\s_-]+", spelling.lower()) if not _BESIDE.fullmatch(word)]
    keys = {key.replace("_", "").lower(): key for key in PUBLISHED}
    return keys.get("".join(words)) or keys.get("".join(word for word in words if word != "pcie"))


def named(device: str) -> Accelerator | None:
    """The accelerator of torch's device name; the longest match counts (an H200 NVL is no H200). None: unknown."""
    found = [a for a in PUBLISHED.values() if re.search(rf"(?<!\w){re.escape(a.called)}(?!\w)", device)]
    return None if _ANOTHER.search(device) else max(found, key=lambda a: len(a.called), default=None)
