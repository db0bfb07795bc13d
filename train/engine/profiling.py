"""`--profile`: a PyTorch profiler trace and a memory snapshot of a few steps, in RUN/profile/.

The first steps are left out (compilation, lazy allocation); the next ACTIVE ones are recorded on rank 0:

    step-00000009.trace.json.gz     open in ui.perfetto.dev: every operator, kernel and allocation
    step-00000009.operators.txt     by operator: time, calls, memory
    step-00000009.memory.pickle     open in docs.pytorch.org/memory_viz; on GPUs only
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from lejepa_fast.train.runtime.files import disk_errors_named
from lejepa_fast.train.runtime.world import World

log = logging.getLogger("lejepa_fast.train")

SKIPPED, WARM_UP, ACTIVE = 3, 2, 4


class StepProfiler:
    """Call `step` after every training step, and `close` at the end; works on rank 0 if `enabled`."""

    def __init__(self, run_dir: Path, world: World, *, enabled: bool):
        self._folder = run_dir / "profile"
        self._gpu = world.device.type == "cuda"
        self._step = 0
        self._profile: profile | None = None
        if not enabled or not world.is_main:
            return
        if self._gpu:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])],
            schedule=schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )
        self._profile.start()

    def step(self, step: int) -> None:
        """Count a step; `step` is the number of finished steps. RunError if the disk refuses the files."""
        self._step = step
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Write what is recorded, also of a run that ends during the recorded steps."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, recorded: profile) -> None:
        stem = self._folder / f"step-{self._step:08d}"
        table = recorded.key_averages().table(
            sort_by="self_cuda_time_total" if self._gpu else "self_cpu_time_total", row_limit=60
        )
        with disk_errors_named(self._folder, "free some space, choose another --out, or leave out --profile"):
            self._folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(f"{stem}.trace.json.gz")
            Path(f"{stem}.operators.txt").write_text(table + "\n", encoding="utf-8")
            if self._gpu:
                torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
        log.info("profile of the last %d steps: %s.*", ACTIVE, stem)
