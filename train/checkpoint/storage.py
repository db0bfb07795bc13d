"""Checkpoints: found, and checked before they are used.

A checkpoint is a folder, `checkpoints/step-00000123`, written by `saving.py`:

    shard-*.safetensors   the tensors, by `torch.distributed.checkpoint`: each rank's share in its own file.
                          "model.NAME", "optimizer.NAME.SLOT" (moments and step of a parameter), "loss.NAME",
                          and "average.NAME", the averaged model, where the run keeps one
    state.json            {"format", "version", "step", "config", "data", "scheduler", "loader", "average",
                          "rng"}:
                          `data` says which images the run trains on (`resume.data_identity`), `rng` is a list
                          with an entry for each rank
    manifest.sha256       the SHA-256 sum of every other file, as `sha256sum -c` reads it

Any number of processes may read it. No file is a pickle, so no code in one can run: DCP's own format has a
pickled index and unpickles it without restriction (torch 2.11 to 2.15), its safetensors format has none.

Reading changes nothing on the disk: another program may read a run that is still being written. Only the
trainer cleans up, in its own folder (`newest_checkpoint(..., own=True)`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader

from lejepa_fast.errors import RunError, UsageError, first_line
from lejepa_fast.train.runtime.files import remove_unfinished

log = logging.getLogger("lejepa_fast.train")

# DCP says so at each save and load of a single process, and it is no news.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

FORMAT = "lejepa_fast.checkpoint"
VERSION = 2  # 1 was a single file, step-*.pt, and only ever in development versions
STATE, MANIFEST = "state.json", "manifest.sha256"
_NAME = re.compile(r"step-(\d{8,})")
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


class UnreadableCheckpointError(Exception):
    """The checkpoint is damaged or none of this trainer. `args[0]` is the reason; it names the file in it."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; [] if there is no such folder."""
    found = [(int(m.group(1)), p) for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


# ---- reading -----------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint and return what is no tensor, `state.json`; changes nothing on disk.

    Raises UnreadableCheckpointError if it is damaged or something else, RunError if the disk or the rights
    do not let it be read (it may be good), UsageError if a newer version wrote it.
    """
    try:
        return _read_checked(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename).name if error.filename else path.name
        raise UnreadableCheckpointError(f"{missing} is missing") from error
    except OSError as error:
        raise RunError(
            f"cannot read {error.filename or path}: {error.strerror or error}; it is left as it is: "
            "run the same command again once it can be read"
        ) from error


def _read_checked(path: Path) -> dict[str, Any]:
    sums = _read_manifest(path / MANIFEST)
    raw = (path / STATE).read_bytes()
    if hashlib.sha256(raw).hexdigest() != sums.get(STATE):
        raise UnreadableCheckpointError(f"{STATE} is not what its SHA-256 sum says")
    try:
        state = json.loads(raw)
    except ValueError as error:
        raise UnreadableCheckpointError(f"{STATE} is no JSON: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UnreadableCheckpointError("not a checkpoint of lejepa_fast's trainer")
    version = state.get("version")
    if not isinstance(version, int):
        raise UnreadableCheckpointError(f"expected the number of its format version, got {version!r}")
    if version > VERSION:
        raise UsageError(
            f"checkpoint {path} was written by a newer version (format {version}, known: {VERSION}); "
            "update lejepa_fast, or choose another --out"
        )
    there = {file.name for file in path.iterdir()} - {MANIFEST}
    if there != set(sums):
        odd = sorted(there ^ set(sums))[0]
        raise UnreadableCheckpointError(f"{odd} is {'not of this checkpoint' if odd in there else 'missing'}")
    names = sorted(there - {STATE})
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, digest in zip(names, pool.map(lambda n: sha256_of(path / n), names), strict=True):
            if digest != sums[name]:
                raise UnreadableCheckpointError(f"{name} is not what its SHA-256 sum says")
    return state


def _read_manifest(path: Path) -> dict[str, str]:
    try:
        text = path.read_bytes().decode("ascii")
        lines = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        raise UnreadableCheckpointError(f"{path.name} is no list of SHA-256 sums") from error
    found = [line for line in lines if line is not None]
    if not found or len(found) != len(lines):
        raise UnreadableCheckpointError(f"{path.name} is no list of SHA-256 sums")
    return {line.group(2): line.group(1) for line in found}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def saved_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the meta device: shapes and dtypes.

    UsageError for files that are no safetensors, though their sums say that they were written so.
    """
    try:
        found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise UsageError(f"checkpoint {path} holds files that are no safetensors: {error}") from error
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, entry in found.items()
    }


