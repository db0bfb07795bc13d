"""`--profile`: a PyTorch profiler trace and a memory snapshot of a few steps, in RUN/profile/.

The first steps are left out (compilation, lazy allocation); the next ACTIVE ones are recorded on rank 0:

    step-00000009.trace.json.gz     open in ui.perfetto.dev: every operator, kernel and allocation
    step-00000009.memory.pickle     open in docs.pytorch.org/memory_viz; on GPUs only
"""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from lejepa_fast.train.runtime.files import disk_errors_named

log = logging.getLogger("lejepa_fast.train")

SKIPPED, WARM_UP, ACTIVE = 3, 2, 4


def step_profiler(folder: Path, device: torch.device, *, done: int) -> profile:
    """Return a context whose method `step` is called after every step; `done` counts those before.

    It writes its files also if the run ends during the recorded steps; RunError if the disk refuses them.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=200_000)

    def write(recorded: profile) -> None:
        stem = folder / f"step-{done + recorded.step_num:08d}"
        with disk_errors_named(folder, "free some space, choose another --out, or leave out --profile"):
            folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(f"{stem}.trace.json.gz")
            if on_gpu:
                torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
        log.info("profile of the last %d steps: %s.*", ACTIVE, stem)

    return profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
        schedule=schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=ACTIVE, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
        profile_memory=True,
    )
