"""Runs of masked prediction for tests: a small configuration, and what each rank of two runs."""

from pathlib import Path
from typing import Any

import torch
from parallel_worker import full, process_group
from torch import Tensor
from torch.distributed.tensor import DTensor
from training import changed, tiny_config

from lejepa_fast.train.checkpoint.trained_model import load_trained
from lejepa_fast.train.config import Config
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.world import World

STEPS = 20
CASES = [("ijepa", "ddp"), ("ijepa", "fsdp"), ("masked-lejepa", "fsdp")]


def run_config(images: str, out: Path, objective: str = "ijepa", **changes: Any) -> Config:
    """20 steps of a small transformer, 4 an epoch."""
    cfg = tiny_config(
        images,
        objective=objective,
        crops={"global_crops": 1, "local_crops": 0, "blur_prob": 0.0},
        model={"kwargs": '{"depth": 2, "patch_size": 4}'},  # 8 x 8 patches
        masked={"predictor_width": 32, "predictor_depth": 2, "predictor_heads": 4, "momentum": 0.9},
        optim={"weight_decay": 0.04, "final_weight_decay": 0.4},
        eval={"linear_steps": 20},
        out=out,
        max_steps=STEPS,
    )
    return changed(cfg, **changes)


def run(rank: int, size: int, folder: str, images: str) -> None:
    """The runs `folder/NAME` of two ranks, and one resumed; the results go to `folder/rankN.pt`."""
    results: dict[str, Any] = {}
    with process_group(rank, size, folder) as world:
        for objective, strategy in CASES:
            name = f"{objective} {strategy}"
            parallel = {"strategy": strategy, "activation_checkpointing": "selective"}
            options = {"parallel": parallel, "checkpoint_every": STEPS // 2}
            cfg = run_config(images, Path(folder) / name, objective, **options)
            results[name] = train(cfg, world)
            if (objective, strategy) == ("ijepa", "fsdp"):
                middle = str(cfg.out / "checkpoints" / f"step-{STEPS // 2:08}")
                cfg = run_config(images, Path(folder) / "resumed", objective, resume=middle, **options)
                results["resumed"] = train(cfg, world)
        if rank == 0:  # as the report does; the other rank goes on
            assert load_trained(cfg.out).whole is not None
    torch.save(results, Path(folder) / f"rank{rank}.pt")


def train(cfg: Config, world: World) -> dict[str, Any]:
    """Train; returns whole target and context encoder by name, and the number of sharded parameters."""
    trainer = Trainer(cfg, world)
    trainer.run()
    sharded = sum(isinstance(tensor, DTensor) for tensor in trainer.model.parameters())
    return {"target": whole(trainer, "target"), "encoder": whole(trainer, "encoder"), "sharded": sharded}


def whole(trainer: Trainer, part: str) -> dict[str, Tensor]:
    """Copies of the parameters of a part of the model, gathered; {} if it has no such part."""
    prefix = f"{part}."
    found = [(name, p) for name, p in trainer.model.named_parameters() if name.startswith(prefix)]
    return {name.removeprefix(prefix): full(tensor).clone() for name, tensor in found}
