"""Checkpoints: written whole or not at all, found again, and checked before they are used.

A checkpoint is one file, `checkpoints/step-00000123.pt`, written by rank 0 with `torch.save` and read
with `weights_only=True`: tensors, numbers, strings and containers, no code. Its records carry CRC-32
sums, and reading verifies them, so a cut-off file and changed contents are found before they are used
(the few bytes of zip headers between the records carry no sum).

    {"format", "version", "step", "config", "data", "model", "optimizer", "scheduler", "loss", "loader",
     "rng"}

`data` says which images the run trains on (`resume.data_identity`), `loss` is the state of the loss module
(the SIGReg step), `rng` a list with one entry per rank.

Reading changes nothing on the disk: another program may read a run that is still being written. Only the
trainer cleans up, in its own folder (`newest_checkpoint(..., own=True)`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.files import remove_unfinished, write_atomically

log = logging.getLogger("lejepa_fast.train")

FORMAT = "lejepa_fast.checkpoint"
VERSION = 1
_NAME = re.compile(r"step-(\d{8,})\.pt")


class UnreadableCheckpointError(Exception):
    """The file is damaged or no checkpoint of this trainer. `args[0]` is the reason, without the path."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; [] if there is no such folder."""
    found = [(int(m.group(1)), p) for p in folder.glob("step-*.pt") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `step`, then remove all but the `keep` newest; RunError if the disk refuses."""
    path = checkpoint_path(folder, step)
    whole = {"format": FORMAT, "version": VERSION, "step": step, **state}
    write_atomically(
        path,
        lambda file: torch.save(whole, file),
        way_out="earlier checkpoints are untouched; free some space and run the same command again",
    )
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    remove_unfinished(folder)
    return path


class _RememberingReader(io.FileIO):
    """A file that keeps the OSError of a read: PyTorch's reader may report another error instead."""

    error: OSError | None = None

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.error = error
            raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU. Nothing in the file is executed, and nothing on the disk changes.

    Raises UnreadableCheckpointError if it is damaged or something else, RunError if the disk or the rights
    do not let it be read (it may be good), UsageError if a newer version wrote it.
    """
    raw: _RememberingReader | None = None
    try:
        raw = _RememberingReader(path)
        with io.BufferedReader(raw) as file:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch.load itself ignores the sums
            if damaged is not None:
                raise UnreadableCheckpointError(f"checksum of {damaged} is wrong")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (UnreadableCheckpointError, MemoryError):
        raise
    except Exception as error:  # a damaged archive makes its readers raise anything
        refused = error if isinstance(error, OSError) else raw.error if raw else None
        if refused is not None:
            raise RunError(
                f"cannot read {path}: {refused.strerror or refused}; it is left as it is: "
                "run the same command again once it can be read"
            ) from error
        text = str(error).strip().splitlines()
        raise UnreadableCheckpointError(text[0] if text else type(error).__name__) from error
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
    return state


def newest_checkpoint(folder: Path, *, own: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None where there is none at all.

    A damaged file is passed over with a warning. `own`: the caller is the trainer that writes to `folder`,
    and a damaged file is also renamed to `*.damaged`, since under its own name it would count among the
    newest kept; files that a killed trainer left unfinished are removed.
    Raises RunError where files exist and none can be read, and what `read_checkpoint` raises.
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
                _set_aside(path)
    if paths:
        raise RunError(
            f"no checkpoint in {folder} can be read (tried {len(paths)}); "
            "train anew with another --out, or put a good copy back"
        )
    return None


def _set_aside(path: Path) -> None:
    try:
        path.rename(path.with_name(path.name + ".damaged"))
    except OSError as error:
        raise RunError(f"cannot rename the damaged {path}: {error.strerror}; move it away") from error


def find_checkpoint(where: str | Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a user named: a file, a run folder or its `checkpoints`.

    Changes nothing on the disk. UsageError if there is none, and what `read_checkpoint` raises.
    """
    path = Path(where)
    if path.is_dir():
        for folder in (path / "checkpoints", path):
            found = newest_checkpoint(folder)
            if found is not None:
                return found
        raise UsageError(f"{path} holds no checkpoint; give a run folder, or a file checkpoints/step-*.pt")
    if not path.exists():
        raise UsageError(
            f"checkpoint {path} does not exist; give a run folder, or a file checkpoints/step-*.pt"
        )
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


def capture_rng() -> dict[str, Any]:
    """All random states of this process, as `torch.load(weights_only=True)` accepts them."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever happens inside, the random states afterwards are those from before."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)


def seed_rng(seed: int) -> None:
    """Set all random states of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
