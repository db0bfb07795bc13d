"""pytest in several processes, each with its share of the tests: python bench/parallel_tests.py ARGUMENTS

ARGUMENTS are those of pytest. What a test of the kernels takes is mostly their compilation, by one thread;
this needs no plugin. Prints each process's report when it ends. The exit code is the worst of pytest's.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any

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


def run_share(index: str, count: str, *arguments: str) -> int:
    import pytest

    return pytest.main(list(arguments), plugins=[Share(int(index), int(count))])


def report(number: int, code: int, said: IO[str]) -> None:
    said.seek(0)
    lines = said.read().rstrip().splitlines() or ["nothing was printed"]
    print(f"process {number}:", *(lines if code not in (0, NO_TESTS) else lines[-1:]), sep="\n  ", flush=True)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--share"]:
        return run_share(*arguments[1:])
    count = min(MOST, os.cpu_count() or 1)
    codes: list[int] = []
    stopped = False
    with contextlib.ExitStack() as files:
        running: dict[int, tuple[subprocess.Popen[str], IO[str]]] = {}
        for i in range(count):
            said = files.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            command = [sys.executable, __file__, "--share", str(i), str(count), *arguments]
            running[i] = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True), said
        while running:
            try:
                time.sleep(0.1)
            except KeyboardInterrupt:  # the others got the signal, too, and end with a report
                stopped = True
            for i, (process, output) in list(running.items()):
                code = process.poll()
                if code is not None:
                    report(i, code, output)
                    codes.append(code)
                    del running[i]
    if stopped:
        return 2
    worst = [code for code in codes if code not in (0, NO_TESTS)]
    if worst:
        print(f"error: tests failed in {len(worst)} of {count} processes", flush=True)
        return worst[0] if worst[0] > 0 else 1
    return 0 if 0 in codes else NO_TESTS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
