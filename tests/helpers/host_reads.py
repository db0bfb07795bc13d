"""Which operations that make the host wait for a device a call runs, seen on the CPU by the profiler."""

from collections.abc import Callable
from typing import Any

import torch

# Each copies a value or a size from the device; on a GPU the host would wait for all work before it.
READS = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2")


def host_reads(call: Callable[[], Any]) -> set[str]:
    """Names of the reads that `call` makes, inside operators and in the backward pass, too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    seen = {event.name for event in profile.events()}
    assert any(name.startswith("aten::") for name in seen), "the profiler sees nothing"
    return seen & {f"aten::{name}" for name in READS}