def load_tensors(path: Path, into: dict[str, Tensor]) -> None:
    """Fill these tensors, DTensors or not, from a checkpoint of any number of ranks. All ranks call it.

    UsageError where the checkpoint lacks a name or has it in another shape.
    """
    try:
        dcp.load(
            into,  # type: ignore[arg-type]
            storage_reader=HuggingFaceStorageReader(str(path)),
            no_dist=not dist.is_initialized(),
        )
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        cause = next((failure[0] for failure in failures), error)
        raise UsageError(
            f"checkpoint {path} does not fit this run: {first_line(cause)}; choose another --out"
        ) from error


def load_model(path: Path, section: str = "model") -> dict[str, Tensor]:
    """The whole model of a checkpoint on the CPU, by the names of its state dict; for one process.

    `section`: "average" for the averaged one (see `has_average`), and "model.encoder" for a part.
    """
    saved, prefix = saved_tensors(path), f"{section}."
    whole = {n: torch.empty_like(t, device="cpu") for n, t in saved.items() if n.startswith(prefix)}
    load_tensors(path, whole)
    return {name.removeprefix(prefix): tensor for name, tensor in whole.items()}


def has_average(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint, of which this is `state.json`, holds averaged weights."""
    return bool((state.get("average") or {}).get("count"))


# ---- choosing ----------------------------------------------------------------------------------------


def newest_checkpoint(folder: Path, *, own: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None where there is none at all.

    A damaged one is passed over with a warning. `own`: the caller is the trainer that writes to `folder`,
    and a damaged one is also renamed to `*.damaged`, since under its own name it would count among the
    newest kept; what a killed trainer left unfinished is removed.
    Raises RunError where checkpoints exist and none can be read, and what `read_checkpoint` raises.
    """
    if own:
        remove_unfinished(folder)
    paths = list_checkpoints(folder)
    if not paths and any(folder.glob("step-*.pt")):
        raise UsageError(
            f"{folder} holds checkpoints of an earlier development version (format 1, step-*.pt), which this "
            "one does not read; choose another --out"
        )
    for path in reversed(paths):
        try:
            return path, read_checkpoint(path)
        except UnreadableCheckpointError as error:
            log.warning("checkpoint %s cannot be read (%s): trying the one before it", path, error)
            if own:
                _set_aside(path)
    if paths:
        raise RunError(
            f"no checkpoint in {folder} can be read (tried {len(paths)}); "
            "train anew with another --out, or put a good copy back"
        )
    return None


def _set_aside(path: Path) -> None:
    aside = path.with_name(path.name + ".damaged")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    except OSError as error:
        raise RunError(f"cannot rename the damaged {path}: {error.strerror}; move it away") from error


def find_checkpoint(where: str | Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a user named: itself, a run folder or its `checkpoints`.

    Changes nothing on the disk. UsageError if there is none, and what `read_checkpoint` raises.
    """
    path = Path(where)
    if not path.exists():
        raise UsageError(
            f"checkpoint {path} does not exist; give a run folder, or a folder checkpoints/step-*"
        )
    if not path.is_dir():
        raise UsageError(
            f"checkpoint {path} is a file, not a checkpoint of lejepa_fast; give a run folder, or a folder "
            "checkpoints/step-*"
        )
    if not _NAME.fullmatch(path.name):
        for folder in (path / "checkpoints", path):
            found = newest_checkpoint(folder)
            if found is not None:
                return found
        raise UsageError(f"{path} holds no checkpoint; give a run folder, or a folder checkpoints/step-*")
    try:
        return path, read_checkpoint(path)
    except UnreadableCheckpointError as error:
        raise UsageError(f"checkpoint {path} cannot be read: {error}; give another one") from error


def check_same_model(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """UsageError naming both models where the checkpoint's model is another one than the run's.

    Both are configurations as `config.to_dict` gives them.
    """
    theirs, ours = dict(saved["model"]), dict(current["model"])
    # None means the size of the global crops.
    theirs["img_size"] = theirs["img_size"] or saved["crops"]["global_size"]
    ours["img_size"] = ours["img_size"] or current["crops"]["global_size"]
    # It acts in training only, and no weight depends on it.
    theirs.pop("drop_path", None)
    ours.pop("drop_path", None)
    if theirs == ours:
        return

    def named(options: dict[str, Any], other: dict[str, Any]) -> str:
        details = [f"{k} {v}" for k, v in options.items() if k != "name" and other.get(k) != v]
        return options["name"] + (f" ({', '.join(details)})" if details else "")

    raise UsageError(
        f"checkpoint {path} is of model {named(theirs, ours)}, and this run is of {named(ours, theirs)}; "
        "choose another --out, or the checkpoint's model"
    )
