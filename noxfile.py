"""Supported versions: every Triton, the oldest and the newest PyTorch, Python 3.10 to 3.13.

    make test-versions                                     # everything
    .venv/bin/nox --list
    .venv/bin/nox --session "kernels(3.6.0)" -- -k memory  # one session, with arguments for pytest

The versions of Triton lie side by side in `.venv/tritons/`; a session puts one first on the import path.
nox reports a Python that is not on PATH as "interpreter not found".
"""

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


def environment(triton: str) -> dict[str, str]:
    """Variables that put a version of Triton first on the import path."""
    return {"PYTHONPATH": str(TRITON_FOLDER / triton), "OMP_NUM_THREADS": "1"}


def run_kernel_tests(
    session: nox.Session, triton: str, interpreted: list[str], compiled: list[str], *, short: bool = False
) -> None:
    """Run kernel tests in Triton's interpreter, and those that compile without a GPU.

    `short`: side by side, a process each, for importing PyTorch takes as long as many of the tests.
    """
    target = TRITON_FOLDER / triton
    if not (target / f"triton-{triton}.dist-info").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        session.run(*pip, f"triton=={triton}", external=True)
    env = environment(triton)
    check = f"import triton; assert triton.__version__ == {triton!r}, triton.__version__"
    session.run(sys.executable, "-c", check, env=env, external=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += [] if short else ["-n", "2", "--dist", "load"]
    codes = [0, 5] if session.posargs else [0]  # 5: the arguments for pytest select nothing in these files

    def run(files: list[str], interpret: str) -> object:
        options = {"env": env | {"TRITON_INTERPRET": interpret}, "success_codes": codes, "silent": short}
        return session.run(*pytest, *files, *session.posargs, **options, external=True)

    if short:
        with ThreadPoolExecutor() as pool:
            print(*pool.map(run, [interpreted, compiled], "10"))  # what one prints that fails, nox prints
    else:
        run(interpreted, "1")
        run(compiled, "0")


@nox.session(venv_backend="none")
@nox.parametrize("triton", TRITONS, ids=TRITONS)
def kernels(session: nox.Session, triton: str) -> None:
    """All kernel tests with one version of Triton, and the budgets of every kernel that is compiled."""
    run_kernel_tests(
        session, triton, find_tests("kernels/kernel_*"), find_tests("test_kernel_compile", "test_launches")
    )
    check = ["bench/kernel_report.py", "--target", "all", "--dtype", "bf16", "fp16", "fp32", "--check"]
    session.run(sys.executable, *check, env=environment(triton), external=True)


@nox.session(venv_backend="none")
@nox.parametrize("triton", [TRITONS[0], TRITONS[-1]], ids=["oldest", "newest"])
def kernels_short(session: nox.Session, triton: str) -> None:
    """A part of them, for CI: every kernel against the reference, and compilation of some for sm_90."""
    (path,) = find_tests("test_kernel_compile")
    compiled = [f"{path}::test_sizes_of_one", f"{path}::test_the_color_kernels_keep_pixels_in_registers"]
    (path,) = find_tests("test_launches")
    compiled.append(f"{path}::test_kept_launches_pass_the_arguments_of_the_first[backward in two kernels]")
    run_kernel_tests(session, triton, find_tests("kernel_operators", "kernel_accuracy"), compiled, short=True)


@nox.session(python=list(TORCH))
def library(session: nox.Session) -> None:
    """The tests of the loss with the oldest or the newest PyTorch."""
    session.install("--editable", ".[test]", *TORCH[str(session.python)])
    versions = "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
    session.run("python", "-c", versions)
    session.run("pytest", "-q", "-p", "no:cacheprovider", *find_tests(*LIBRARY), *session.posargs)
