"""`tile_cases.py`: on the GPU if there is one, else in a process of its own with Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.register_assert_rewrite("tile_cases")
    from tile_cases import *  # noqa: F403
else:

    def test_cases_in_the_interpreter():
        cases = Path(__file__).with_name("tile_cases.py")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", str(cases), "-q", "--no-header", "-p", "no:cacheprovider"],
            cwd=cases.parents[1],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
