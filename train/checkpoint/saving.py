"""Writing checkpoints while the training goes on: published whole or not at all.

The tensors are copied to the CPU, which is all that the training waits for; a thread then writes them with
`torch.distributed.checkpoint`, every rank its own share as safetensors, into a folder with another name. When
all ranks have written and synced theirs, rank 0 adds what is no tensor and the SHA-256 sums of all files, and
renames the folder. See `checkpoint.py` for the format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, HuggingFaceStorageWriter
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    _gen_file_name,
)
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from lejepa_fast.errors import RunError
from lejepa_fast.train.checkpoint.storage import (
    FORMAT,
    MANIFEST,
    STATE,
    VERSION,
    checkpoint_path,
    list_checkpoints,
    sha256_of,
)
from lejepa_fast.train.runtime.files import UNFINISHED, sync_folder
from lejepa_fast.train.runtime.world import World, the_same_on_every_rank

log = logging.getLogger("lejepa_fast.train")

_WAY_OUT = "earlier checkpoints are untouched; free some space and run the same command again"


class Saver:
    """Saves checkpoints of one run, one at a time, in the background. All ranks call every method."""

    def __init__(self, folder: Path, world: World, *, keep: int):
        self._folder = folder
        self._keep = keep
        self._world = world
        # Of its own: the thread's collectives must not meet those of the training.
        self._group: Any = dist.new_group(backend="gloo") if world.distributed else None
        self._saving: Future[Any] | None = None
        # On the CPU each rank has running statistics of its own: those of a checkpoint are rank 0's. On GPUs
        # what all ranks have is equal, and the rank with the least to write writes it.
        self._from_rank_0 = world.device.type == "cpu"
        self._stager = _Stager(pinned=world.device.type == "cuda")
        self._path = folder

    def start(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to save; returns as soon as the training may change the tensors again.

        `tensors` are the same names on all ranks, DTensors or equal copies. `state` is everything else, as
        JSON has it; that of rank 0 is written. Raises what `wait` does, for the save before.
        """
        self.wait()
        self._path = checkpoint_path(self._folder, step)
        whole = {"format": FORMAT, "version": VERSION, "step": step, **state}
        writer = _PublishingWriter(self._path, whole, keep=self._keep)
        saving = dcp.async_save(
            tensors,
            storage_writer=writer,
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=self._from_rank_0),
            process_group=self._group,
            async_stager=self._stager,
            no_dist=self._group is None,
        )
        assert isinstance(saving, Future)
        self._saving = saving

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed already; `wait` then says why."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait for the save under way. RunError on every rank if it failed on one."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except (Exception, CheckpointException) as error:  # the latter is none of the former
            if self._world.is_main:
                shutil.rmtree(unfinished(self._path), ignore_errors=True)
            causes = [error, *_failures(error)]
            refused = next((cause for cause in causes if isinstance(cause, OSError)), None)
            if refused is None:
                raise
            reason = refused.strerror or refused
            with the_same_on_every_rank():
                raise RunError(f"cannot write {self._path}: {reason}; {_WAY_OUT}") from error

    def close(self) -> None:
        """Wait for a save that is still under way, since something else ended the run, and release memory.

        Its failure is only logged.
        """
        try:
            self.wait()
        except (Exception, CheckpointException) as error:
            log.warning("%s", error)
        self._stager.close()


