"""One case of train_bench.py, in a process of its own: the real Trainer on synthetic views, or on files.

    python bench/train_case.py '{"model": "vit_large", "images": 128, ...}'

prints one line of JSON. A case that does not fit into memory prints {"error": "out of memory", ...}.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import loader_files
import no_tyro  # noqa: F401 - before the trainer
import torch
import torch.distributed as dist
from torch import Tensor

from lejepa_fast.data import MultiCropRecipe
from lejepa_fast.errors import RunError
from lejepa_fast.train.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from lejepa_fast.train.engine.metrics import peak_memory_gib
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.planning.memory import trace_step
from lejepa_fast.train.planning.out_of_memory import settings_that_help
from lejepa_fast.train.runtime.files import read_rows
from lejepa_fast.train.runtime.world import World, close_world, setup_world

SCHEDULE = 10_000  # steps of the learning rate's schedule, of which a case runs the first
AROUND_A_SAVE = 12  # steps that are timed with one save among them, and without
EPOCH, DISTINCT = 20, 512  # steps of an epoch on files, about, and files that differ


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    model: str
    images: int
    strategy: str = "none"
    activation_checkpointing: str = "none"
    compile: str = "auto"
    global_size: int = 224
    local_size: int = 98
    local_crops: int = 8
    steps: int = 20
    warm_up: int = 5
    kwargs: str = "{}"
    checkpoint: bool = False
    """Also measure what a checkpoint costs the training."""
    plan: bool = False
    """Also plan the memory of this case, to compare."""
    loader: bool = False
    """JPEG files of a usual size through the loader, for what it costs the training."""

    def config(self, out: Path) -> Config:
        crops = MultiCropRecipe(
            global_size=self.global_size,
            local_size=self.local_size,
            local_crops=self.local_crops,
            blur_kernel=7 if self.local_size > 32 else 3,
            min_image_size=1,
        )
        return Config(
            data=DataConfig(batch_size=self.images),
            crops=crops,
            model=ModelConfig(name=self.model, kwargs=self.kwargs),
            parallel=ParallelConfig(
                strategy=self.strategy,  # type: ignore[arg-type]
                activation_checkpointing=self.activation_checkpointing,  # type: ignore[arg-type]
            ),
            # Of the default warm-up of 500 steps a case sees the start, where a loss hardly moves.
            optim=OptimConfig(warmup_fraction=(self.warm_up + self.steps) / 2 / SCHEDULE),
            eval=EvalConfig(every=0),
            out=out,
            max_steps=SCHEDULE,
            compile=self.compile,  # type: ignore[arg-type]
            log_every=10 if self.loader else SCHEDULE,
            checkpoint_every=100_000,
            keep_checkpoints=1,
            tensorboard=False,
        )


class _Views:
    """The same few batches of noise over and over, on the device: what the loader costs is left out."""

    backend = "synthetic"

    def __init__(self, cfg: Config, device: torch.device):
        sizes = [cfg.crops.global_size] * cfg.crops.global_crops
        sizes += [cfg.crops.local_size] * cfg.crops.local_crops
        generator = torch.Generator(device).manual_seed(0)
        shape = (cfg.data.batch_size, 3)
        self._batches = [
            [torch.randn(*shape, s, s, device=device, generator=generator) for s in sizes] for _ in range(2)
        ]

    def __len__(self) -> int:
        return SCHEDULE

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 0, "batch": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[list[Tensor], None]]:
        while True:
            for views in self._batches:
                yield views, None


class _Noise:
    """Stands for the images' source where the trainer names it."""

    name = "noise"

    def __len__(self) -> int:
        return 1_281_167


class SyntheticTrainer(Trainer):
    def _open_data(self) -> None:
        self.train_source = self.val_source = _Noise()  # type: ignore[assignment]
        self.data: dict[str, Any] = {}
        self.workers = 0
        self.loader = _Views(self.cfg, self.world.device)  # type: ignore[assignment]


def measure(case: Case) -> dict[str, Any]:
    """The row of a case; `error` instead of figures where it does not fit into memory."""
    process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    process |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with mock.patch.dict(os.environ, process if case.strategy != "none" else {}):
        world = setup_world("auto")
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measure(case, world, Path(folder))
    except (RunError, torch.OutOfMemoryError) as error:  # the latter where the views do not fit
        if isinstance(error, RunError) and not str(error).startswith("out of"):
            raise
        return {"error": "out of memory", "peak_memory_gib": peak_memory_gib(world.device)}
    finally:
        close_world()


