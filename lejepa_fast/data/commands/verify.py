"""Decode every image of a data set and list the bad ones.

With --quarantine RUN/quarantine.txt the run leaves them out from the start.
Exit code 0: all are good; 1: some are bad; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.sources import (
    HoldOutError,
    ImageSource,
    Split,
    UnreadableImageError,
    open_source,
    printable,
    size_fault,
)
from lejepa_fast.errors import UsageError

_AT_ONCE = 512  # images handed to the threads at a time, so that memory stays bounded


def scan(source: ImageSource, *, threads: int, smallest: int = 1) -> Iterator[tuple[int, int] | str]:
    """Decode all images of `source`.

    Args:
        source: The data.
        threads: Number of images decoded at the same time.
        smallest: Short side in pixels below which an image is bad.

    Yields:
        (width, height) of each good image, the reason of each bad one.
    """

    def look(index: int) -> tuple[int, int] | str:
        try:
            size = source[index][0].size
        except UnreadableImageError as error:
            return error.reason
        return size_fault(*size, smallest) or size

    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(source), disable=None) as bar:
        for start in range(0, len(source), _AT_ONCE):
            for found in pool.map(look, range(start, min(start + _AT_ONCE, len(source)))):
                bar.update()
                yield found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", help="any data that training takes")
    parser.add_argument("--split", choices=("train", "val", "both"), default="both")
    parser.add_argument(
        "--min-size", type=int, default=1, help="short side in px below which an image is bad"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quarantine", type=Path, help="add the bad images to this file, RUN/quarantine.txt")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if options.threads < 1 or options.min_size < 1:
        raise UsageError("--threads and --min-size must be at least 1")
    splits: list[Split] = ["train", "val"] if options.split == "both" else [options.split]
    table = [f"{'split':8}{'images':>10}{'good':>10}{'bad':>8}{'smallest':>13}{'largest':>13}"]
    reasons: Counter[str] = Counter()
    for split, source in _open(options.path, splits):
        quarantine = BadImages(source, options.quarantine, max_bad_fraction=1.0, log_each=False)
        smallest = largest = None
        bad = 0
        for index, found in enumerate(scan(source, threads=options.threads, smallest=options.min_size)):
            if isinstance(found, str):
                bad += 1
                reasons[found] += 1
                tqdm.write(f"{printable(source.describe(index))}\t{found}")
                quarantine.add(index, found)
                continue
            smallest = min(smallest or found, found, key=min)
            largest = max(largest or found, found, key=lambda size: size[0] * size[1])
        sizes = "".join(f"{f'{size[0]} x {size[1]}' if size else '-':>13}" for size in (smallest, largest))
        table.append(f"{split:8}{len(source):>10}{len(source) - bad:>10}{bad:>8}{sizes}")
    print("\n".join(table + [f"{count:>8} x {reason}" for reason, count in reasons.most_common()]))
    return 1 if reasons else 0


def _open(path: str, splits: list[Split]) -> Iterator[tuple[str, ImageSource]]:
    """The splits with their names; all images as "all" when there are too few to hold some out."""
    for split in splits:
        try:
            source = open_source(path, split)
        except HoldOutError as error:
            yield "all", error.source
            return
        yield split, source
