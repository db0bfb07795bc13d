"""The command `lejepa-data`: verify, pack and index data sets."""

from lejepa_fast.errors import require_extra

require_extra("train", "torchvision", "numpy", "PIL", "tqdm")

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.commands.pack import DEFAULT_SHARD_MB, pack_folder
from lejepa_fast.data.sources import ImageSource, Split, UnreadableImageError, open_source
from lejepa_fast.data.sources.folder import is_hidden
from lejepa_fast.data.sources.scientific import as_trained, choose_value_range
from lejepa_fast.data.sources.shards import index_shard, write_index
from lejepa_fast.errors import RunError, UsageError, printable

_AT_ONCE = 512  # images handed to the threads at a time, so that memory stays bounded


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a failed run, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="lejepa-data", description="Prepare image data for training.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    made = {}
    for name, run in (("verify", _verify), ("pack", _pack), ("index", _index)):
        about = run.__doc__ or ""
        made[name] = commands.add_parser(name, description=about, help=about.partition("\n")[0])
        made[name].set_defaults(run=run)
    add = made["verify"].add_argument
    add("path", help="any data that training takes")
    add("--split", choices=("train", "val", "both"), default="both")
    add("--val-fraction", type=float, default=0.1, help="as --data.val-fraction")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--channels", type=int, default=3, help="as --data.channels of the training")
    add("--slices", choices=("first", "random", "all"), default="first", help="as --data.slices")
    depths = ("auto", "8", "12", "16", "percentile")
    add("--bit-depth", choices=depths, default="auto", help="as --data.bit-depth")
    add("--bad-images", type=Path, help="add the bad images to this file, RUN/bad_images.txt")
    add = made["pack"].add_argument
    add("source", help="folder of class folders, flat folder, or folder with train/ and val/")
    add("out", help="new folder for the shards")
    add("--shard-mb", type=float, default=DEFAULT_SHARD_MB, help="size of a shard in MiB")
    add("--seed", type=int, default=0, help="seed of the order of the images")
    add("--no-verify", action="store_true", help="do not decode the images first")
    made["index"].add_argument("path", type=Path, help="a .tar shard, or a folder with shards at any depth")
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _verify(options: argparse.Namespace) -> int:
    """Decode every image of a data set and list the bad ones.

    With --bad-images RUN/bad_images.txt the run leaves them out from the start. The options "as --data..."
    must be those of the run.
    Exit code 0: all are good; 1: some are bad; 2: wrong usage.
    """
    if options.threads < 1:
        raise UsageError(f"--threads: expected at least 1, got {options.threads}")
    splits: list[Split] = ["train", "val"] if options.split == "both" else [options.split]
    table = [f"{'split':8}{'images':>10}{'good':>10}{'bad':>8}{'smallest':>13}{'largest':>13}"]
    reasons: Counter[str] = Counter()
    for split in splits:
        source = open_source(options.path, split, val_fraction=options.val_fraction)
        source = as_trained(source, options.slices, options.channels)
        if len(source):  # with --val-fraction 0 nothing is held out
            source.value_range = choose_value_range(source, options.bit_depth)
        listing = BadImages(source, options.bad_images, max_bad_fraction=1.0, log_each=False)
        smallest = largest = None
        bad = 0
        for number, found in enumerate(_scan(source, options.threads)):
            if isinstance(found, UnreadableImageError):
                bad += 1
                reasons[found.reason] += 1
                tqdm.write(f"{printable(source.describe(number))}\t{found.reason}")
                listing.add(number, found.reason, lasting=found.lasting)
                continue
            smallest = min(smallest or found, found, key=min)
            largest = max(largest or found, found, key=lambda size: size[0] * size[1])
        sizes = "".join(f"{f'{size[0]} x {size[1]}' if size else '-':>13}" for size in (smallest, largest))
        if source.left_out:
            print(printable(f"{split}: not read: {source.left_out}"))
        table.append(f"{split:8}{len(source):>10}{len(source) - bad:>10}{bad:>8}{sizes}")
    print("\n".join(table + [f"{count:>8} x {reason}" for reason, count in reasons.most_common()]))
    return 1 if reasons else 0


def _scan(source: ImageSource, threads: int) -> Iterator[tuple[int, int] | UnreadableImageError]:
    """(width, height) of each good image, the error of each bad one; decoded in `threads` threads."""

    def look(number: int) -> tuple[int, int] | UnreadableImageError:
        try:
            return source[number][0].size
        except UnreadableImageError as error:
            return error

    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(source), disable=None) as bar:
        for start in range(0, len(source), _AT_ONCE):
            for found in pool.map(look, range(start, min(start + _AT_ONCE, len(source)))):
                bar.update()
                yield found


def _pack(options: argparse.Namespace) -> int:
    """Pack a folder of images into WebDataset tar shards.

    Image files are copied byte for byte as `key.jpg` beside `key.cls`, the class index as text. They are
    shuffled across classes by `seed`, so that every shard is a mixture. Headers carry no owner, rights or
    time: the same images give the same bytes. The result appears under its name when it is complete.
    """
    counts = pack_folder(
        options.source,
        options.out,
        shard_mb=options.shard_mb,
        seed=options.seed,
        verify=not options.no_verify,
    )
    for name, count in counts.items():
        print(printable(f"{os.path.join(options.out, name)}: {count} images"))
    return 0


def _index(options: argparse.Namespace) -> int:
    """Write index files beside WebDataset shards, so that opening them takes no time."""
    path = options.path
    found = path.rglob("*.tar")
    shards = [path] if path.is_file() else sorted(shard for shard in found if not is_hidden(shard.name))
    if not shards:
        raise UsageError(f"no .tar shards in {path}; give a shard, or a folder with shards")
    images = 0
    for shard in tqdm(shards, desc="shards", disable=None):
        members = index_shard(shard)
        write_index(shard, members)
        images += len(members)
    print(f"{len(shards)} index files written for {images} images")
    return 0
