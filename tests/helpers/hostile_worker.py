"""Opens hostile shards for test_shards.py, and prints what came of them as one line of JSON.

Arguments: names of shards in this folder. It loads an epoch of each shard by each backend that works on a
CPU, verifies the shard and writes its index.
It also prints by how much its memory has grown over all of them.
"""

import contextlib
import io
import json
import resource
import signal
import sys
from pathlib import Path

import torch
from loader_backends import peak_memory, without_gpu

from lejepa_fast.data import MultiCropRecipe, commands, multicrop_loader, open_source
from lejepa_fast.errors import RunError, UsageError

RECIPE = MultiCropRecipe(global_size=8, local_crops=0, blur_kernel=3, min_image_size=1)
BATCH = 12


def epoch_of(name: str, backend: str) -> list[int] | str:
    """The labels of an epoch, or the error."""
    try:
        loader = multicrop_loader(
            open_source(name, "train", val_fraction=0),  # each class has one image only
            RECIPE,
            batch_size=BATCH,
            num_workers=1,
            backend=backend,
            max_bad_fraction=0.5,
            bad_images=f"bad-{backend}-{name}.txt",
            dtype=torch.uint8,
        )
        return [label for _, labels in loader for label in labels.tolist()]
    except (UsageError, RunError) as error:
        return f"{type(error).__name__}: {error}"


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and what it says on standard error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = commands.main(list(arguments))
    return code, said.getvalue()


def main() -> None:
    torch.set_num_threads(1)
    backends = without_gpu()
    for backend in backends:
        assert isinstance(epoch_of("clean.tar", backend), list)  # everything is loaded now
    before = peak_memory()
    # A limit on the address space, so that a leak ends this process and not the machine.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found = {}
    for name in sys.argv[1:]:
        signal.alarm(120)  # ends this process
        found[name] = {
            "epochs": {backend: epoch_of(name, backend) for backend in backends},
            "verify": command("verify", name, "--threads", "1", "--val-fraction", "0"),
            "index": command("index", name),
        }
    print(json.dumps({"found": found, "grown": (peak_memory() - before) >> 10}))


if __name__ == "__main__":
    main()
