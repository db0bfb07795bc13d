"""Speed, MFU and memory of the trainer:

    python bench/train_bench.py [--out DIR] [--budget-minutes X] [--rehearse]
    python bench/train_bench.py --smoke    # 50 steps of ViT-S/16 alone, to see that it works

On a GPU: ViT-L/14, giant, gigantic and S/16 with 2 x 224 + 8 x 98 px (S/16: 96), bf16, compiled, on
synthetic views: images/s, MFU, peak memory, SIGReg's share of the step; FSDP2 and DDP on one GPU against no
wrapper, what a checkpoint costs, the plan's memory against the allocator's, and S/16 on JPEG files through
the loader. On a CPU the same on tiny sizes, to see that it works: those rows say nothing about GPUs, and
memory there is that of the whole process.

Each case is a run of the real `Trainer` in its own process, the most important first, and its figures are
the medians of the run's metrics after the warm-up. A case that does not fit into memory is a row with
`error`, and is tried again with half the images. On a GPU the targets of `targets.py` are printed. The exit
code is 1 if no case works.
"""

import dataclasses
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import targets
import timing
import torch
from benchlib import Row, Rows, command_line, first_line, machine, read_rows
from loader_bench import make_folder
from torch import Tensor

import lejepa_fast.train.config as train_config
from lejepa_fast.data import MultiCropRecipe
from lejepa_fast.errors import RunError
from lejepa_fast.train.engine.metrics import peak_memory_gib
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.planning.memory import plan_memory
from lejepa_fast.train.runtime.world import World, close_world, setup_world

WINDOW = 5  # steps of a row of metrics
SMALLEST_BATCH = 8
DISTINCT = 512  # files that differ


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    model: str
    images: int
    strategy: str = "none"
    activation_checkpointing: str = "none"
    compile: str = "auto"
    steps: int = 20
    """After the first window; a multiple of `WINDOW`."""
    checkpoint: bool = False
    """Also measure what a checkpoint costs the training."""
    plan: bool = False
    """Also plan the memory of this case, to compare."""
    loader: bool = False
    """JPEG files of a usual size through the loader, for what it costs the training."""
    tiny: bool = False
    """Small crops, for a CPU."""

    def config(self, out: Path) -> train_config.Config:
        parallel: Any = {"strategy": self.strategy, "activation_checkpointing": self.activation_checkpointing}
        local = 96 if "patch16" in self.model else 98  # a multiple of the patch
        small: Any = {"local_crops": 2, "global_size": 32, "local_size": 16, "blur_kernel": 3}
        return train_config.Config(
            data=train_config.DataConfig(batch_size=self.images),
            crops=MultiCropRecipe(**small) if self.tiny else MultiCropRecipe(local_crops=8, local_size=local),
            model=train_config.ModelConfig(name=self.model),
            parallel=train_config.ParallelConfig(**parallel),
            eval=train_config.EvalConfig(every=0),
            out=out,
            max_steps=WINDOW + self.steps,
            compile=self.compile,  # type: ignore[arg-type]
            log_every=WINDOW,
            # The second save is measured: the first one allocates its buffers.
            checkpoint_every=self.steps // 2 if self.checkpoint else 100_000,
            keep_checkpoints=1,
            tensorboard=False,
        )


LARGE = Case("vit_large", 128)
GPU_CASES = (
    dataclasses.replace(LARGE, checkpoint=True),
    dataclasses.replace(LARGE, strategy="ddp"),
    dataclasses.replace(LARGE, strategy="fsdp"),
    Case("vit_gigantic", 64, strategy="fsdp", activation_checkpointing="full", steps=40),
    Case("vit_giant", 64),
    Case("vit_small_patch16_224", 512),
    Case("vit_gigantic", 32, activation_checkpointing="selective"),
    Case("vit_large", 64, strategy="fsdp", compile="off", steps=5, plan=True),
    Case("vit_small_patch16_224", 512, loader=True, steps=45),
)
SMOKE = Case("vit_small_patch16_224", 256, steps=45)
TINY = Case("test_vit", 16, tiny=True)
# What makes a case another kind of case; on a CPU each kind is run once.
KINDS = ("strategy", "activation_checkpointing", "checkpoint", "plan", "loader")


class SyntheticViews:
    """Stands for source and loader: the same two batches of noise, on the device."""

    backend = name = "synthetic"
    labeled = False
    position = (0, 0)

    def __init__(self, cfg: train_config.Config, device: torch.device):
        shapes = [(cfg.data.batch_size, 3, size, size) for size in cfg.crops.view_sizes()]
        self._batches = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(2)]

    def __len__(self) -> int:
        return 10_000

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 0, "batch": 0}

    def set_epoch(self, epoch: int) -> None:
        pass

    def close(self) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[list[Tensor], None]]:
        return ((views, None) for views in itertools.cycle(self._batches))


class SyntheticTrainer(Trainer):
    """The trainer, on synthetic views."""

    def _open_data(self) -> None:
        self.loader = SyntheticViews(self.cfg, self.world.device)  # type: ignore[assignment]
        self.train_source = self.val_source = self.loader  # type: ignore[assignment]
        self.data_identity = {"train_images": len(self.loader), "val_images": 0, "names_sha256": ""}
        self.workers = 0


