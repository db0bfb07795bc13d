"""What a resumed run takes from its checkpoint, what from its own settings, and what must be the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lejepa_fast.data import ImageSource
from lejepa_fast.data.identity import names_digest
from lejepa_fast.errors import UsageError
from lejepa_fast.train import checkpoint

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


def loader_state(state: Mapping[str, Any], data: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the loader takes from a checkpoint: of other images than the run's `data`, the epoch alone."""
    if state.get("data") in (None, data):
        return state["loader"]
    return {"epoch": state["loader"]["epoch"], "batch": 0}


def _counted(data: Mapping[str, Any]) -> str:
    return f"{data['train_images']} for training, {data['val_images']} held out"


def tensors_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: nn.Module,
    averaged: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint holds, by their names in it; they share memory with the run's.

    `averaged` are those of the averaged model; {} where there is none.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"loss.{name}": tensor for name, tensor in loss_fn.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in averaged.items()}
    for name, parameter in model.named_parameters():
        for slot, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{slot}"] = tensor
    return tensors


def tensors_to_load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: nn.Module,
    averaged: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Where `checkpoint.load_tensors` is to put what `tensors_of` gave, from any number of ranks.

    Makes the optimiser's state, in which there may be none yet; the ranks exchange nothing. An average in the
    checkpoint that this run does not continue is left out. UsageError naming a tensor that the run lacks.
    """
    saved = checkpoint.saved_tensors(path)
    optimizer.state.clear()
    wanted = tensors_of(model, optimizer, loss_fn, averaged)
    parameters = dict(model.named_parameters())
    slots: list[tuple[torch.nn.Parameter, str, str]] = []
    for name in sorted(saved.keys() - wanted.keys()):  # all ranks name the same one
        section, _, rest = name.partition(".")
        if section == "average" and not averaged:
            continue
        parameter, _, slot = rest.rpartition(".")
        if section != "optimizer" or parameter not in parameters:
            raise UsageError(
                f"checkpoint {path} does not fit this run: it holds {name}, which this model does not have; "
                "choose another --out"
            )
        slots.append((parameters[parameter], slot, name))
    for owner, slot, name in slots:
        like = saved[name]
        wanted[name] = (
            torch.empty_like(owner, dtype=like.dtype)
            if like.ndim and like.shape == owner.shape
            else torch.empty_like(like, device=owner.device)
        )
        optimizer.state[owner][slot] = wanted[name]
    return wanted


def load_schedule(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, saved: Mapping[str, Any]) -> None:
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
