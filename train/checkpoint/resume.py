"""What a resumed run takes from its checkpoint, what from its own settings, and what must be equal."""

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
from lejepa_fast.data.sources.base import names_digest
from lejepa_fast.errors import UsageError
from lejepa_fast.train.checkpoint import storage
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.runtime.world import World, on_all, same_error_on_all_ranks

log = logging.getLogger("lejepa_fast.train")


def is_own(path: Path, run_dir: Path) -> bool:
    """Whether a checkpoint belongs to this run folder."""
    return path.resolve().parent == (run_dir / "checkpoints").resolve()


def choose_checkpoint(run_dir: Path, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint that `--resume` asks for and its state; None: the run starts anew.

    UsageError if the run folder already holds other checkpoints. Those of the new run would be mixed with
    them, and the ones with more steps would be kept as the newest.
    """
    own = run_dir / "checkpoints"
    if resume == "auto":
        return storage.newest_checkpoint(own, own=True)
    existing = storage.list_checkpoints(own)
    found = None if resume == "none" else storage.find_checkpoint(resume)
    if existing and not (found and existing[-1].resolve() == found[0].resolve()):
        raise UsageError(
            f"--resume {resume}: {run_dir} holds checkpoints of another run ({existing[-1].name}); choose "
            "another --out, or --resume auto to continue that run"
        )
    return found


def data_identity(train: ImageSource, val: ImageSource) -> dict[str, Any]:
    """Identify the images of a run: counts of both splits and a digest of their names."""
    names = names_digest({"train": train, "val": val})
    return {"train_images": len(train), "val_images": len(val), "names_sha256": names}


def check_same_run(
    state: Mapping[str, Any], current: Mapping[str, Any], data: Mapping[str, Any], path: Path, run_dir: Path
) -> None:
    """Raise UsageError if the checkpoint `path` is of this run folder and of another seed or of other images.
    A checkpoint of another run folder may be of other images; a warning says what that means."""
    own, before = is_own(path, run_dir), state["data"]
    if own and state["config"]["seed"] != current["seed"]:
        raise UsageError(
            f"seed: {run_dir} holds a run with seed {state['config']['seed']}, and this one has "
            f"{current['seed']}; choose another --out, or continue that run with its seed"
        )
    if before == data:
        return
    theirs, ours = (
        f"({of['train_images']} for training, {of['val_images']} held out of {config['data']['path']})"
        for of, config in ((before, state["config"]), (data, current))
    )
    difference = f"the checkpoint {path} was trained on other images {theirs} than this run has {ours}"
    if own:
        way_out = "choose another --out, or continue with the same --data and --data.val-fraction"
        raise UsageError(f"data: {difference}; {way_out}")
    log.warning(
        f"{difference}: some that are held out now may have been trained on; the epoch starts over, without "
        "the list of bad images"
    )


@dataclass(frozen=True)
class TrainingState:
    """Everything in a checkpoint but the configuration and the random states of the ranks."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: nn.Module
    scheduler: LambdaLR
    loader: Any
    average: WeightAverage | None
    data: Mapping[str, Any]
    """The run's `data_identity`."""

    def state(self) -> dict[str, Any]:
        """Everything that is not a tensor, as JSON."""
        return {
            "data": self.data,
            "scheduler": self.scheduler.state_dict(),
            "loader": self.loader.state_dict(),
            "average": self.average and self.average.state(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in a checkpoint; they share memory with those of the run."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"loss.{name}": tensor for name, tensor in self.loss_fn.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.averaged().items()}
        for name, parameter in self.model.named_parameters():
            for slot, tensor in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{slot}"] = tensor
        return tensors

    def averaged(self) -> dict[str, Tensor]:
        """The tensors of the averaged model; {} if there is none yet."""
        return self.average.tensors() if self.average is not None else {}

    def load(self, path: Path, state: Mapping[str, Any], world: World) -> None:
        """Load a checkpoint of any number of ranks. All ranks call it. If it is of other images, the loader
        takes over the epoch only. An averaged model that this run does not continue is left out.

        UsageError if a tensor is missing in the run or in the checkpoint, or has another shape.
        """
        if self.average is not None:
            self.average.restore(state.get("average"))
        tensors = on_all(world, lambda: self._tensors_to_load(path))
        with same_error_on_all_ranks():  # DCP raises an error of one rank on all
            storage.load_tensors(path, tensors)
        if self.average is not None:
            self.average.follow()
        # The position in the schedule only: rate, decay and betas stay those of this run's settings, and the
        # rate of the next step follows this run's schedule, which may be longer than the checkpoint's.
        scheduler = self.scheduler
        scheduler.load_state_dict({**state["scheduler"], "base_lrs": scheduler.base_lrs})
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [base * f for base, f in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
        same_images = state["data"] == self.data
        position = {"epoch": state["loader"]["epoch"], "images_seen": 0}
        self.loader.load_state_dict(state["loader"] if same_images else position)

    def _tensors_to_load(self, path: Path) -> dict[str, Tensor]:
        """As `tensors`, with the optimiser's state allocated, which a new optimiser does not have."""
        saved = storage.saved_tensors(path)
        self.optimizer.state.clear()
        wanted = self.tensors()
        parameters = dict(self.model.named_parameters())
        for name in sorted(saved.keys() - wanted.keys()):
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
            if like.ndim and like.shape == owner.shape:  # sharded as the parameter
                wanted[name] = torch.empty_like(owner, dtype=like.dtype)
            else:
                wanted[name] = torch.empty_like(like, device=owner.device)
            self.optimizer.state[owner][slot] = wanted[name]
        return wanted


def log_changes(saved: dict[str, Any], current: dict[str, Any], where: str = "") -> None:
    """Warn of every setting that differs from the checkpoint's."""
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key), current.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            log_changes(before, now, f"{where}{key}.")
        elif before != now and key not in ("out", "resume"):
            log.warning("%s%s: the checkpoint has %s, this run %s", where, key, before, now)
