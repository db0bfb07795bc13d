"""pytest in several processes, each with its share of the tests: python bench/parallel_tests.py ARGUMENTS

ARGUMENTS are those of pytest. A kernel test mostly compiles, in one thread; no plugin is needed. Prints what
each process says when it ends. The exit code is 1 if a test fails or none passes.
"""

from __future__ import annotations

import os
import re
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


def run(index: int) -> tuple[int, bool]:
    """Exit code, and whether a test passed."""
    command = [sys.executable, "-c", SHARE, str(index), str(COUNT), *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    print(f"process {index}:", *(done.stdout + done.stderr).splitlines(), sep="\n  ", flush=True)
    return done.returncode, bool(re.search(r"\d+ passed", done.stdout))


if __name__ == "__main__":
    with ThreadPoolExecutor(COUNT) as pool:
        codes, passed = zip(*pool.map(run, range(COUNT)), strict=True)
    if failed := set(codes) - {0, NO_TESTS}:
        sys.exit(f"error: exit codes of pytest: {sorted(failed)}")
    sys.exit(None if any(passed) else "error: no test passed")
