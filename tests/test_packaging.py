"""What is installed: one package with its data. The loss needs torch and triton alone, the rest an extra."""

import graphlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement

import lejepa_fast

ROOT = Path(__file__).resolve().parents[1]
DATA = "lejepa_fast/data/trashnet96/"
# Distributions whose import name differs.
IMPORT_NAMES = {"pillow": "PIL", "nvidia-dali-cuda130": "nvidia"}


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def alone(path: list[Path], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code that sees the standard library and these folders only."""
    return python("-I", "-S", "-c", f"import sys; sys.path += {list(map(str, path))}\n{code}", *arguments)


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a "wheel" or an "sdist" as pip does, by the backend of pyproject.toml."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    run = python("-c", code, cwd=source)
    assert run.returncode == 0, run.stderr[-2000:]
    return out / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """Wheel and sdist, built from a copy so that no build folder is left behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("archives")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs")
    shutil.copytree(ROOT, source, symlinks=True, dirs_exist_ok=True, ignore=ignored)
    return build("wheel", source, out), build("sdist", source, out)


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> list[Path]:
    """Import path with the installed wheel, and with torch, triton and what those two need themselves."""
    target, needed = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("needed")
    run = python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(archives[0]))
    assert run.returncode == 0, run.stderr[-2000:]
    names = {"torch", "triton"}
    for name in (todo := list(names)):
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            link = needed / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(distribution.locate_file(file.parts[0]))
        for requirement in map(Requirement, distribution.requires or ()):
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and requirement.name not in names:
                names.add(requirement.name)
                todo.append(requirement.name)
    return [target, needed]


def contents(archive: Path) -> dict[str, int]:
    """Size of every file of a wheel or an sdist; a link is an error."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return {info.filename: info.file_size for info in file.infolist()}
    with tarfile.open(archive) as file:
        members = [member for member in file.getmembers() if not member.isdir()]
    assert all(member.isreg() for member in members)
    return {member.name.split("/", 1)[1]: member.size for member in members}


def test_wheel_and_sdist_hold_the_package_alone(archives):
    """Sources, marker of types, templates, the embedded images with their license: all that git tracks."""
    wheel, sdist = map(contents, archives)
    info = {name for name in wheel if ".dist-info/" in name}
    beside = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}
    assert {name.split("/")[0] for name in wheel.keys() - info} == {"lejepa_fast"}
    assert {name.split("/")[0] for name in sdist} - beside == {"lejepa_fast", "lejepa_fast.egg-info"}
    package = {name: size for name, size in sdist.items() if name.startswith("lejepa_fast/")}
    assert package == {name: wheel[name] for name in wheel.keys() - info}
    assert sum(name.endswith("LICENSE") for name in info) == 2
    assert sum(size for name, size in wheel.items() if name.startswith(DATA)) < 12 * 2**20
    listed = ["git", "ls-files", "lejepa_fast", "kernels", "train"]
    run = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    tracked = [Path(name) for name in run.stdout.splitlines() if (ROOT / name).is_file()]
    expected = {str(name if name.parts[0] == "lejepa_fast" else "lejepa_fast" / name) for name in tracked}
    assert expected <= wheel.keys()


def test_the_sdist_builds_the_same_wheel(archives, tmp_path):
    with tarfile.open(archives[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = contents(build("wheel", source, tmp_path))
    record = next(name for name in again if name.endswith("/RECORD"))
    assert {**again, record: 0} == {**contents(archives[0]), record: 0}


USE = """
import contextlib, importlib, importlib.util, io, runpy, torch, lejepa_fast, lejepa_fast.kernels
x = torch.randn(2, 8, 4, requires_grad=True)
lejepa_fast.LeJEPALoss()(x, x).total.backward()
print(lejepa_fast.__file__, x.grad.shape)
print([importlib.util.find_spec(name) for name in ("kernels", "train", "torchvision", "timm", "PIL")])
for package in ("train", "data"):
    try:
        getattr(importlib.import_module("lejepa_fast." + package), "open_source", None)
    except ModuleNotFoundError as error:
        print(error)
for command in sys.argv[1:]:
    sys.argv[:] = [command, "--help"]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            runpy.run_path(command, run_name="__main__")
    except SystemExit as stop:
        print(stop.code, said.getvalue().strip())
"""
COMMANDS = ("bin/lejepa-pretrain", "bin/lejepa-data", "bin/lejepa-plan", "lejepa_fast/train/pretrain.py")


def test_the_loss_needs_torch_and_triton_alone_and_a_missing_extra_is_named(installed):
    """By an import, and by each command in one line."""
    run = alone(installed, USE, *(str(installed[0] / command) for command in COMMANDS))
    assert run.returncode == 0, run.stderr[-2000:]
    first, second, *missing = run.stdout.splitlines()
    assert first == f"{installed[0]}/lejepa_fast/__init__.py torch.Size([2, 8, 4])"
    assert second == str([None] * 5)
    assert len(missing) == 2 + len(COMMANDS)
    for line, begin in zip(missing, [""] * 2 + ["2 error: "] * len(COMMANDS), strict=True):
        assert re.fullmatch(rf"{begin}torchvision, .*: not installed; .* 'lejepa_fast\[train\]'", line), line


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What each module imports, also in functions and under TYPE_CHECKING; of other packages the name."""
    graph = grimp.build_graph("lejepa_fast", include_external_packages=True, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_no_circle_of_imports(imports):
    """Nor between a package's `__init__` and its modules: the contract of import-linter looks at siblings."""
    assert imports["lejepa_fast.kernels.forward"], "grimp follows the symbolic links"
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None


def test_imports_scripts_and_version_are_declared(installed, imports):
    """Library and kernels need torch and triton; loader and trainer need what the extras name."""
    (package,) = importlib.metadata.distributions(path=[str(installed[0])])
    assert package.version == lejepa_fast.__version__
    scripts = package.entry_points.select(group="console_scripts")
    names = ("pretrain", "evaluate", "plan", "export", "data", "segment", "select", "sweep")
    assert {f"lejepa-{name}" for name in names} == scripts.names
    assert all(callable(script.load()) for script in scripts)

    def declared(extra: str) -> set[str]:
        wanted = map(Requirement, package.requires)
        names = {w.name for w in wanted if w.marker is None or w.marker.evaluate({"extra": extra})}
        return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}

    used: dict[bool, set[str]] = {True: set(), False: set()}
    for module in imports.keys() - {"lejepa_fast.cpu_tiles"}:  # it needs Numba
        outside = {name for name in imports[module] if not name.startswith("lejepa_fast")}
        used[module.startswith(("lejepa_fast.data", "lejepa_fast.train"))] |= outside
    assert declared("") == {"torch", "triton"}
    assert used[False] - set(sys.stdlib_module_names) <= declared("")
    assert used[True] - set(sys.stdlib_module_names) - {"nvidia", "wandb"} <= declared("train")


@pytest.mark.parametrize("folder", ["train", "bench", "examples"])
def test_no_script_shadows_the_standard_library(folder):
    """`python train/pretrain.py` puts train/ before it in sys.path, for every import of every package."""
    names = {path.stem for path in (ROOT / folder).iterdir()} - {"__init__"}
    assert names
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", ["kernels", "train"])
def test_top_level_import_explains_itself(package):
    run = python("-c", f"import {package}")
    assert run.returncode == 1
    assert f"imported as 'lejepa_fast.{package}'" in run.stderr
