"""Peak arithmetic, memory and links of GPUs, from the makers' data sheets.

MFU divides by the dense bfloat16 peak (float32 accumulation, no structured sparsity), whatever precision a
run uses. A device that is not listed has no peak, and then no MFU is reported.
"""

import difflib
import re
from dataclasses import dataclass

from lejepa_fast.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class GpuSpec:
    """One kind of GPU."""

    name: str
    tflops: float
    """Dense bfloat16 peak, 1e12 operations per second."""
    memory_gib: float
    """Memory that the driver offers, rounded down; less than the product's name says."""
    link_gb_s: float
    """GB/s that one GPU sends to the GPUs of its machine."""
    network_gb_s: float
    """GB/s that one GPU sends to other machines, with the usual network card of its own."""


# An entry fits a device whose name holds all its words. Longer names first: "H100 NVL" also holds "H100".
_TABLE = (
    GpuSpec("b300", 2250, 268, 900, 100),
    GpuSpec("gb200", 2500, 184, 900, 50),
    GpuSpec("b200", 2250, 178, 900, 50),
    GpuSpec("gh200", 989.4, 94, 450, 50),
    GpuSpec("h200-nvl", 835.5, 140, 450, 50),
    GpuSpec("h200", 989.4, 139, 450, 50),
    GpuSpec("h100-nvl", 835.5, 93, 300, 50),
    GpuSpec("h100-pcie", 756, 79, 64, 50),
    GpuSpec("h100", 989.4, 79, 450, 50),
    GpuSpec("h20", 148, 95, 450, 50),
    GpuSpec("a100-40gb", 312, 39, 300, 25),
    GpuSpec("a100", 312, 79, 300, 25),
    GpuSpec("a10", 125, 22, 32, 12.5),
    GpuSpec("a10g", 70, 22, 32, 12.5),
    GpuSpec("l40s", 362, 44, 32, 12.5),
    GpuSpec("l4", 121, 22, 32, 12.5),
    GpuSpec("rtx-4090", 165.2, 23, 32, 12.5),
    GpuSpec("mi250x", 191.5, 63, 100, 25),  # one of the two dies: what PyTorch sees
    GpuSpec("mi300x", 1307.4, 191, 448, 50),
    GpuSpec("mi325x", 1307.4, 255, 448, 50),
    GpuSpec("mi355x", 2516.6, 287, 537, 50),
)


def by_device_name(name: str) -> GpuSpec | None:
    """Return the entry for `torch.cuda.get_device_name()`; None if not listed, as MIG slices are not."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if "MIG" in words:
        return None
    return next((each for each in _TABLE if words.issuperset(each.name.upper().split("-"))), None)


def by_option(name: str) -> GpuSpec:
    """Return the entry of `--gpu NAME`; UsageError with all names if there is none."""
    found = by_device_name(name)
    if found is None:
        names = sorted(each.name for each in _TABLE)
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"gpu: no GPU is called {name!r}; {hint}known: {', '.join(names)}")
    return found
