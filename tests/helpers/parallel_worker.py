"""What each rank runs for test_parallel.py and test_plan.py; imported by spawned processes."""

import gc
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from training import CPU, changed, spoil, tiny_config

from lejepa_fast.data.loader import MultiCropLoader
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.regularizer import SIGReg
from lejepa_fast.train.checkpoint.saving import Saver
from lejepa_fast.train.config import Config, LossConfig, from_dict
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model import initialize
from lejepa_fast.train.model.initialize import named_tensors
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.parallel.parallelize import center_model, make_mesh, parallelize
from lejepa_fast.train.planning.memory import PlannedStep
from lejepa_fast.train.pretrain import pretrain
from lejepa_fast.train.runtime.world import World, reported_elsewhere

STEPS = 12
SWIN = '{"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "strict_img_size": false}'
# Small members of each family: timm's name, arguments, size of the local crops.
FAMILIES: dict[str, tuple[str, int]] = {
    "resnet50": ('{"layers": [1, 1, 1, 1], "channels": [4, 8, 12, 16]}', 32),
    "convnextv2_nano": ('{"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}', 32),
    "swin_tiny_patch4_window7_224": (SWIN, 32),
    "maxvit_tiny_rw_224": ('{"embed_dim": [32, 64], "depths": [1, 1]}', 64),
    "efficientnet_b0": ("{}", 32),
    "vit_small_patch16_224": ('{"embed_dim": 32, "depth": 2, "num_heads": 2}', 32),
}


def family_config(name: str, **parallel: Any) -> Config:
    kwargs, local_size = FAMILIES[name]
    model = {"name": name, "kwargs": kwargs, "projector_hidden": 32, "projector_dim": 16}
    model["register_tokens"] = 2 if name.startswith("vit") else 0
    crops = {"global_size": 64, "local_crops": 2, "local_size": local_size}
    return from_dict({"crops": crops, "model": model, "parallel": parallel})


def run_config(images: str, out: Path, **changes: Any) -> Config:
    """12 steps of a small transformer, 4 an epoch: clipping, averaged weights, probes after 2 epochs.

    From step 3 on the center of the views comes from the averaged weights."""
    cfg = tiny_config(
        images,
        data={"backend": "auto"},
        model={"kwargs": '{"depth": 3}'},
        loss={"center_from": "average"},
        optim={"lr": 2e-4, "clip_grad_norm": 0.5},
        average={"kind": "ema", "decay": 0.7, "start": 0.1},
        eval={"every": 2, "linear_steps": 20},
        out=out,
        max_steps=STEPS,
        checkpoint_every=6,
    )
    return changed(cfg, **changes)


@contextmanager
def process_group(rank: int, size: int, folder: str) -> Iterator[World]:
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # Inductor's pool of processes, for Triton, starts in seconds
    dist.init_process_group("gloo", init_method=f"file://{folder}/init{size}", rank=rank, world_size=size)
    try:
        yield replace(CPU, rank=rank, size=size)
    finally:
        gc.collect()
        dist.destroy_process_group()


def run(rank: int, size: int, folder: str, images: str) -> None:
    """All that two ranks do; the results go to `folder/rankN.pt`. Some resume the run `folder/one`."""
    results: dict[str, Any] = {}
    root = Path(folder)
    middle = str(root / "one" / "checkpoints" / "step-00000006")
    ddp, fsdp = {"strategy": "ddp"}, {"strategy": "fsdp"}

    def cfg(name: str, **changes: Any) -> Config:
        return run_config(images, root / name, **changes)

    with process_group(rank, size, folder) as world:
        for name, changes in {
            "ddp": {"parallel": ddp},
            "fsdp": {"parallel": fsdp},
            "compiled": {"parallel": fsdp | {"activation_checkpointing": "selective"}, "compile": "on"},
            "one to fsdp": {"parallel": fsdp | {"activation_checkpointing": "full"}, "resume": middle},
        }.items():
            results[name] = train(cfg(name, **changes), world, whole=name == "fsdp")
        results["nan"] = spoiled_run(cfg("nan", parallel=fsdp, max_steps=9), world, steps={2, 5, 6, 7})
        spiked = cfg("spike", parallel=ddp, optim={"skip_grad_norm": 1e3}, max_steps=3)
        results["spike"] = spoiled_run(spiked, world, steps={2}, factor=1e6)
        saver = Saver(root / "copies", world, keep=1)  # values that differ, as running statistics on a CPU do
        saver.start(1, {f"model.{i}": torch.full((3,), float(rank)) for i in range(4)}, {})
        saver.wait()

        # Rank 0 cannot hold the model that it would evaluate.
        fails = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
        try:
            with Trainer(cfg("no room", parallel=fsdp, max_steps=1), world) as small:
                small.train()
                with mock.patch.object(initialize, "build_model", fails):
                    small.whole_model()
        except RunError as error:
            results["no room"] = str(error)
        own = root / f"images of rank {rank}"
        shutil.copytree(images, own)
        if rank == 1:
            next(own.glob("train/*/*")).unlink()
        found_here = {  # as where Triton or DALI cannot be used
            "other kernels": (SIGReg, "chosen_impl", ["triton", "torch"][rank]),
            "other loader": (MultiCropLoader, "backend", ["dali", "cpu"][rank]),
        }
        for name, changes in {
            "refused": {"parallel": fsdp, "resume": middle, "model": {"kwargs": '{"depth": 2}'}},
            "other options": {"optim": {"lr": [2e-4, 0.1][rank]}},
            "other images": {"data": {"path": str(own)}},
            **{name: {} for name in found_here},
        }.items():
            patch = mock.patch.object(*found_here[name]) if name in found_here else nullcontext()
            try:
                with patch:
                    Trainer(cfg(name, **changes), world).run()
            except UsageError as error:
                results[name] = str(error), reported_elsewhere(error, 1)
        del small
        for name in FAMILIES:
            results[name] = {kind: family_step(name, kind, rank) for kind in ("ddp", "fsdp")}
    torch.save(results, root / f"rank{rank}.pt")


