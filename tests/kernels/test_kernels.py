"""The Triton kernels: tests of `kernel_*.py` in Triton's interpreter, and when the kernels are taken.

Triton decides at import whether it interprets, and other tests need it as it is: without a GPU the
`kernel_*.py` run in processes of their own, here. With one, pytest collects them itself.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lejepa_fast import dispatch, sigreg, triton_operators
from lejepa_fast.kernels.configs import target_of

FOLDER = Path(__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("kernel_*.py"))
# Two processes and no more: each imports everything anew. The first takes the longest all the same.
HALVES = [["kernel_generated"], [module for module in MODULES if module != "kernel_generated"]]


@pytest.fixture(scope="module")
def interpreted():
    """The two processes, which run side by side."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider"]
    options = {"cwd": FOLDER.parents[1], "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    processes = [
        subprocess.Popen([*command, *(FOLDER / f"{module}.py" for module in half)], text=True, **options)
        for half in HALVES
    ]
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("half", range(len(HALVES)), ids=map(" ".join, HALVES))
def test_in_the_interpreter(interpreted, half):
    output, _ = interpreted[half].communicate()
    assert interpreted[half].returncode == 0, output[-8000:]
    for module in HALVES[half]:
        assert re.search(rf"{module}\.py::.* PASSED", output), f"{module}: no test ran: {output[-800:]}"


@pytest.fixture(autouse=True)
def _gpus_are_not_remembered():
    target_of.cache_clear()
    yield
    target_of.cache_clear()


def pretend_gpu(monkeypatch, gpu):
    """Makes this a machine with an NVIDIA GPU of a compute capability, or an AMD GPU of a name."""
    if isinstance(gpu, str):
        monkeypatch.setattr(torch.version, "hip", "6.4")
        properties = SimpleNamespace(gcnArchName=gpu)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)


@pytest.mark.parametrize(
    ("gpu", "dtype", "version", "chosen", "reason"),
    [
        ((9, 0), torch.bfloat16, (3, 6), "triton", "kernels for this GPU"),
        ((12, 0), torch.float32, (3, 6), "triton", "kernels for this GPU"),
        ((7, 5), torch.float32, (3, 6), "torch", "impl: .* 8.0 or newer, got 7.5$"),
        ((9, 0), torch.float64, (3, 6), "torch", "x: expected float32, .* got torch.float64$"),
        ((9, 0), torch.float32, (3, 5), "torch", "impl: .* triton 3.6 or newer, got 3.5$"),
        ((9, 0), torch.float32, None, "torch", "impl: .* not installed$"),
        ("gfx942:sramecc+:xnack-", torch.float32, (3, 6), "triton", "kernels for this GPU"),
        ("gfx1100", torch.float32, (3, 6), "torch", "impl: .* got gfx1100$"),  # no matrix cores
    ],
)
def test_auto_takes_the_kernels_on_gpus_that_can(monkeypatch, caplog, gpu, dtype, version, chosen, reason):
    """Elsewhere the streaming implementation, with one line that says why."""
    pretend_gpu(monkeypatch, gpu)
    monkeypatch.setattr(triton_operators, "triton_version", lambda: version)
    monkeypatch.setattr(dispatch, "logged_choices", set())
    device = torch.device("cuda")
    with caplog.at_level("INFO", logger="lejepa_fast"):
        for _ in range(2):
            assert dispatch.resolve_implementation("auto", device, dtype) == chosen
    (record,) = caplog.records
    assert re.search(f"impl='auto' takes '{chosen}' on cuda: {reason}", record.message)
    assert record.levelname == ("INFO" if chosen == "triton" else "WARNING")


@pytest.mark.parametrize(("gpu", "chosen"), [((9, 0), "triton"), ((7, 5), "torch")])
def test_the_choice_is_a_constant_of_compiled_code(monkeypatch, gpu, chosen):
    pretend_gpu(monkeypatch, gpu)
    torch.compiler.reset()

    def compiled_choice(x):
        return x + (dispatch.resolve_implementation("auto", torch.device("cuda"), x.dtype) == "triton")

    compiled = torch.compile(compiled_choice, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == (chosen == "triton")


def test_auto_on_a_gpu_refuses_gradients_that_the_kernels_do_not_give(monkeypatch):
    """A fall-back to another implementation would be silent, and no gradient more so."""
    pretend_gpu(monkeypatch, (9, 0))
    with FakeTensorMode(), torch.device("cuda"):
        x, A, plain, learned = torch.empty(9, 3), torch.empty(3, 4), torch.empty(17), torch.empty(17)
        learned.requires_grad_()
        for name, phi, weights in (("phi", learned, plain), ("weights", plain, learned)):
            with pytest.raises(ValueError, match=f"^{name}: expected .* impl='triton', got .*impl='torch'"):
                sigreg(x, A, plain, phi, weights, spacing=0.1875)


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("gfx942:sramecc+", "tf32x3", "^precision: expected 'ieee' or 'tf32' or None on .* got 'tf32x3'"),
        ("gfx950", "tf32", "^precision: expected 'ieee' or None on .* got 'tf32'"),
    ],
)
def test_precisions_that_amds_compiler_lacks_are_refused(monkeypatch, name, precision, message):
    pretend_gpu(monkeypatch, name)
    assert triton_operators.why_not_precision(torch.device("cuda"), "ieee") is None
    with FakeTensorMode(), torch.device("cuda"):
        x, A, t = torch.empty(9, 3), torch.empty(3, 4), torch.empty(17)
        with pytest.raises(ValueError, match=message):
            sigreg(x, A, t, t, t, spacing=0.1875, impl="triton", precision=precision)