def measure(case: Case) -> Row:
    """The figures of a case, or `error` where it does not fit into memory."""
    process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    process |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
    with mock.patch.dict(os.environ, process if case.strategy != "none" else {}):
        world = setup_world("auto")
    try:
        with tempfile.TemporaryDirectory() as folder:
            row = run(case, world, Path(folder))
    except (RunError, torch.OutOfMemoryError) as error:  # the latter where the views do not fit
        if isinstance(error, RunError) and not str(error).startswith("out of"):
            raise
        return {"error": "out of memory", "peak_memory_gib": peak_memory_gib(world.device)}
    finally:
        close_world()
    if case.plan:
        cfg = dataclasses.replace(case.config(Path("planned")), precision=row["precision"])
        planned = plan_memory(cfg, shards=1, images=case.images)
        row["planned_memory_gib"] = planned.peak(1, case.images) / 2**30
    return row


def run(case: Case, world: World, folder: Path) -> Row:
    """Train, and read the figures from the metrics of the run."""
    cfg = case.config(folder / "run")
    if case.loader:
        images = folder / "images" / "all"
        make_folder(images, min(20 * case.images, DISTINCT))
        for number in range(DISTINCT, 20 * case.images):
            os.link(images / f"{number % DISTINCT:05d}.jpg", images / f"{number:05d}.jpg")
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=str(images.parent)))
    with (Trainer if case.loader else SyntheticTrainer)(cfg, world) as trainer:
        trainer.train()
    rows = read_rows(folder / "run" / "metrics.jsonl")
    facts = next(row for row in rows if row["kind"] == "run")
    logged = [row for row in rows if row["kind"] == "train"]
    later = [row for row in logged if row["step"] > WINDOW]
    speed, wait = (statistics.median(row[k] for row in later) for k in ("images_per_second", "data_wait"))
    names = ("parameters", "gflops_per_image", "precision", "sigreg_impl", "loader_backend", "loader_workers")
    result: Row = {name: facts[name] for name in names}
    result |= {
        "step_ms": 1e3 * case.images / speed,
        "images_per_second": speed,
        "windows": [row["images_per_second"] for row in later],
        "mfu": statistics.median(row["mfu"] for row in later) if "mfu" in later[-1] else None,
        "data_wait": wait,
        "peak_memory_gib": later[-1]["memory_gib"],
        "losses": [row["loss"] for row in logged],
        "sigreg_share": sigreg_seconds(trainer, cfg, world.device) * speed / case.images,
    }
    if not all(map(math.isfinite, result["losses"])):
        result["error"] = "a loss is not finite"
    if case.checkpoint:
        saved = [row for row in later if row["save_seconds"]][-1]
        slower = WINDOW * (speed / saved["images_per_second"] - 1)
        result["save_seconds"] = saved["save_seconds"]
        result["checkpoint_stall_steps"] = saved["save_seconds"] * speed / case.images + slower
    return result


def sigreg_seconds(trainer: Trainer, cfg: train_config.Config, device: torch.device) -> float:
    """Seconds of SIGReg's forward and backward alone, on embeddings of the run's shape."""
    shape = (cfg.crops.num_views, cfg.data.batch_size, cfg.model.projector_dim)
    z = torch.randn(*shape, device=device, requires_grad=True)
    clock = timing.GpuClock(device) if device.type == "cuda" else timing.wall_clock
    step = lambda: torch.autograd.grad(trainer.loss_fn.sigreg(z), z)  # noqa: E731
    return statistics.median([clock(step) for _ in range(8)][3:])


def run_case(case: Case) -> Row:
    """The figures of a case from its own process; `error` if it fails."""
    try:
        return timing.in_fresh_process(measure, case)
    except Exception as failure:
        return {"error": first_line(failure)}


def measure_all(
    cases: Sequence[Case], out: Path, budget_minutes: float, *, rehearse: bool = False
) -> list[Row]:
    """Run the cases while there is time, writing each row at once; returns the rows."""
    ends = time.monotonic() + 60 * budget_minutes
    rows: list[Row] = []
    waiting = list(cases)
    writer = Rows(out / "train.jsonl", "train", rehearsal=rehearse)
    while waiting and time.monotonic() <= ends:
        case = waiting.pop(0)
        figures = measure(case) if rehearse else run_case(case)
        rows += writer.write({**dataclasses.asdict(case), **figures})
        found = [f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float)]
        print(f"{case}: {figures.get('error') or ', '.join(found)}", flush=True)
        if figures.get("error") == "out of memory" and case.images >= 2 * SMALLEST_BATCH:
            waiting.insert(0, dataclasses.replace(case, images=case.images // 2))
    if waiting:
        print(f"out of time: {len(waiting)} case(s) left out")
    return rows


def shrunk(case: Case) -> Case:
    """The same kind of case in a second on a CPU."""
    kinds = {name: getattr(case, name) for name in KINDS}
    return dataclasses.replace(TINY, **kinds, steps=20 if case.checkpoint else WINDOW)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, rehearse="the GPU's cases in small, on the CPU")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="start no case after this long")
    parser.add_argument("--smoke", action="store_true", help="measure one short case; exit 1 if it fails")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available() and not options.rehearse
    cases: tuple[Case, ...] = (SMOKE,) if options.smoke else GPU_CASES
    if not gpu:
        cases = tuple(dict.fromkeys(map(shrunk, cases)))
    print(f"trainer on {machine()['device']}{'' if gpu else ': tiny sizes, no figure for GPUs'}")
    rows = measure_all(cases, options.out, options.budget_minutes, rehearse=options.rehearse)
    if not options.smoke and (gpu or options.rehearse):
        targets.print_judged(targets.judge(rows, "training"))
    print(f"rows: {options.out / 'train.jsonl'}")
    if not rows:
        print("no case was measured: --budget-minutes is over")
    errors = [row["error"] for row in rows if "error" in row]
    # Of the cases of a GPU, some may not fit into memory.
    broken = options.smoke or any("out of memory" not in error for error in errors)
    return int(len(errors) == len(rows) or (bool(errors) and broken))


if __name__ == "__main__":
    sys.exit(main())
