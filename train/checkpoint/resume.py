"""What a resumed run takes from its checkpoint, what from its own settings, and what must be the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lejepa_fast.data import ImageSource
from lejepa_fast.data.identity import names_digest
from lejepa_fast.errors import UsageError
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.runtime.world import World, on_all, the_same_on_every_rank

log = logging.getLogger("lejepa_fast.train")


def is_own(path: Path, run_dir: Path) -> bool:
    """Whether a checkpoint is one of this run folder."""
    return path.resolve().parent == (run_dir / "checkpoints").resolve()


def choose_checkpoint(run_dir: Path, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run starts from, by `--resume`; None: it starts anew.

    Raises UsageError where later checkpoints of another course would be mixed with this run's: the newest
    are kept by their step, so they would outlive it.
    """
    own = run_dir / "checkpoints"
    if resume == "auto":
        return checkpoint.newest_checkpoint(own, own=True)
    there = checkpoint.list_checkpoints(own)
    if resume == "none":
        if there:
            raise UsageError(
                f"--resume none: {run_dir} holds checkpoints of an earlier run; nothing is overwritten; "
                "choose another --out, or --resume auto to continue that run"
            )
        return None
    path, state = checkpoint.find_checkpoint(resume)
    if there and there[-1].resolve() != path.resolve():
        raise UsageError(
            f"--resume {resume}: {run_dir} holds {there[-1].name}, which is not of that course; nothing is "
            "overwritten; choose another --out, or --resume auto to continue the run in there"
        )
    return path, state


def data_identity(train: ImageSource, val: ImageSource) -> dict[str, Any]:
    """Which images a run trains on and which it holds out: counts and a digest of their names."""
    names = names_digest({"train": train, "val": val})
    return {"train_images": len(train), "val_images": len(val), "names_sha256": names}


def check_same_run(
    state: Mapping[str, Any], current: Mapping[str, Any], data: Mapping[str, Any], path: Path, run_dir: Path
) -> None:
    """UsageError where the run folder is that of another seed or of other images.

    `current` is the configuration as `config.to_dict` gives it, `data` the run's `data_identity`. From a
    checkpoint of another run folder a run may go on with other images; then a warning says what it means.
    """
    if is_own(path, run_dir) and state["config"]["seed"] != current["seed"]:
        raise UsageError(
            f"seed: {run_dir} holds a run with seed {state['config']['seed']}, and this one has "
            f"{current['seed']}; choose another --out, or continue that run with its seed"
        )
    before = state.get("data")
    if before is None or before == data:
        return
    theirs, ours = state["config"]["data"]["path"], current["data"]["path"]
    difference = (
        f"the checkpoint {path} was trained on other images ({_counted(before)} of {theirs}) than this run "
        f"has ({_counted(data)} of {ours})"
    )
    if is_own(path, run_dir):
        raise UsageError(
            f"data: {difference}; choose another --out, or continue with the same --data and "
            "--data.val-fraction"
        )
    log.warning(
        "%s: some that are held out now may have been trained on; its list of bad images is not taken over, "
        "and the epoch begins anew",
        difference,
    )


def _counted(data: Mapping[str, Any]) -> str:
    return f"{data['train_images']} for training, {data['val_images']} held out"


@dataclass(frozen=True)
class Parts:
    """What of a run its checkpoints hold, but for the random states of the ranks and the configuration.

    `data` is the run's `data_identity`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: nn.Module
    scheduler: LambdaLR
    loader: Any
    average: WeightAverage | None
    data: Mapping[str, Any]

    def state(self) -> dict[str, Any]:
        """What is no tensor, as JSON has it."""
        return {
            "data": self.data,
            "scheduler": self.scheduler.state_dict(),
            "loader": self.loader.state_dict(),
            "average": self.average and self.average.state(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a checkpoint; they share memory with the run's."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"loss.{name}": tensor for name, tensor in self.loss_fn.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.averaged().items()}
        for name, parameter in self.model.named_parameters():
            for slot, tensor in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{slot}"] = tensor
        return tensors

    def averaged(self) -> dict[str, Tensor]:
        """Those of the averaged model; {} where there is none, or none yet."""
        return self.average.tensors() if self.average is not None else {}

    def load(self, path: Path, state: Mapping[str, Any], world: World) -> None:
        """The inverse of both, from a checkpoint of any number of ranks; all ranks call it.

        Of other images than the run's the loader takes the epoch alone. An average in the checkpoint that
        this run does not continue is left out.
        UsageError naming a tensor that the run or the checkpoint does not have, or has in another shape.
        """
        if self.average is not None:
            self.average.restore(state.get("average"))
        tensors = on_all(world, lambda: self._tensors_to_load(path))
        with the_same_on_every_rank():  # what fails on one
            checkpoint.load_tensors(path, tensors)
        if self.average is not None:
            self.average.follow()
        _load_schedule(self.optimizer, self.scheduler, state["scheduler"])
        same_images = state.get("data") in (None, self.data)
        position = {"epoch": state["loader"]["epoch"], "images_seen": 0}
        self.loader.load_state_dict(state["loader"] if same_images else position)

    def _tensors_to_load(self, path: Path) -> dict[str, Tensor]:
        """As `tensors`, with the optimiser's state made, in which there may be none yet."""
        saved = checkpoint.saved_tensors(path)
        self.optimizer.state.clear()
        wanted = self.tensors()
        parameters = dict(self.model.named_parameters())
        for name in sorted(saved.keys() - wanted.keys()):  # of several, all ranks name the same
            section, _, rest = name.partition(".")
            if section == "average" and not self.averaged():
                continue
            parameter, _, slot = rest.rpartition(".")
            if section != "optimizer" or parameter not in parameters:
                raise UsageError(
                    f"checkpoint {path} does not fit this run: it holds {name}, which this model does not "
                    "have; choose another --out"
                )
            owner, like = parameters[parameter], saved[name]
            wanted[name] = (
                torch.empty_like(owner, dtype=like.dtype)
                if like.ndim and like.shape == owner.shape
                else torch.empty_like(like, device=owner.device)
            )
            self.optimizer.state[owner][slot] = wanted[name]
        return wanted


def _load_schedule(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, saved: Mapping[str, Any]) -> None:
    """Load the position in the schedule; rate, decay and betas stay those of this run's settings.

    The rate of the next step follows from the schedule of this run, which may be longer than that of the
    checkpoint.
    """
    base_lrs = scheduler.base_lrs
    scheduler.load_state_dict(dict(saved))
    scheduler.base_lrs = base_lrs
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def tell_changes(saved: dict[str, Any], current: dict[str, Any], where: str = "") -> None:
    """Log every setting that differs from the checkpoint's: a resumed run may then take another course."""
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key), current.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            tell_changes(before, now, f"{where}{key}.")
        elif before != now and key not in ("out", "resume"):
            log.warning("%s%s: the checkpoint has %s, this run %s", where, key, before, now)
