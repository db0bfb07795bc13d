"""pytest in several processes, each with its share of the tests: python bench/parallel_tests.py ARGUMENTS

ARGUMENTS are those of pytest. A kernel test mostly compiles, in one thread; no plugin is needed. Prints what
each process says when it ends. The exit code is 1 if a process fails, and 5 if there are no tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

COUNT = min(12, os.cpu_count() or 1)  # each process holds a context of the GPU
NO_TESTS = 5  # pytest's exit code
SHARE = """
import sys, pytest
class Share:
    def pytest_collection_modifyitems(self, items):
        items[:] = items[int(sys.argv[1]) :: int(sys.argv[2])]
sys.exit(pytest.main(sys.argv[3:], plugins=[Share()]))
"""


def run(index: int) -> int:
    command = [sys.executable, "-c", SHARE, str(index), str(COUNT), *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    print(f"process {index}:", *(done.stdout + done.stderr).splitlines(), sep="\n  ", flush=True)
    return done.returncode


if __name__ == "__main__":
    with ThreadPoolExecutor(COUNT) as pool:
        codes = set(pool.map(run, range(COUNT)))
    if failed := codes - {0, NO_TESTS}:
        print(f"error: exit codes of pytest: {sorted(failed)}", flush=True)
    sys.exit(1 if failed else min(codes))
