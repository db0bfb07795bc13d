"""The Triton kernels: on the GPU if there is one, else the same tests in Triton's interpreter.

Triton decides at import whether it interprets, and other tests need it as it is: without a GPU the tests of
`kernel_cases.py` run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lejepa_fast import SIGReg, sigreg, standard_normal_knots, triton_ops

if torch.cuda.is_available():
    pytest.register_assert_rewrite("kernel_cases")
    from kernel_cases import *  # noqa: F403
else:

    def test_cases_in_the_interpreter():
        cases = Path(__file__).with_name("kernel_cases.py")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", str(cases), "-q", "--no-header", "-p", "no:cacheprovider"],
            cwd=cases.parents[1],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_the_module_can_be_made_before_it_moves_to_a_gpu():
    assert SIGReg(num_slices=4, impl="triton").impl == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_tensors_on_the_cpu_are_refused():
    knots = standard_normal_knots()
    with pytest.raises(
        ValueError, match=r"^x: expected on a GPU for impl='triton'.*got cpu; use impl='torch'"
    ):
        sigreg(torch.randn(9, 3), torch.randn(3, 4), *knots[:3], impl="triton")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "^impl: 'triton' needs the package triton.*use impl='torch'"),
        ((3, 5), "^impl: .* triton 3.6 .* got 3.5"),
    ],
)
def test_missing_or_old_triton_is_refused(monkeypatch, version, message):
    monkeypatch.setattr(triton_ops, "_triton_version", lambda: version)
    with pytest.raises(ValueError, match=message):
        sigreg(torch.randn(9, 3), torch.randn(3, 4), *standard_normal_knots()[:3], impl="triton")


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    problem = triton_ops.why_not(torch.device("cuda"), torch.float32)
    assert problem is not None
    assert "8.0 or newer, got 7.5; use impl='torch'" in problem
