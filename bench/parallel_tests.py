"""pytest in several processes, each with its share of the tests: python bench/parallel_tests.py ARGUMENTS

ARGUMENTS are those of pytest. A test of the kernels mostly compiles, in one thread; this needs no plugin.
Prints the report of each process when it ends. The exit code is the worst of pytest's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MOST = 12  # processes: each holds a context of the GPU
NO_TESTS = 5  # pytest's exit code


class Share:
    """pytest plugin: every `count`-th test, so that the cases of one test are spread."""

    def __init__(self, index: int, count: int):
        self.index, self.count = index, count

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        kept = items[self.index :: self.count]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--share"]:
        import pytest

        return pytest.main(list(arguments[3:]), plugins=[Share(int(arguments[1]), int(arguments[2]))])
    count = min(MOST, os.cpu_count() or 1)

    def run(index: int) -> int:
        command = [sys.executable, __file__, "--share", str(index), str(count), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        lines = (done.stdout + done.stderr).rstrip().splitlines() or ["nothing was printed"]
        shown = lines[-1:] if done.returncode in (0, NO_TESTS) else lines
        print(f"process {index}:", *shown, sep="\n  ", flush=True)
        return done.returncode

    with ThreadPoolExecutor(count) as pool:
        codes = list(pool.map(run, range(count)))
    if worst := [code for code in codes if code not in (0, NO_TESTS)]:
        print(f"error: tests failed in {len(worst)} of {count} processes", flush=True)
        return worst[0] if worst[0] > 0 else 1
    return 0 if 0 in codes else NO_TESTS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
