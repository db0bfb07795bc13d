"""Write index files beside WebDataset shards, so that opening them takes no time."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from lejepa_fast.data.sources.shards import index_shard, write_index
from lejepa_fast.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, help="a .tar shard, or a folder with shards at any depth")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    path = options.path
    shards = [path] if path.is_file() else sorted(path.rglob("*.tar"))
    if not shards:
        raise UsageError(f"no .tar shards in {path}; give a shard, or a folder with shards")
    images = 0
    for shard in tqdm(shards, desc="shards", disable=None):
        members = index_shard(shard)
        write_index(shard, members)
        images += len(members)
    print(f"{len(shards)} index files written for {images} images")
    return 0
