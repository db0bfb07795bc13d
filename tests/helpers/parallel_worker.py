"""What each rank runs for test_parallel.py; imported by spawned processes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lejepa_fast.data import MultiCropRecipe
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.loss import LeJEPAOutput
from lejepa_fast.train.checkpoint.saving import Saver
from lejepa_fast.train.config import (
    AverageConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model import initialize
from lejepa_fast.train.model.initialize import named_tensors
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.parallel.parallelize import make_mesh, parallelize
from lejepa_fast.train.planning.out_of_memory import settings_that_help
from lejepa_fast.train.pretrain import pretrain
from lejepa_fast.train.runtime.world import World, reported_elsewhere

STEPS = 20
CPU = torch.device("cpu")

# Small members of each family: timm's name, arguments, size of the local crops.
FAMILIES: dict[str, tuple[str, int]] = {
    "resnet50": ('{"layers": [1, 1, 1, 1], "channels": [4, 8, 12, 16]}', 32),
    "convnextv2_nano": ('{"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}', 32),
    "swin_tiny_patch4_window7_224": (
        '{"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, '
        '"strict_img_size": false}',
        32,
    ),
    "maxvit_tiny_rw_224": ('{"embed_dim": [32, 64], "depths": [1, 1]}', 64),
    "efficientnet_b0": ("{}", 32),
    "vit_small_patch16_224": ('{"embed_dim": 32, "depth": 2, "num_heads": 2}', 32),
}


def family_config(name: str, **parallel: Any) -> Config:
    kwargs, local_size = FAMILIES[name]
    registers = 2 if name.startswith("vit") else 0
    return Config(
        crops=MultiCropRecipe(global_size=64, local_crops=2, local_size=local_size),
        model=ModelConfig(
            name, register_tokens=registers, kwargs=kwargs, projector_hidden=32, projector_dim=16
        ),
        parallel=ParallelConfig(**parallel),
    )


def run_config(images: str, out: Path, **changes: Any) -> Config:
    """20 steps of a small transformer, 4 an epoch: clipping, averaged weights, probes after 3 epochs."""
    cfg = Config(
        data=DataConfig(path=images, batch_size=8, workers=0),
        crops=MultiCropRecipe(global_size=32, local_crops=1, local_size=16, blur_kernel=3),
        model=ModelConfig(
            "test_vit",
            kwargs='{"depth": 3}',
            projector_hidden=32,
            projector_layers=2,
            projector_dim=16,
            projector_norm="layer",
        ),
        loss=LossConfig(num_slices=32),
        optim=OptimConfig(lr=2e-4, clip_grad_norm=0.5),
        average=AverageConfig(kind="ema", decay=0.7),
        eval=EvalConfig(every=3, linear_steps=20, batch_size=16, k=3),
        out=out,
        max_steps=STEPS,
        device="cpu",
        log_every=1,
        checkpoint_every=10,
        tensorboard=False,
    )
    return replace(cfg, **changes)


DDP = ParallelConfig(strategy="ddp")
FSDP = ParallelConfig(strategy="fsdp")
KEPT = ParallelConfig(strategy="fsdp", keep_gathered=True, activation_checkpointing="full")


def jobs(images: str, folder: Path) -> dict[str, Config]:
    """The runs on two ranks. Those that resume do so from a run on one rank, `folder/one`."""

    def run(name: str, **changes: Any) -> Config:
        return run_config(images, folder / name, **changes)

    middle = str(folder / "one" / "checkpoints" / "step-00000010")
    recomputing = replace(FSDP, activation_checkpointing="selective")
    return {
        "ddp": run("ddp", parallel=DDP),
        "fsdp": run("fsdp", parallel=FSDP),
        "hsdp": run("hsdp", parallel=ParallelConfig(replicate=2)),
        "compiled": run("compiled", parallel=recomputing, compile="on"),
        "one to fsdp": run("one to fsdp", parallel=KEPT, resume=middle),
        "one to ddp": run("one to ddp", parallel=DDP, resume=middle),
    }


@contextmanager
def process_group(rank: int, size: int, folder: str) -> Iterator[World]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init{size}", rank=rank, world_size=size)
    try:
        yield World(CPU, rank=rank, size=size)
    finally:
        gc.collect()
        dist.destroy_process_group()


def run(rank: int, size: int, folder: str, images: str) -> None:
    """All that two ranks do; the results go to `folder/rankN.pt`."""
    root = Path(folder)
    results: dict[str, Any] = {}
    with process_group(rank, size, folder) as world:
        for name, cfg in jobs(images, root).items():
            results[name] = train(cfg, world, whole=name == "fsdp")
        spoiled = run_config(images, root / "nan", parallel=FSDP, max_steps=9)
        results["nan"] = spoiled_run(spoiled, world, steps={2, 5, 6, 7})
        for kind, parallel in (("ddp", DDP), ("fsdp", FSDP)):
            optim = OptimConfig(lr=2e-4, clip_grad_norm=0.5, skip_grad_norm=1e3)
            spiked = run_config(images, root / f"spike {kind}", parallel=parallel, optim=optim, max_steps=3)
            results[f"spike {kind}"] = spoiled_run(spiked, world, steps={2}, factor=1e6)
        saver = Saver(root / "copies", world, keep=1)  # values that differ, as running statistics on a CPU do
        saver.start(1, {f"model.{i}": torch.full((3,), float(rank)) for i in range(4)}, {})
        saver.wait()
        results["no room"] = run_without_room_for_the_whole(run_config(images, root / "no room"), world)
        results["refused"] = refused(images, root, world)
        for name in FAMILIES:
            results[name] = {kind: family_step(name, kind, rank) for kind in ("ddp", "fsdp")}
    torch.save(results, root / f"rank{rank}.pt")


def run_groups(rank: int, size: int, folder: str, images: str) -> None:
    """Two groups of two ranks: `folder/groups`, and what this rank holds of the model in rankN-groups.pt."""
    with process_group(rank, size, folder) as world:
        cfg = run_config(images, Path(folder) / "groups", parallel=ParallelConfig(replicate=2))
        trainer = Trainer(cfg, world)
        trainer.run()
        shards = {n: (tuple(t.shape), local(t).clone()) for n, t in trainer.model.named_parameters()}
        torch.save(shards, Path(folder) / f"rank{rank}-groups.pt")
        del trainer


def train(cfg: Config, world: World, *, whole: bool = False) -> dict[str, Any]:
    if whole:
        pretrain(cfg, world)
    trainer = Trainer(cfg, world)
    graphs: list[int] = []
    step = trainer.train_step

    def counted(views: list[Tensor], epoch: int) -> None:
        step(views, epoch)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    if cfg.compile == "on":
        trainer.train_step = counted  # type: ignore[method-assign]
    trainer.run()
    sharded = sum(isinstance(p, DTensor) for p in trainer.model.parameters())
    return {"sigreg step": int(trainer.loss_fn.sigreg.step), "sharded": sharded, "graphs": graphs}


def spoiled_run(cfg: Config, world: World, steps: set[int], factor: float | None = None) -> dict[str, Any]:
    """On rank 1 images of these steps are NaN or, with a `factor`, the loss is that much larger.

    Returns the steps that changed any parameter or moment of this rank, the skipped steps, the error that
    ended the run, whether rank 0 alone tells it, and the images of this rank at each step.
    """
    trainer = Trainer(cfg, world)
    step, make_batches = trainer.train_step, trainer.loader._backend.batches
    changed: list[int] = []
    images: list[list[int]] = []

    def is_bad() -> bool:
        return world.rank == 1 and trainer.step + 1 in steps

    def state() -> list[Tensor]:
        slots = [t for per in trainer.optimizer.state.values() for t in per.values()]
        return [local(t).clone() for t in [*trainer.model.parameters(), *slots]]

    def noted(keys: Iterator[BatchKey], substitutes: Any) -> Iterator[Any]:
        return make_batches((images.append(list(key.indices)) or key for key in keys), substitutes)

    def spoiled(views: list[Tensor], epoch: int) -> None:
        number, before = trainer.step + 1, state()
        if factor is None and is_bad():
            views[0][0] = torch.nan
        try:
            step(views, epoch)
        finally:
            after = state()
            if len(before) != len(after) or not all(map(torch.equal, before, after)):
                changed.append(number)

    def larger(module: Any, args: Any, out: LeJEPAOutput) -> LeJEPAOutput:
        return out._replace(total=out.total * factor) if factor and is_bad() else out

    trainer.loss_fn.register_forward_hook(larger)
    trainer.train_step = spoiled  # type: ignore[method-assign]
    trainer.loader._backend.batches = noted  # type: ignore[method-assign]
    found: dict[str, Any] = {"changed": changed, "images": images, "error": ""}
    try:
        trainer.run()
    except RunError as caught:
        found |= {"error": str(caught), "left to rank 0": reported_elsewhere(caught, 1)}
    return found | {"skipped": trainer.guard.skipped}


def refused(images: str, folder: Path, world: World) -> tuple[str, bool]:
    """The error of another model that resumes from `folder/one`, and whether rank 0 alone tells it."""
    middle = str(folder / "one" / "checkpoints" / "step-00000010")
    cfg = run_config(images, folder / "refused", parallel=FSDP, resume=middle)
    cfg = replace(cfg, model=replace(cfg.model, kwargs='{"depth": 2}'))
    with pytest.raises(UsageError) as caught:
        Trainer(cfg, world).run()
    return str(caught.value), reported_elsewhere(caught.value, 1)


def run_without_room_for_the_whole(cfg: Config, world: World) -> str:
    """The error of a sharded run where rank 0 cannot hold the model that it would evaluate."""

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    sharded = replace(cfg, parallel=FSDP, max_steps=1)
    try:
        with Trainer(sharded, world, settings_that_help) as trainer:
            trainer.train()
            with mock.patch.object(initialize, "allocate", full):
                trainer.whole_model()
    except RunError as error:
        return str(error)
    return "no error"


def family_step(name: str, kind: str, rank: int) -> dict[str, Any]:
    """Weights after building from the meta device, then loss and gradients of one step."""
    cfg = family_config(name, strategy=kind, activation_checkpointing="full" if kind == "fsdp" else "none")
    model = build_model(cfg, meta=True)
    called = parallelize(model, cfg, make_mesh(cfg.parallel, "cpu"), CPU)
    weights = {n: full(t).clone() for n, t in named_tensors(model)}
    generator = torch.Generator().manual_seed(rank)
    sizes = [cfg.crops.global_size] * 2 + [cfg.crops.local_size] * 2
    views = [torch.randn(2, 3, size, size, generator=generator) for size in sizes]
    torch.manual_seed(rank)  # drop path, which swin has by default
    _, z = called(views)
    loss = z.square().mean() + z[0].mean()
    loss.backward()
    grads = {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"weights": weights, "loss": loss.detach(), "grads": grads}


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
