"""What the trainer knows about accelerators: arithmetic peak, memory and links, from the makers' data sheets.

The peak is dense bfloat16 with float32 accumulation, without structured sparsity; it is what MFU divides by,
whatever precision a run uses. A device that is not listed has no peak here, and then no MFU is reported. The
float32 peaks are for plans of runs with `--precision fp32`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from lejepa_fast.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    `tflops` and `fp32_tflops` are 1e12 operations a second, dense bfloat16 and float32 that is not rounded to
    TF32 (on AMD that of the matrix cores). `memory_gib` is what a program finds (the driver's total, rounded
    down), not the name of the product. `link_gb_s` and `network_gb_s` are bytes a second that one device can
    send: to the devices of its own machine, and to other machines where each device has a network card of its
    own (0.4 Tb/s, the usual build of training clusters; 0.2 and 0.1 for older and smaller ones).
    """

    name: str
    tflops: float
    fp32_tflops: float
    memory_gib: float
    link_gb_s: float
    network_gb_s: float
    words: tuple[str, ...]
    """All of them stand in the name that PyTorch reports; the first entry of the table that fits counts."""

    @property
    def convolution_tflops(self) -> float:
        """Of float32 convolutions: PyTorch lets cuDNN round their inputs to TF32, at half the bfloat16 peak
        (torch.backends.cudnn.allow_tf32; matrix products stay float32). AMD's library does not."""
        return self.fp32_tflops if self.name.startswith("mi") else self.tflops / 2


# Longer descriptions first: an H100 NVL is an H100 with fewer flops.
_TABLE = (
    Accelerator("b300", 2250, 75, 268, 900, 100, ("B300",)),
    Accelerator("gb200", 2500, 80, 184, 900, 50, ("GB200",)),
    Accelerator("b200", 2250, 75, 178, 900, 50, ("B200",)),
    Accelerator("gh200", 989.4, 66.9, 94, 450, 50, ("GH200",)),
    Accelerator("h200-nvl", 835.5, 60, 140, 450, 50, ("H200", "NVL")),
    Accelerator("h200", 989.4, 66.9, 139, 450, 50, ("H200",)),
    Accelerator("h100-nvl", 835.5, 60, 93, 300, 50, ("H100", "NVL")),
    Accelerator("h100-pcie", 756, 51.2, 79, 64, 50, ("H100", "PCIE")),
    Accelerator("h100", 989.4, 66.9, 79, 450, 50, ("H100",)),
    Accelerator("h20", 148, 44, 95, 450, 50, ("H20",)),
    Accelerator("a100-40gb", 312, 19.5, 39, 300, 25, ("A100", "40GB")),
    Accelerator("a100", 312, 19.5, 79, 300, 25, ("A100",)),
    Accelerator("a10", 125, 31.2, 22, 32, 12.5, ("A10",)),
    Accelerator("a10g", 70, 35, 22, 32, 12.5, ("A10G",)),
    Accelerator("l40s", 362, 91.6, 44, 32, 12.5, ("L40S",)),
    Accelerator("l4", 121, 30.3, 22, 32, 12.5, ("L4",)),
    Accelerator("rtx-4090", 165.2, 82.6, 23, 32, 12.5, ("RTX", "4090")),
    Accelerator("mi250x", 191.5, 47.9, 63, 100, 25, ("MI250X",)),  # one of the two dies: what PyTorch sees
    Accelerator("mi300x", 1307.4, 163.4, 191, 448, 50, ("MI300X",)),
    Accelerator("mi325x", 1307.4, 163.4, 255, 448, 50, ("MI325X",)),
    Accelerator("mi355x", 2516.6, 157.3, 287, 537, 50, ("MI355X",)),
)
ACCELERATORS = {device.name: device for device in _TABLE}


def by_device_name(name: str) -> Accelerator | None:
    """The entry for a name such as torch.cuda.get_device_name() returns; None for a device not listed.

    A slice of a GPU (NVIDIA's MIG) is not listed: it has a part of the peak.
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if "MIG" in words:
        return None
    return next((device for device in _TABLE if words.issuperset(device.words)), None)


def by_option(name: str) -> Accelerator:
    """The entry that the option `--gpu NAME` asks for; UsageError with all names if there is none."""
    found = ACCELERATORS.get(name.lower()) or by_device_name(name)
    if found is None:
        near = difflib.get_close_matches(name.lower(), ACCELERATORS, n=1)
        hint = f"did you mean {near[0]}? known: " if near else "known: "
        raise UsageError(f"gpu: no accelerator is called {name!r}; {hint}{', '.join(sorted(ACCELERATORS))}")
    return found
