"""Look at every image of a data set before a run: `python -m lejepa_fast.data.commands.verify PATH`.

Decodes all images, says which are bad and why, and can write them to the quarantine file of a run, which then
leaves them out from the start. Exit code 0: all are good; 1: some are bad; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.sources.base import (
    EncodedSource,
    HoldOutError,
    ImageSource,
    Split,
    open_source,
    size_fault,
)
from lejepa_fast.data.sources.decoding import UnreadableImageError, printable
from lejepa_fast.data.sources.headers import plain_header
from lejepa_fast.errors import RunError, UsageError

_AT_ONCE = 512  # images handed to the threads at a time: memory stays bounded


@dataclass
class Findings:
    """What a scan found. bad: (number, reason) of bad images; converted: images that need Pillow."""

    images: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    converted: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None

    def add(self, size: tuple[int, int], plain: bool) -> None:
        """Count a good image."""
        self.converted += not plain
        if self.smallest is None or min(size) < min(self.smallest):
            self.smallest = size
        if self.largest is None or size[0] * size[1] > self.largest[0] * self.largest[1]:
            self.largest = size


def scan(source: ImageSource, *, threads: int, smallest: int = 1, progress: bool = False) -> Findings:
    """Decode all images of `source`. smallest: short side in px below which an image is bad."""

    def look(index: int) -> tuple[tuple[int, int], bool] | str:
        try:
            size = source[index][0].size
        except UnreadableImageError as error:
            return error.reason
        fault = size_fault(*size, smallest)
        plain = isinstance(source, EncodedSource) and plain_header(source.encoded(index)) is not None
        return fault or (size, plain)

    found = Findings(images=len(source))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(source), disable=None if progress else True) as bar,
    ):
        for start in range(0, len(source), _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, len(source)))
            for index, answer in zip(numbers, pool.map(look, numbers), strict=True):
                if isinstance(answer, str):
                    found.bad.append((index, answer))
                else:
                    found.add(*answer)
                bar.update()
    return found


def _table(found: dict[str, Findings]) -> Iterator[str]:
    yield f"{'split':8}{'images':>10}{'good':>10}{'bad':>8}{'converted':>11}{'smallest':>13}{'largest':>13}"
    for split, row in found.items():
        sizes = [f"{s[0]} x {s[1]}" if s else "-" for s in (row.smallest, row.largest)]
        good = row.images - len(row.bad)
        yield (
            f"{split:8}{row.images:>10}{good:>10}{len(row.bad):>8}{row.converted:>11}{sizes[0]:>13}{sizes[1]:>13}"
        )
    reasons = Counter(reason for row in found.values() for _, reason in row.bad)
    for reason, count in reasons.most_common():
        yield f"{count:>8} x {reason}"


def _open(path: str, splits: list[Split]) -> Iterator[tuple[str, ImageSource]]:
    """The splits with their names; all images as "all" when there are too few to hold some out."""
    for split in splits:
        try:
            source = open_source(path, split)
        except HoldOutError as error:
            yield "all", error.source
            return
        yield split, source


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lejepa_fast.data.commands.verify",
        description="Decode every image and list the bad ones.",
    )
    parser.add_argument("path", help="any data that training takes")
    parser.add_argument("--split", choices=("train", "val", "both"), default="both")
    parser.add_argument(
        "--min-size", type=int, default=1, help="short side in px below which an image is bad"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--quarantine", type=Path, help="write the bad images to this file, RUN/quarantine.txt"
    )
    options = parser.parse_args(arguments)
    splits: list[Split] = ["train", "val"] if options.split == "both" else [options.split]
    found: dict[str, Findings] = {}
    try:
        if options.threads < 1 or options.min_size < 1:
            raise UsageError("--threads and --min-size must be at least 1")
        for split, source in _open(options.path, splits):
            found[split] = scan(source, threads=options.threads, smallest=options.min_size, progress=True)
            listed = BadImages(source, options.quarantine, max_bad_fraction=1.0, log_each=False)
            for index, reason in found[split].bad:
                print(f"{printable(source.describe(index))}\t{reason}")
                listed.add(index, reason)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print("\n".join(_table(found)))
    return 1 if any(row.bad for row in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
