"""Pack a folder of images into WebDataset tar shards."""

import io
import logging
import math
import os
import re
import tarfile
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from lejepa_fast.data.draws import PACK, permutation
from lejepa_fast.data.sources import FolderSource, ImageSource, find_splits, open_place
from lejepa_fast.data.sources.decoding import naming_file
from lejepa_fast.errors import RunError, UsageError

log = logging.getLogger("lejepa_fast.data")

DEFAULT_SHARD_MB = 256.0
_STEM_LENGTH = 48  # with the number and the suffix, well within the 100 bytes of a plain tar header


def pack_folder(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    shard_mb: float = DEFAULT_SHARD_MB,
    seed: int = 0,
    verify: bool = True,
) -> dict[str, int]:
    """Write the images below a folder as shards. When it fails, `out_dir` is left as it was.

    Args:
        source: folder that `open_source` takes as a folder of images. With train/ and val/ below it both are
            packed, into sub-folders of those names; else the folder is packed as it is.
        out_dir: new or empty folder for the shards and `classes.txt`.
        shard_mb: size in MiB; a new shard begins before one grows past it.
        seed: chooses the order of the images.
        verify: decode every image first, so that no broken file ends up in a shard.

    Returns:
        Number of images by split: {"train": n, "val": m}, or {"": n} without splits.

    Raises:
        UsageError: `source` is missing or no folder of images, `out_dir` holds something, or `shard_mb` is
            no size.
        RunError: an image is unreadable, or writing fails.
    """
    source, out_dir = Path(source).expanduser(), Path(out_dir)
    if not 0 < shard_mb < math.inf:  # neither is NaN
        raise UsageError(f"shard_mb: expected a size in MiB, above 0, got {shard_mb}")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UsageError(f"{out_dir} exists and is not an empty folder; remove it or choose another name")
    train_place, val_place = find_splits(source)
    train = _folder(open_place(train_place, source))
    parts = {"train" if val_place else "": train}
    if val_place:
        parts["val"] = _folder(open_place(val_place, source, train))
    for name in train.classes or []:
        if len(name.splitlines()) != 1 or not name.encode("utf-8", "replace").decode() == name:
            raise UsageError(
                f"class {name!r}: classes.txt needs names of one line in UTF-8; rename the folder"
            )
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        place = {"prefix": f".{out_dir.name}.", "dir": str(out_dir.parent)}
        with tempfile.TemporaryDirectory(**place, ignore_cleanup_errors=True) as made:
            work = Path(made)
            for name, part in parts.items():
                _write_split(part, work / name, shard_mb * 2**20, seed, verify)
            if train.classes is not None:
                names = "".join(f"{name}\n" for name in train.classes)
                (work / "classes.txt").write_text(names, encoding="utf-8")
            work.chmod(0o755)  # it is made private
            os.replace(work, out_dir)
    except OSError as error:
        raise RunError(
            f"cannot write {out_dir}: {error.strerror}; free some space or choose another disk"
        ) from error
    return {name: len(part) for name, part in parts.items()}


def _folder(source: ImageSource) -> FolderSource:
    if not isinstance(source, FolderSource):
        raise UsageError(f"expected a folder of images, which alone is packed, got {source.summary()}")
    if source.left_out:
        log.warning("%s: not packed: %s", source.root, source.left_out)
    return source


def _write_split(source: FolderSource, folder: Path, shard_bytes: float, seed: int, verify: bool) -> None:
    folder.mkdir(exist_ok=True)
    shards = used = 0
    shard: tarfile.TarFile | None = None
    with ExitStack() as opened:
        for position, index in enumerate(permutation(seed, PACK, 0, 0, len(source)).tolist()):
            name = source.relative_path(index)
            if verify:
                source.load(index)
            data = naming_file(source.describe(index), partial(source.encoded, index))
            if shard is None or used + len(data) > shard_bytes:
                opened.close()
                tar = folder / f"shard-{shards:05d}.tar"
                shard = opened.enter_context(tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT))
                shards, used = shards + 1, 0
            stem, suffix = os.path.splitext(os.path.basename(name))
            # A dot would end the key, and foreign letters need another header format.
            key = f"{position:08d}_{re.sub(r'[^A-Za-z0-9_-]+', '-', stem)[:_STEM_LENGTH]}"
            _add(shard, key + suffix.lower(), data)
            if source.labeled:
                _add(shard, key + ".cls", str(source.target(index)).encode())
            used += len(data)


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # mode 0o644, uid, gid and mtime 0, and empty names
    info.size = len(data)
    shard.addfile(info, io.BytesIO(data))
