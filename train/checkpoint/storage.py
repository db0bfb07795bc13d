"""Find checkpoints, check them and read them.

A checkpoint is a folder, `checkpoints/step-00000123`, written by `saving.py`:

    shard-*.safetensors   tensors, by `torch.distributed.checkpoint` (DCP): each rank writes its share.
                          "model.NAME", "optimizer.NAME.SLOT" (moments and step of a parameter), "loss.NAME",
                          and with --average "average.NAME", the averaged model
    state.json            {"format", "version", "step", "config", "data", "loader", "average", "rng"}:
                          everything else. "data" identifies the images (`resume.data_identity`), "rng" has
                          an entry for each rank
    manifest.sha256       SHA-256 of every other file; `sha256sum -c` reads it

Any number of processes can read it. No file is a pickle, so no code in one can run. (DCP's default format has
a pickled index, `.metadata`, which torch 2.11 to 2.15 unpickle without restriction; its safetensors format
has none.) Reading changes nothing on the disk, because another process may still be writing the run; only the
trainer cleans up its own folder (`newest_checkpoint(..., own=True)`).
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
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
from lejepa_fast.regular_files import open_regular
from lejepa_fast.train.runtime.files import remove_unfinished

log = logging.getLogger("lejepa_fast.train")

# DCP warns so at each save and load of a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

FORMAT, VERSION = "lejepa_fast.checkpoint", 3
STATE, MANIFEST = "state.json", "manifest.sha256"
_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")
_EXPECTED = "give a run folder, or a folder checkpoints/step-*"
_MISFITS = (RuntimeError, ValueError, KeyError)  # how DCP refuses names and shapes


class UnreadableCheckpointError(Exception):
    """The checkpoint is damaged, or not one of this trainer. The message names the file and the reason."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of this step in `folder`."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first; [] if there is no such folder."""
    found = [(int(m.group(1)), p) for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


# ---- reading -----------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its SHA-256 and return the content of state.json.

    UnreadableCheckpointError if it is damaged, RunError if the file system refuses to read it, UsageError if
    a newer version of this package wrote it.
    """
    try:
        return _read_checked(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename).name if error.filename else path.name
        raise UnreadableCheckpointError(f"{missing} is missing") from error
    except OSError as error:
        if error.errno == errno.ENXIO:  # of `open_regular`
            raise UnreadableCheckpointError(f"{Path(error.filename).name} is {error.strerror}") from error
        raise RunError(
            f"cannot read {error.filename or path}: {error.strerror or error}; nothing was changed: "
            "run the same command again once it can be read"
        ) from error


def _read_checked(path: Path) -> dict[str, Any]:
    with open_regular(path / MANIFEST) as file:
        lines = file.read().decode("ascii", errors="replace").removesuffix("\n").split("\n")
    expected = {match[2]: match[1] for line in lines if (match := _MANIFEST_LINE.fullmatch(line))}
    if len(expected) != len(lines):
        raise UnreadableCheckpointError(f"{MANIFEST} is not a list of SHA-256 sums")
    present = {file.name for file in path.iterdir()} - {MANIFEST}
    if odd := sorted(present ^ set(expected)):
        problem = "is not in" if odd[0] in present else "is missing, but in"
        raise UnreadableCheckpointError(f"{odd[0]} {problem} {MANIFEST}")
    names = sorted(present)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, digest in zip(names, pool.map(lambda name: sha256_of(path / name), names), strict=True):
            if digest != expected[name]:
                raise UnreadableCheckpointError(f"{name} does not match its SHA-256 sum")
    try:
        state = json.loads((path / STATE).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpointError(f"{STATE} is not JSON: {error}") from error
    facts = state if isinstance(state, dict) else {}
    if facts.get("format") != FORMAT or not isinstance(facts.get("version"), int):
        raise UnreadableCheckpointError(f"{STATE} is not that of a checkpoint of lejepa_fast's trainer")
    if state["version"] > VERSION:
        raise UsageError(
            f"checkpoint {path} was written by a newer version (format {state['version']}, not {VERSION}); "
            "update lejepa_fast, or choose another --out"
        )
    return state


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def saved_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, on the meta device: shapes and dtypes. UsageError if a file
    is not in the safetensors format, although its SHA-256 matches."""
    try:
        found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise UsageError(f"checkpoint {path} holds files that are not safetensors: {error}") from error
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, entry in found.items()
    }


def load_tensors(path: Path, into: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fill tensors, sharded or not, from a checkpoint of any number of ranks. All ranks call it, or one that
    is `alone`, with whole tensors. UsageError if the checkpoint lacks a name or has it in another shape,
    RunError if a rank cannot read it, PyTorch's own error if there is no memory for it."""
    reader, alone = HuggingFaceStorageReader(str(path)), alone or not dist.is_initialized()
    try:
        dcp.load(into, storage_reader=reader, no_dist=alone)  # type: ignore[arg-type]
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(cause):
                raise cause from error  # `out_of_memory.settings_that_help` says what helps
            if not isinstance(cause, _MISFITS):
                reason = f"{first_line(cause)}; run the same command again"
                raise RunError(f"cannot load checkpoint {path}: {reason}") from error
        raise UsageError(
            f"checkpoint {path} does not fit this run: {first_line(causes[0])}; choose another --out"
        ) from error


def load_model(path: Path, section: str = "model") -> dict[str, Tensor]:
    """Load the whole model of a checkpoint to the CPU, by the names of its state dict. For one process,
    which other ranks need not follow.

    `section`: "model", "average" for the averaged model, or a part: "model.encoder".
    """
    saved, prefix = saved_tensors(path), f"{section}."
    whole = {n: torch.empty_like(t, device="cpu") for n, t in saved.items() if n.startswith(prefix)}
    load_tensors(path, whole, alone=True)
    return {name.removeprefix(prefix): tensor for name, tensor in whole.items()}


# ---- choosing ----------------------------------------------------------------------------------------


def newest_checkpoint(folder: Path, *, own: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest readable checkpoint in `folder` and its state, or None if there are no checkpoints.

    A damaged checkpoint is skipped with a warning. With `own` the caller is the trainer that writes to
    `folder`: it renames damaged ones to `*.damaged`, so that they do not count among the newest kept, and
    removes what a killed trainer left unfinished. RunError if checkpoints exist and none can be read.
    """
    if own:
        remove_unfinished(folder)
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return path, read_checkpoint(path)
        except UnreadableCheckpointError as error:
            log.warning("checkpoint %s cannot be read (%s): trying the one before it", path, error)
            if own:
                damaged = path.with_name(path.name + ".damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                path.rename(damaged)
    if paths:
        raise RunError(
            f"no checkpoint in {folder} can be read (tried {len(paths)}); "
            "train anew with another --out, or put a good copy back"
        )
    return None


def find_checkpoint(where: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that a user named, and its state: `where` is one, a run folder (its newest is
    taken) or the `checkpoints` of a run folder. UsageError if there is none or it is damaged."""
    path = Path(where)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise UsageError(f"checkpoint {path} {problem}; {_EXPECTED}")
    if not _NAME.fullmatch(path.name):
        found = newest_checkpoint(path / "checkpoints") or newest_checkpoint(path)
        if found is None:
            raise UsageError(f"{path} holds no checkpoint; {_EXPECTED}")
        return found
    try:
        return path, read_checkpoint(path)
    except UnreadableCheckpointError as error:
        raise UsageError(f"checkpoint {path} cannot be read: {error}; give another one") from error
