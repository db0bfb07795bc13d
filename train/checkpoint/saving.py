"""Write checkpoints in the background, published whole or not at all.

Each rank copies the tensors that it writes to CPU memory; only that holds up the training. A thread then
writes them as safetensors into a temporary folder. When all ranks have written and synced their files, rank 0
adds state.json and the SHA-256 sums of all files and renames the folder. `storage.py` describes the format.

This does the work of `torch.distributed.checkpoint.async_save` with its safetensors writer in less: that one
copies the tensors which other ranks write as well, and serializes them to bytes under the interpreter's lock,
where the training cannot queue its next operation. `torch.distributed.checkpoint` reads what is written here.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections import ChainMap
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lejepa_fast.errors import RunError
from lejepa_fast.train.checkpoint import storage
from lejepa_fast.train.runtime.files import UNFINISHED, disk_errors_named, sync_folder, write_synced
from lejepa_fast.train.runtime.world import World, gather_to_main, on_all, on_main

log = logging.getLogger("lejepa_fast.train")

_WAY_OUT = "earlier checkpoints are untouched; free some space and run the same command again"


class Saver:
    """Saves checkpoints in `folder`, in the background, and keeps the newest `keep`. All ranks call every
    method. RunError if the folder that `folder` is in has gone."""

    def __init__(self, folder: Path, world: World, *, keep: int):
        # A group of its own: the thread's collectives must not meet those of the training.
        group = dist.new_group(backend="gloo") if world.distributed else None
        self._world = dataclasses.replace(world, control=group)
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._memory: dict[str, Tensor] = {}

    def start(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to save; returns as soon as the training may change the tensors again. RunError if the
        previous save failed.

        The names of the tensors are the same on all ranks. Of DTensors each rank writes its shards; plain
        tensors, of which each rank has a copy, and `state`, as JSON, are written by rank 0.
        """
        self.wait()
        copies, offsets = {}, {}
        for name, tensor in tensors.items():
            offset = _offset_to_write(tensor, self._world)
            if offset is not None:
                copies[name] = self._copy(name, tensor.detach())
                offsets[name] = offset
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        whole = {"format": storage.FORMAT, "version": storage.VERSION, "step": step, **state}
        path = storage.checkpoint_path(self._folder, step)
        self._saving = self._thread.submit(self._write, path, copies, offsets, whole)

    @property
    def failed(self) -> bool:
        """Whether the save in progress has failed already; `wait` raises the reason."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait for the save in progress. RunError on every rank if the disk of one refused it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait for a save in progress, log its failure instead of raising it, and release memory."""
        try:
            self.wait()
        except Exception as error:
            log.warning("%s", error)
        self._thread.shutdown()
        self._memory.clear()

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copy this rank's part into memory that is kept from save to save: pinned for copies from a GPU."""
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        copy = self._memory.get(name)
        if copy is None or copy.shape != own.shape or copy.dtype != own.dtype:
            copy = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
            self._memory[name] = copy
        return copy.copy_(own, non_blocking=own.is_cuda)

    # ---- in the thread -------------------------------------------------------------------------------

    def _write(
        self, path: Path, tensors: dict[str, Tensor], offsets: dict[str, Any], state: dict[str, Any]
    ) -> None:
        world, folder = self._world, unfinished(path)
        file = folder / f"shard-{world.rank + 1:05d}.safetensors"
        named = disk_errors_named(path, _WAY_OUT)

        def prepare() -> None:
            if not self._folder.parent.is_dir():  # a run that went on would have neither settings nor rows
                raise RunError(
                    f"{self._folder.parent} was removed or moved during the run; choose another --out"
                )
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier, killed save
            folder.mkdir(parents=True)

        def write() -> dict[str, str]:
            if not tensors:
                return {}
            write_shard(file, tensors, offsets)
            return {file.name: storage.sha256_of(file)}

        try:
            on_main(world, named(prepare))
            sums = gather_to_main(world, on_all(world, named(write))) or []
            on_main(world, named(lambda: self._publish(path, dict(ChainMap(*sums)), state)))
        except BaseException:
            if world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _publish(self, path: Path, sums: dict[str, str], state: dict[str, Any]) -> None:
        """Complete the checkpoint, rename its folder and delete old checkpoints."""
        folder = unfinished(path)
        text = (json.dumps(state, allow_nan=False) + "\n").encode()
        write_synced(folder / storage.STATE, text)
        sums[storage.STATE] = hashlib.sha256(text).hexdigest()
        manifest = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_synced(folder / storage.MANIFEST, manifest.encode())
        sync_folder(folder)
        if path.exists():
            _discard(path)
        os.rename(folder, path)
        sync_folder(path.parent)
        for old in storage.list_checkpoints(path.parent)[: -self._keep]:
            _discard(old)


def unfinished(path: Path) -> Path:
    """Return the temporary folder in which the checkpoint `path` is written."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def _offset_to_write(tensor: Tensor, world: World) -> tuple[int, ...] | None:
    """Where this rank's part lies in the whole tensor; None if this rank does not write a part of it."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim if world.is_main else None
    mesh, placements = tensor.device_mesh, tensor.placements
    first = all(mesh.get_local_rank(i) == 0 for i, p in enumerate(placements) if p.is_replicate())
    if not first or not tensor.to_local().numel():
        return None
    return compute_local_shape_and_global_offset(tensor.shape, mesh, placements)[1]


def _discard(path: Path) -> None:
    """Delete a checkpoint: rename it first, so that a kill leaves no partial one under its name."""
    gone = path.with_name(f".{path.name}.old{UNFINISHED}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def write_shard(path: Path, tensors: dict[str, Tensor], offsets: dict[str, Any]) -> None:
    """Write and sync a safetensors file; its metadata tells DCP's reader the place of each part."""
    places = {name: {SAVED_OFFSETS_KEY: offset} for name, offset in offsets.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # safetensors sets 0600 whatever the umask
    try:
        save_file(tensors, path, metadata={"format": "pt", CUSTOM_METADATA_KEY: json.dumps(places)})
    except SafetensorError as error:  # for a full disk its text holds the number of the system's error
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    with path.open("rb") as file:
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