def unfinished(path: Path) -> Path:
    """Where a checkpoint is written before it gets its name, and where it goes before it is deleted."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def _failures(error: BaseException) -> list[BaseException]:
    if not isinstance(error, CheckpointException):
        return []
    return [failure[0] for failure in error.failures.values()]


class _Stager(AsyncStager):
    """Copies a flat state dict to the CPU, into contiguous memory that is kept from save to save.

    From a GPU it is pinned memory, which takes the copy at full speed, as long as there is some: PyTorch
    rounds each piece up to a power of two. (DCP's own stager cannot be used twice with torch 2.11, and keeps
    layouts that safetensors refuses.)
    """

    _synchronize_after_execute = False

    def __init__(self, *, pinned: bool):
        self._pinned = pinned
        self._memory: dict[str, Tensor] = {}

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        staged = {name: self._copy(name, tensor) for name, tensor in state_dict.items()}
        if any(tensor.is_cuda for tensor in state_dict.values()):
            torch.cuda.synchronize()
        return staged

    def synchronize_staging(self) -> None:
        """Nothing to do: `stage` returns when the copy is there."""

    def close(self) -> None:
        self._memory.clear()

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        kept = self._memory.get(name)
        if kept is None or kept.shape != own.shape or kept.dtype != own.dtype:
            kept = self._memory[name] = self._allocate(own)
        kept.copy_(own, non_blocking=kept.is_pinned())
        if not isinstance(tensor, DTensor):
            return kept
        # On the mesh of the GPUs, though it lies on the CPU, which `from_local` does not let be: nothing
        # communicates through it, and a mesh of CPUs would make groups of processes for its dimensions.
        return DTensor(kept, tensor._spec, requires_grad=False)

    def _allocate(self, like: Tensor) -> Tensor:
        if self._pinned:
            try:
                return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
            except RuntimeError as error:  # CUDA's, and not an OutOfMemoryError
                self._pinned = False
                log.warning(
                    "no pinned memory for all of a checkpoint's copy (%s): the rest is copied to pageable "
                    "memory, which takes longer",
                    str(error).partition("\n")[0],
                )
        return torch.empty(like.shape, dtype=like.dtype)


@dataclasses.dataclass(frozen=True)
class _Written:
    """What a rank tells of a file: its name in the checkpoint and its sum."""

    name: str
    sha256: str


class _PublishingWriter(HuggingFaceStorageWriter):
    """DCP's writer of safetensors that sums its files, and publishes the folder when all ranks are done."""

    def __init__(self, path: Path, state: dict[str, Any], *, keep: int):
        self._final, self._temporary = path, unfinished(path)
        self._state, self._keep = state, keep
        super().__init__(str(self._temporary), save_distributed=True)

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        # On one rank, before any writes: what an earlier, killed save left here is not of this checkpoint.
        for left in self._temporary.iterdir():
            left.unlink()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> torch.futures.Future[list[Any]]:
        """What DCP's own does, without the interpreter's lock: that one serialises the whole file to bytes
        under the lock, and meanwhile the training cannot queue its next operation."""
        tensors = {item.index.fqn: planner.resolve_data(item).detach() for item in plan.items}
        results: list[WriteResult] = []
        if tensors:
            name = _gen_file_name(1, 1, plan.storage_data["shard_index"])
            offsets = {
                item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets} for item in plan.items
            }
            _save_synced(self._temporary / name, tensors, offsets)
            written = _Written(name, sha256_of(self._temporary / name))
            results = [
                WriteResult(item.index, tensors[item.index.fqn].nbytes, storage_data=written)
                for item in plan.items
            ]
        done: torch.futures.Future[list[Any]] = torch.futures.Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """On rank 0, when every rank has written."""
        sums = {result.storage_data.name: result.storage_data.sha256 for part in results for result in part}
        text = (json.dumps(self._state, allow_nan=False) + "\n").encode()
        _write_synced(self._temporary / STATE, text)
        sums[STATE] = hashlib.sha256(text).hexdigest()
        manifest = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        _write_synced(self._temporary / MANIFEST, manifest.encode())
        sync_folder(self._temporary)
        if self._final.exists():
            discard(self._final)
        os.rename(self._temporary, self._final)
        sync_folder(self._final.parent)
        for old in list_checkpoints(self._final.parent)[: -self._keep]:
            discard(old)


def discard(path: Path) -> None:
    """Delete a checkpoint. Killed in the middle, it leaves no half one under a checkpoint's name."""
    gone = path.with_name(f".{path.name}.old{UNFINISHED}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _save_synced(path: Path, tensors: dict[str, Tensor], offsets: dict[str, Any]) -> None:
    """Tensors as DCP's reader of safetensors expects them: where each lies in the whole one is metadata."""
    metadata = {
        CUSTOM_METADATA_KEY: json.dumps(offsets),
        DCP_VERSION_KEY: str(HF_DCP_VERSION),
        FORMAT_KEY: FORMAT_VALUE,
    }
    # safetensors gives its file mode 0600 whatever the umask, and a checkpoint is read by others as well.
    path.touch()
    usual = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # its words for a full disk hold the number of the system's error
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    with path.open("rb") as file:
        os.fchmod(file.fileno(), usual)
        os.fsync(file.fileno())


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
