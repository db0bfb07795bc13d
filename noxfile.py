"""Supported versions: every Triton, the oldest and the newest PyTorch, Python 3.10 to 3.13.

    make test-versions                                     # everything
    .venv/bin/nox --list
    .venv/bin/nox --session "kernels(3.6.0)" -- -k memory  # one session, with arguments for pytest

The versions of Triton lie side by side in `.venv/tritons/`; a session puts one first on the import path.
nox reports a Python that is not on PATH as "interpreter not found".
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nox

ROOT = Path(__file__).parent
TRITON_FOLDER = ROOT / ".venv" / "tritons"
TRITONS = ["3.6.0", "3.7.0", "3.7.1", "3.8.0", "3.9.0"]
# Each Python runs one end of the range of PyTorch. Each torchvision belongs to one PyTorch.
OLDEST = ["torch==2.11.*", "torchvision==0.26.*"]
NEWEST = ["torch", "torchvision"]
TORCH = {"3.10": OLDEST, "3.11": NEWEST, "3.12": OLDEST, "3.13": NEWEST}
LIBRARY = ["library/test_*", "test_kernels"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
NO_TESTS = 5  # pytest's exit code

nox.options.envdir = ".venv/nox"
nox.options.reuse_existing_virtualenvs = True
nox.options.download_python = "never"
nox.options.sessions = ["kernels", "library"]


def find_tests(*patterns: str) -> list[str]:
    """The test files of these names, in whatever folder of tests/ they are.

    Raises:
        FileNotFoundError: no file has such a name.
    """
    found = []
    for pattern in patterns:
        paths = sorted((ROOT / "tests").rglob(f"{pattern}.py"))
        if not paths:
            raise FileNotFoundError(f"tests: expected a file {pattern}.py, found none; correct noxfile.py")
        found += map(str, paths)
    return found


def environment(session: nox.Session, triton: str) -> dict[str, str]:
    """Install a version of Triton, and return the variables that put it first on the import path."""
    target = TRITON_FOLDER / triton
    if not (target / f"triton-{triton}.dist-info").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        session.run(*pip, f"triton=={triton}", external=True)
    env = {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    check = f"import triton; assert triton.__version__ == {triton!r}, triton.__version__"
    session.run(sys.executable, "-c", check, env=env, external=True)
    return env


def good_codes(session: nox.Session) -> list[int]:
    """Exit codes of pytest: arguments for it may select nothing in some files."""
    return [0, NO_TESTS] if session.posargs else [0]


@nox.session(venv_backend="none")
@nox.parametrize("triton", TRITONS, ids=TRITONS)
def kernels(session: nox.Session, triton: str) -> None:
    """All kernel tests with one version of Triton, and the budgets of every kernel that is compiled."""
    env = environment(session, triton)
    compiled = find_tests("test_kernel_compile", "test_launches")
    for files, interpret in ((find_tests("kernels/kernel_*"), "1"), (compiled, "0")):
        command = [*PYTEST, "-n", "2", "--dist", "load", *files, *session.posargs]
        options = {"env": env | {"TRITON_INTERPRET": interpret}, "success_codes": good_codes(session)}
        session.run(*command, **options, external=True)
    check = ["bench/kernel_report.py", "--target", "all", "--dtype", "bf16", "fp16", "fp32", "--check"]
    session.run(sys.executable, *check, env=env, external=True)


@nox.session(venv_backend="none")
@nox.parametrize("triton", [TRITONS[0], TRITONS[-1]], ids=["oldest", "newest"])
def kernels_short(session: nox.Session, triton: str) -> None:
    """A part of them, for CI: every kernel against the reference, and compilation of some for sm_90.

    The two halves run side by side, a process each: importing PyTorch takes as long as many of the tests.
    """
    env = os.environ | environment(session, triton)
    (path,), (launches,) = find_tests("test_kernel_compile"), find_tests("test_launches")
    compiled = [f"{path}::test_sizes_of_one", f"{path}::test_the_color_kernels_keep_pixels_in_registers"]
    compiled.append(
        f"{launches}::test_kept_launches_pass_the_arguments_of_the_first[backward in two kernels]"
    )

    def run(files: list[str], interpret: str) -> subprocess.CompletedProcess[str]:
        command = [*PYTEST, *files, *session.posargs]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        return subprocess.run(command, env=env | {"TRITON_INTERPRET": interpret}, **options)

    halves = [find_tests("kernel_operators", "kernel_accuracy"), compiled]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(run, halves, ["1", "0"]))
    for half in done:
        print(half.stdout, flush=True)
    if not {half.returncode for half in done} <= {*good_codes(session)}:
        session.error(f"tests fail with Triton {triton}")


@nox.session(python=list(TORCH))
def library(session: nox.Session) -> None:
    """The tests of the loss with the oldest or the newest PyTorch."""
    session.install("--editable", ".[test]", *TORCH[str(session.python)])
    versions = "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
    session.run("python", "-c", versions)
    session.run("pytest", "-q", "-p", "no:cacheprovider", *find_tests(*LIBRARY), *session.posargs)
