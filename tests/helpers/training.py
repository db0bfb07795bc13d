"""Shared by the tests of the trainer: run one, in this process or on several ranks, and read its rows."""

import contextlib
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

import lejepa_fast.train
from lejepa_fast.data import MultiCropRecipe
from lejepa_fast.loss import LeJEPAOutput
from lejepa_fast.train import config
from lejepa_fast.train.checkpoint import storage
from lejepa_fast.train.config import Config, DataConfig, EvalConfig, LossConfig, ModelConfig, OptimConfig
from lejepa_fast.train.engine import trainer as engine
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model.flops import count_flops
from lejepa_fast.train.model.model import TrainedModule
from lejepa_fast.train.runtime.files import read_rows
from lejepa_fast.train.runtime.world import World

CPU = World(torch.device("cpu"))
SCRIPT = Path(lejepa_fast.train.__path__[0]) / "pretrain.py"


def tiny_config(images: str, **changes: Any) -> Config:
    """12 steps of 8 images in 3 epochs of a small transformer; changes as for `changed`."""
    cfg = Config(
        data=DataConfig(path=images, batch_size=8, workers=0, backend="torchvision"),
        crops=MultiCropRecipe(global_size=32, local_crops=1, local_size=16, blur_kernel=3),
        model=ModelConfig(
            name="test_vit", projector_hidden=32, projector_layers=2, projector_dim=16, projector_norm="layer"
        ),
        loss=LossConfig(num_slices=32),
        optim=OptimConfig(lr=1e-3),
        eval=EvalConfig(every=0, batch_size=16, k=3),
        epochs=3,
        device="cpu",
        log_every=1,
        tensorboard=False,
    )
    return changed(cfg, **changes)


def changed(cfg: Config, **changes: Any) -> Config:
    """Keywords replace fields, dicts those of a section."""
    for name, value in changes.items():
        new = replace(getattr(cfg, name), **value) if isinstance(value, dict) else value
        cfg = replace(cfg, **{name: new})
    return cfg


_counted: dict[Any, Any] = {}


def _count_once(cfg: Config, model: TrainedModule) -> Any:
    """Counting the operations of a model takes a second, and hundreds of runs here have equal ones."""
    key = cfg.objective, cfg.model, cfg.crops, cfg.loss, cfg.masked, cfg.data.channels, cfg.seed
    if key not in _counted:
        _counted[key] = count_flops(cfg, model)
    return _counted[key]


engine.count_flops = _count_once  # type: ignore[assignment]


def forkserver() -> ForkServerContext:
    """Context whose processes start at once, with the trainer and Dynamo imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lejepa_fast.train.engine.trainer"])
    return context


def run_ranks(worker: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """Run `worker(rank, *arguments)` in a process for each rank."""
    forkserver()
    mp.start_processes(worker, arguments, nprocs=ranks, start_method="forkserver")


def train_only(cfg: Config) -> Trainer:
    """Train in this process, without export, evaluation at the end and report."""
    trainer = Trainer(cfg, CPU)
    trainer.run()
    return trainer


def arguments_of(cfg: Config, folder: Path, *more: str) -> list[str]:
    """A command line that means `cfg`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{cfg.out.name if cfg.out else 'none'}.config.json"
    file.write_text(json.dumps(config.to_dict(cfg)))
    out = ["--out", str(cfg.out)] if cfg.out else []
    return ["--config", str(file), *out, "--resume", cfg.resume, *more]


def wait_until(
    condition: Callable[[], bool], *, alive: Callable[[], bool], log: Callable[[], str] = str
) -> None:
    """Wait for a condition as long as a process is alive, 10 minutes at most; `log` says why it is not."""
    deadline = time.monotonic() + 600
    while not condition():
        if not alive() or time.monotonic() > deadline:
            pytest.fail(f"it did not get there: {log()}")
        time.sleep(0.005)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to write larger files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian numbers of this seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether tensors of the same names are equal bit for bit."""
    assert one.keys() == other.keys()
    assert len(one) > 20
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def saved(cfg: Config, step: int, section: str) -> dict[str, Tensor]:
    """The tensors of a section of a checkpoint: model, average, optimizer or a part of one."""
    assert cfg.out is not None
    return storage.load_model(storage.checkpoint_path(cfg.out / "checkpoints", step), section)


def spoil(trainer: Trainer, steps: Collection[int], factor: float | None = None) -> None:
    """In these steps an image is NaN or, with a `factor`, the loss is that much larger."""
    step = trainer.train_step

    def spoiled(views: list[Tensor], epoch: int) -> None:
        if factor is None and trainer.step + 1 in steps:
            views[0][0] = torch.nan
        step(views, epoch)

    def larger(module: Any, args: Any, out: LeJEPAOutput) -> LeJEPAOutput:
        bad = factor is not None and trainer.step + 1 in steps
        return out._replace(total=out.total * factor) if bad else out

    trainer.train_step = spoiled  # type: ignore[method-assign]
    trainer.loss_fn.register_forward_hook(larger)


def rows_of(cfg: Config, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of this kind in metrics.jsonl."""
    assert cfg.out is not None
    return [row for row in read_rows(cfg.out / "metrics.jsonl") if row["kind"] == kind]


def course_of(cfg: Config) -> list[tuple[Any, ...]]:
    """Everything in the train rows that does not depend on the clock."""
    keys = ("step", "epoch", "loss", "prediction", "sigreg", "lr", "grad_norm", "embedding_std")
    return [tuple(row[key] for key in keys) for row in rows_of(cfg)]