def _measure(case: Case, world: World, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    if case.loader:
        return _with_the_loader(case, world, folder)
    with SyntheticTrainer(case.config(folder / "run"), world, settings_that_help) as trainer:
        trainer.model.train()
        steps = _Steps(trainer)
        steps.run(case.warm_up)
        compiled = time.perf_counter() - began
        seconds = steps.run(case.steps)
        step = statistics.median(seconds)
        row = _figures(trainer, step, seconds) | {"start_seconds": compiled}
        row["sigreg_share"] = _sigreg_seconds(trainer) / step
        if case.checkpoint:
            row |= _checkpoint_stall(trainer, steps, step)
        row["losses"] = [float(value) for value in torch.stack(steps.losses).tolist()]
    if case.plan:
        row["planned_memory_gib"] = _planned_gib(case, trainer.cfg)
    return row


def _figures(trainer: Trainer, step: float, seconds: list[float]) -> dict[str, Any]:
    images = trainer.cfg.data.batch_size
    share = trainer.meter.mfu_per_image
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "gflops_per_image": trainer.flops_per_image / 1e9,
        "precision": "bf16" if trainer.amp_dtype else "fp32",
        "sigreg_impl": trainer.loss_fn.sigreg.chosen_impl,
        "step_ms": 1e3 * step,
        "step_p20_ms": 1e3 * deciles[1],
        "step_p80_ms": 1e3 * deciles[7],
        "images_per_second": images / step,
        "mfu": images / step * share if share else None,
        "peak_memory_gib": peak_memory_gib(trainer.world.device),
        "data_wait": 0.0,  # the views are there already
    }


class _Steps:
    """Runs training steps and times each: by events on a GPU, so that it never has to stop for the clock."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._views = iter(trainer.loader)
        self._gpu = trainer.world.device.type == "cuda"
        self.losses: list[Tensor] = []

    def run(self, count: int, between: Callable[[int], None] = lambda index: None) -> list[float]:
        """Seconds of each of `count` steps; `between` is called before each with its index."""
        marks = [self._mark()]
        for index in range(count):
            between(index)
            self._trainer.train_step(next(self._views)[0], 0)
            self.losses.append(self._trainer.last["parts"][0].detach().clone())
            marks.append(self._mark())
        if not self._gpu:
            return [b - a for a, b in itertools.pairwise(marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    def _mark(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _sigreg_seconds(trainer: Trainer) -> float:
    """Median seconds of SIGReg's forward and backward alone, on embeddings of the run's shape."""
    z = trainer.last["z"].float().requires_grad_()
    gpu = z.device.type == "cuda"
    seconds = []
    for _ in range(8):
        if gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        torch.autograd.grad(trainer.loss_fn.sigreg(z), z)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def _checkpoint_stall(trainer: Trainer, steps: _Steps, step: float) -> dict[str, float]:
    """What a save costs: the time that steps with one save among them take longer than as many without, in
    steps."""
    trainer.save()
    trainer.saver.wait()  # the first save allocates its buffers
    without = sum(steps.run(AROUND_A_SAVE))
    trainer.meter.read()

    def save(index: int) -> None:
        if index == 1:
            trainer.save()

    began = time.perf_counter()
    seconds = sum(steps.run(AROUND_A_SAVE, between=save))
    trainer.saver.wait()
    written = time.perf_counter() - began
    return {
        "checkpoint_stall_steps": (seconds - without) / step,
        "save_seconds": trainer.meter.read()["save_seconds"],
        "checkpoint_seconds": written,
    }


def _planned_gib(case: Case, cfg: Config) -> float:
    if dist.is_initialized():
        close_world()
    planned = dataclasses.replace(cfg, precision="bf16" if torch.cuda.is_available() else cfg.precision)
    return trace_step(planned, shards=1, images=case.images).peak / 2**30


def _with_the_loader(case: Case, world: World, folder: Path) -> dict[str, Any]:
    """A real run: rows of its metrics after the first."""
    total = case.warm_up + case.steps
    cfg = dataclasses.replace(
        case.config(folder / "run"), max_steps=total, log_every=case.warm_up, optim=OptimConfig()
    )
    images = _photographs(folder / "images", EPOCH * case.images)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=str(images)))
    trainer = Trainer(cfg, world)
    trainer.run()
    rows = [row for row in read_rows(folder / "run" / "metrics.jsonl") if row["kind"] == "train"]
    later = [row for row in rows if row["step"] > case.warm_up]
    return {
        "loader_backend": trainer.loader.backend,
        "loader_workers": trainer.workers,
        "images_per_second": statistics.median(row["images_per_second"] for row in later),
        "data_wait": statistics.median(row["data_wait"] for row in later),
        "mfu": statistics.median(row["mfu"] for row in later) if "mfu" in later[-1] else None,
        "peak_memory_gib": later[-1]["memory_gib"],
    }


def _photographs(folder: Path, count: int) -> Path:
    """A folder of so many JPEG files of 500 x 375 px, of which `DISTINCT` differ."""
    loader_files.make_folder(folder / "all", min(count, DISTINCT))
    made = sorted((folder / "all").iterdir())
    for number in range(len(made), count):
        os.link(made[number % len(made)], folder / "all" / f"{number:06d}-again.jpg")
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
