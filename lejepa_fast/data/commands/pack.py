"""Pack a folder of images into WebDataset tar shards: `python -m lejepa_fast.data.commands.pack SOURCE OUT`.

Image files are copied byte for byte as `key.jpg` beside `key.cls`, the class index as text. Samples are
shuffled across classes (by `seed`), so that every shard is a mixture. Headers carry no owner, rights or
time: the same images give the same bytes. The result appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
from contextlib import ExitStack
from pathlib import Path

from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.draws import PACK, permutation
from lejepa_fast.data.sources.base import FolderSource, find_splits
from lejepa_fast.data.sources.decoding import UnreadableImageError, unreadable
from lejepa_fast.errors import RunError, UsageError

_DEFAULT_SHARD_BYTES = 256 * 2**20
SKIPPED = "skipped.txt"
_STEM_LENGTH = 48  # with the number and the suffix, well within the 100 bytes of a plain tar header


def pack_folder(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    shard_bytes: int = _DEFAULT_SHARD_BYTES,
    seed: int = 0,
    verify: bool = True,
    skip_bad: bool = False,
) -> dict[str, int]:
    """Write the images below `source` as shards into the new folder `out_dir`; returns images per split.

    source: a folder that `open_source` takes as a folder of images. With train/ and val/ below it, both
    are packed ({"train": n, "val": m}, in sub-folders of those names); else the folder is packed as it is
    ({"": n}). Class names go to `out_dir/classes.txt`. shard_bytes: a new shard begins before one grows
    past this. verify: decode every image first, so that no broken file ends up in a shard. skip_bad: leave
    such files out, and list them in `out_dir/skipped.txt` with their reasons, as a `BadImages` does.
    Raises `UsageError` for a missing source or an `out_dir` that holds something, `RunError` for an
    unreadable image (with skip_bad: if no image is readable) or a failed write; `out_dir` is then left as it
    was.
    """
    source, out_dir = Path(source), Path(out_dir)
    if shard_bytes < 1:
        raise UsageError(f"shard_bytes must be positive; got {shard_bytes}")
    if skip_bad and not verify:
        raise UsageError("skip_bad needs verify: only images that are decoded are known to be bad")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UsageError(f"{out_dir} exists and is not an empty folder; remove it or choose another name")
    train_root, val_root = find_splits(source)
    if not train_root.is_dir():
        raise UsageError(f"{source} is not a folder; give a folder of class folders or of images")
    train = FolderSource(train_root)
    parts = {"train" if val_root else "": train}
    if val_root:
        parts["val"] = FolderSource(val_root, classes=train.classes)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    except OSError as error:
        raise RunError(f"cannot write next to {out_dir}: {error.strerror}; choose another folder") from error
    try:
        packed = {}
        for name, part in parts.items():
            skipped = BadImages(part, work / SKIPPED, max_bad_fraction=1.0) if skip_bad else None
            packed[name] = _write_split(part, work / name, shard_bytes, seed, verify, skipped)
        if train.classes is not None:
            (work / "classes.txt").write_text(
                "".join(f"{name}\n" for name in train.classes), encoding="utf-8"
            )
        work.chmod(0o755)  # mkdtemp makes it private
        os.replace(work, out_dir)
    except OSError as error:
        raise RunError(
            f"cannot write {out_dir}: {error.strerror}; free some space or choose another disk"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return packed


def _write_split(
    source: FolderSource, folder: Path, shard_bytes: int, seed: int, verify: bool, skipped: BadImages | None
) -> int:
    """Write one split into `folder`; returns the number of images in it. skipped: gets the bad ones."""
    folder.mkdir(exist_ok=True)
    count = shards = used = 0
    shard: tarfile.TarFile | None = None
    with ExitStack() as opened:
        for key, index in _samples(source, seed):
            try:
                data = _read(source, index, verify)
            except UnreadableImageError as error:
                if skipped is None:
                    raise
                skipped.add(index, error.reason)
                continue
            if shard is None or used + len(data) > shard_bytes:
                opened.close()
                name = folder / f"shard-{shards:05d}.tar"
                shard = opened.enter_context(tarfile.open(name, "w", format=tarfile.USTAR_FORMAT))
                shards, used = shards + 1, 0
            suffix = os.path.splitext(source.relative_path(index))[1].lower()
            _add(shard, key + suffix, data)
            if source.labelled:
                _add(shard, key + ".cls", str(source.target(index)).encode())
            count, used = count + 1, used + len(data)
    if not count:
        raise RunError(f"none of the {len(source)} images in {source.root} is readable; check the data set")
    return count


def _read(source: FolderSource, index: int, verify: bool) -> bytes:
    if verify:
        _ = source[index]
    try:
        return source.encoded(index)
    except OSError as error:  # else it would seem that the shard cannot be written
        raise unreadable(source.describe(index), error) from error


def _samples(source: FolderSource, seed: int) -> list[tuple[str, int]]:
    """(key, index) in shuffled order. Keys are numbered; the file's name stays readable in them."""
    samples = []
    for position, index in enumerate(permutation(seed, PACK, 0, 0, len(source)).tolist()):
        stem = os.path.splitext(os.path.basename(source.relative_path(index)))[0]
        # A dot would end the key, and foreign letters need another header format.
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:_STEM_LENGTH]
        samples.append((f"{position:08d}_{plain}", index))
    return samples


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # uid, gid and mtime are 0 and the names empty
    info.size = len(data)
    info.mode = 0o644
    shard.addfile(info, io.BytesIO(data))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code (0, 2 for wrong usage, 1 for a failed run)."""
    parser = argparse.ArgumentParser(prog="python -m lejepa_fast.data.commands.pack", description=__doc__)
    parser.add_argument("source", help="folder of class folders, flat folder, or folder with train/ and val/")
    parser.add_argument("out", help="new folder for the shards")
    parser.add_argument(
        "--shard-mb", type=float, default=_DEFAULT_SHARD_BYTES / 2**20, help="size of a shard in MiB"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the samples")
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument("--no-verify", action="store_true", help="do not decode the images first")
    checks.add_argument(
        "--skip-bad",
        action="store_true",
        help=f"leave out images that cannot be decoded, and list them in OUT/{SKIPPED}",
    )
    options = parser.parse_args(arguments)
    try:
        counts = pack_folder(
            options.source,
            options.out,
            shard_bytes=int(options.shard_mb * 2**20),
            seed=options.seed,
            verify=not options.no_verify,
            skip_bad=options.skip_bad,
        )
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    for name, count in counts.items():
        print(f"{os.path.join(options.out, name)}: {count} images")
    listing = Path(options.out) / SKIPPED
    if listing.exists():
        count = len(listing.read_text(encoding="utf-8").splitlines())
        print(f"{count} bad image{'s' * (count > 1)} left out, listed in {listing}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