def run_groups(rank: int, size: int, folder: str, images: str) -> None:
    """Two groups of two ranks: `folder/groups`, and what this rank holds of the model in rankN-groups.pt."""
    with process_group(rank, size, folder) as world:
        trainer = Trainer(run_config(images, Path(folder) / "groups", parallel={"replicate": 2}), world)
        trainer.run()
        shards = {n: (tuple(t.shape), local(t).clone()) for n, t in trainer.model.named_parameters()}
        torch.save(shards, Path(folder) / f"rank{rank}-groups.pt")
        del trainer


def train(cfg: Config, world: World, *, whole: bool = False) -> dict[str, Any]:
    """Steps, sharded parameters, and the compiled graphs after each step; `whole`: all of pretraining."""
    if whole:
        pretrain(cfg, world)
    trainer = Trainer(cfg, world)
    graphs = count_graphs(trainer)
    sharded = sum(isinstance(p, DTensor) for p in trainer.model.parameters())
    return {"sigreg step": int(trainer.loss_fn.sigreg.step), "sharded": sharded, "graphs": graphs}


def count_graphs(trainer: Trainer) -> list[int]:
    """Train; returns the compiled graphs after each step."""
    graphs: list[int] = []
    step = trainer.train_step

    def counted(views: list[Tensor], epoch: int) -> None:
        step(views, epoch)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    trainer.train_step = counted
    trainer.run()
    return graphs


def spoiled_run(cfg: Config, world: World, steps: set[int], factor: float | None = None) -> dict[str, Any]:
    """On rank 1 images of these steps are NaN or, with a `factor`, the loss is that much larger.

    Returns the steps that changed any parameter or moment of this rank, the skipped steps, the error that
    ended the run, whether rank 0 alone tells it, and the images of this rank at each step.
    """
    trainer = Trainer(cfg, world)
    spoil(trainer, steps if world.rank == 1 else (), factor)
    step, make_batches = trainer.train_step, trainer.loader._backend.batches
    changed: list[int] = []
    images: list[list[int]] = []

    def state() -> list[Tensor]:
        slots = [t for per in trainer.optimizer.state.values() for t in per.values()]
        return [local(t).clone() for t in [*trainer.model.parameters(), *slots]]

    def noted(keys: Iterator[BatchKey], substitutes: Any) -> Iterator[Any]:
        return make_batches((images.append(list(key.indices)) or key for key in keys), substitutes)

    def followed(views: list[Tensor], epoch: int) -> None:
        number, before = trainer.step + 1, state()
        try:
            step(views, epoch)
        finally:
            after = state()
            if len(before) != len(after) or not all(map(torch.equal, before, after)):
                changed.append(number)

    trainer.train_step = followed
    trainer.loader._backend.batches = noted
    found: dict[str, Any] = {"changed": changed, "images": images, "error": ""}
    try:
        trainer.run()
    except RunError as caught:
        found |= {"error": str(caught), "left to rank 0": reported_elsewhere(caught, 1)}
    return found | {"skipped": trainer.guard.skipped}


def family_step(name: str, kind: str, rank: int) -> dict[str, Any]:
    """Weights after building from the meta device, those of a second model for the center of the views, then
    loss and gradients of one step."""
    cfg = family_config(name, strategy=kind, activation_checkpointing="full" if kind == "fsdp" else "none")
    model, mesh = build_model(cfg, meta=True), make_mesh(cfg.parallel, "cpu")
    called = parallelize(model, cfg, mesh, CPU.device)
    weights = {n: full(t).clone() for n, t in named_tensors(model)}
    second = center_model(model, replace(cfg, loss=LossConfig(center_from="average")), mesh, CPU.device)
    assert second is not None
    copied = {n: full(t).clone() for n, t in named_tensors(second)}
    generator = torch.Generator().manual_seed(rank)
    views = [torch.randn(2, 3, size, size, generator=generator) for size in cfg.crops.view_sizes()]
    torch.manual_seed(rank)  # drop path, which swin has by default
    _, z = called(views)
    loss = z.square().mean() + z[0].mean()
    loss.backward()
    grads = {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"weights": weights, "copied": copied, "loss": loss.detach(), "grads": grads}


def full(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def measure(rank: int, size: int, folder: str, cases: list[tuple[dict[str, Any], int]]) -> None:
    """Write this rank's peak bytes of each configuration and number of images to `folder/RANK.json`."""
    with process_group(rank, size, folder):
        peaks = [allocator_peak(from_dict(values), images) for values, images in cases]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(peaks))


def allocator_peak(cfg: Config, images: int) -> int:
    """The most bytes of the planned step on real tensors, counted by PyTorch's CPU allocator.

    The profiler does not see what other threads release (gloo's, where the weights are dealt out): it is what
    seems to be alive when all is gone.
    """
    gc.collect()  # what is left of another case must not be released, and so subtracted, in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = PlannedStep(cfg, images, fake=False)
        step.run()
        gc.collect()
        with record_function("measured step"):
            step.run()
        del step
        gc.collect()
    events = recorded.profiler.kineto_results.events()
    window = next(event for event in events if event.name() == "measured step")
    sizes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = peak = 0
    for when, size in sizes:
        alive += size
        if window.start_ns() <= when <= window.end_ns():
            peak = max(peak, alive)
    return peak - alive
