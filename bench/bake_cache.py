"""Compile the kernels that `gpu_check.py` times on a machine without a GPU, into a cache for Triton.

    python bench/bake_cache.py                    # fills bench/baked, which git ignores, and checks it
    python bench/gpu_check.py --cache bench/baked ...

Kernels go through Triton's own path, launched into a stand-in for an sm_90 driver (`standin_driver.py`):
steps at the sizes of `gpu_check.py`, all candidates of its tiles, and its accuracy at 17 knots. The check is
a fresh process that makes the same launches from a copy of the cache: it must compile nothing.

Triton finds a kernel by a hash of its own Python files and compiled library, the version of ptxas, the
kernel's source, its argument types and options, and some environment variables. The library differs between
the wheels for Python 3.11 and 3.12. So bake with the versions of Python and Triton of the GPU's machine;
PyTorch's version and the folder do not count. Rows of `gpu_check.py` count what was compiled all the same.

Not in the cache: what the C compiler builds at the first launch (Triton's launchers, about a second each),
kernels of `torch.compile`, and those of the tests.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import accuracy_bench
import sigreg_variants as variants
import tiles_bench
import timing
import torch
import triton
from benchlib import ROOT
from sigreg_variants import TRITON, Case, Size
from standin_driver import standing_in

FOLDER = ROOT / "bench" / "baked"
MOST_BYTES = 10 * 10**6
KEPT = (".cubin", ".json")
CPU = torch.device("cpu")
Job = tuple[Callable[..., None], tuple[Any, ...]]
"""What a process launches: a function and its arguments."""


def step(case: Case) -> None:
    """A training step."""
    (x,) = variants.make_inputs(case, 1, CPU)
    variants.VARIANTS[TRITON](case, CPU).step(x)


def accuracy(variant: accuracy_bench.Variant) -> None:
    x, A, unit, knots = accuracy_bench.problem(variant, 17, 1.0, "cpu", **accuracy_bench.SIZES["cuda"])
    accuracy_bench.evaluate(x, A, knots, impl="triton", precision=variant.precision, scale=unit)


def jobs_of_check() -> list[Job]:
    """The launches of `gpu_check.py`'s benchmarks."""
    shares = 8
    jobs: list[Job] = [
        (tiles_bench.compile_share, (tiles_bench.CASES[key], CPU, fused, index, shares))
        for key in tiles_bench.FIRST
        for fused in tiles_bench.backwards(tiles_bench.CASES[key])
        for index in range(shares)
    ]
    trained = Case("training", Size(10, 256, 512, 1024, 17), torch.bfloat16, ())
    trial = trained._replace(size=trained.size._replace(V=1, N=192))  # of impl="auto"
    jobs += [(step, (case,)) for case in (*variants.GPU_CASES, trained, trial)]
    compiled = (variant for variant in accuracy_bench.variants("cuda") if variant.impl == "triton")
    return jobs + [(accuracy, (variant,)) for variant in compiled]


def run(job: Job) -> int:
    """Launch all kernels of a job into nothing; the number of kernels that were compiled for it."""
    compiled: list[str] = []

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        compiled.extend([] if cache_hit else [src.name])

    function, arguments = job
    with standing_in(), mock.patch.object(triton.knobs.compilation, "listener", listener):
        function(*arguments)
    return len(compiled)


def run_all(jobs: Sequence[Job], cache: Path, processes: int) -> int:
    """`run` all jobs in fresh processes with this cache."""
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(cache)), timing.fresh_processes(processes) as pool:
        return sum(pool.map(run, jobs))


def bake(folder: Path, jobs: Sequence[Job], processes: int) -> int:
    """Replace `folder` by a cache with the kernels of these jobs; its bytes."""
    with tempfile.TemporaryDirectory() as fresh:
        run_all(jobs, Path(fresh), processes)
        shutil.rmtree(folder, ignore_errors=True)
        install(Path(fresh), folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def install(cache: Path, folder: Path) -> None:
    """Copy what is needed to launch the kernels of a cache into `folder`.

    Triton notes the absolute path of each file, so a cache that is merely moved is never found.
    """
    for group in cache.glob("*/__grp__*.json"):
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        to = folder / group.parent.name
        kept = {name: str(to / name) for name in names if name.endswith(KEPT)}
        to.mkdir(parents=True, exist_ok=True)
        for name in kept:
            shutil.copy(group.parent / name, to / name)
        (to / group.name).write_text(json.dumps({"child_paths": kept}), encoding="utf-8")


def check(folder: Path, jobs: Sequence[Job]) -> int:
    """How many kernels a fresh process compiles for these jobs with a copy of the cache."""
    with tempfile.TemporaryDirectory() as copy:
        install(folder, Path(copy))
        return run_all(jobs, Path(copy), 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the cache (%(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--check", action="store_true", help="only check the cache that is there")
    options = parser.parse_args(arguments)
    jobs = jobs_of_check()
    if not options.check:
        size = bake(options.out, jobs, options.processes)
        versions = f"Python {platform.python_version()}, Triton {triton.__version__}"
        print(f"{options.out}: {size / 1e6:.1f} MB for {versions}", flush=True)
        if size > MOST_BYTES:
            print(f"error: expected at most {MOST_BYTES / 1e6:.0f} MB", file=sys.stderr)
            return 1
    if compiled := check(options.out, jobs):
        print(f"error: {compiled} kernels were compiled in spite of the cache", file=sys.stderr)
        return 1
    print("checked: a fresh process compiled nothing", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
