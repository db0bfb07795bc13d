"""What is installed: one package with its data. The loss needs torch and triton alone, the rest an extra."""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
DATA = "lejepa_fast/data/trashnet96/"
# Distributions whose import name differs.
IMPORT_NAMES = {"pillow": "PIL", "nvidia-dali-cuda130": "nvidia"}


def python(*arguments: str, path: list[Path] | None = None, **options) -> subprocess.CompletedProcess[str]:
    """Run Python; with `path`, see the standard library and these folders only."""
    command = [sys.executable, *arguments]
    if path is not None:
        option, code, *rest = arguments
        assert option == "-c"
        folders = [str(folder) for folder in path]
        command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += {folders}; {code}", *rest]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


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
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns(".*", "__pycache__", "runs"),
    )
    return build("wheel", source, out), build("sdist", source, out)


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> list[Path]:
    """Import path with the installed wheel, and with torch, triton and what those two need themselves."""
    target, needed = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("needed")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(archives[0])]
    run = python(*pip)
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
    wheel, sdist = map(contents, archives)
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lejepa_fast"}
    beside = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}
    assert {name.split("/")[0] for name in sdist} - beside == {"lejepa_fast", "lejepa_fast.egg-info"}
    package = {name: size for name, size in wheel.items() if name.startswith("lejepa_fast/")}
    assert package == {name: size for name, size in sdist.items() if name.startswith("lejepa_fast/")}


def test_every_file_of_the_package_is_in_the_wheel(archives):
    """Sources, marker of types, templates, the embedded images with their licence: all that git tracks."""
    listed = ["git", "ls-files", "lejepa_fast", "kernels", "train"]
    run = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    tracked = [Path(name) for name in run.stdout.splitlines() if (ROOT / name).is_file()]
    expected = {str(name if name.parts[0] == "lejepa_fast" else "lejepa_fast" / name) for name in tracked}
    wheel = contents(archives[0])
    assert expected - set(wheel) == set()
    assert sum(size for name, size in wheel.items() if name.startswith(DATA)) < 12 * 2**20
    assert sum(name.endswith("LICENSE") for name in wheel if ".dist-info/" in name) == 2


def test_the_sdist_builds_the_same_wheel(archives, tmp_path):
    with tarfile.open(archives[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = contents(build("wheel", source, tmp_path))
    record = next(name for name in again if name.endswith("/RECORD"))
    assert {**again, record: 0} == {**contents(archives[0]), record: 0}


def test_the_loss_needs_torch_and_triton_alone(installed):
    code = (
        "import torch, lejepa_fast as l, lejepa_fast.kernels, importlib.util as u; x = torch.randn(2, 8, 4); "
        "x.requires_grad_(); l.LeJEPALoss()(x, x).total.backward(); print(l.__file__, x.grad.shape); "
        "print([u.find_spec(m) for m in ('kernels', 'train', 'torchvision', 'timm', 'PIL')])"
    )
    run = python("-c", code, path=installed)
    assert run.returncode == 0, run.stderr[-2000:]
    first, second = run.stdout.splitlines()
    assert first == f"{installed[0]}/lejepa_fast/__init__.py torch.Size([2, 8, 4])"
    assert second == str([None] * 5)


@pytest.mark.parametrize("package", ["train", "data"])
def test_a_missing_extra_is_named(installed, package):
    run = python("-c", f"import lejepa_fast.{package}", path=installed)
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: torchvision, ")
    assert last.endswith(": not installed; run: pip install 'lejepa_fast[train]'")


@pytest.mark.parametrize(
    "command", ["bin/lejepa-pretrain", "bin/lejepa-data", "bin/lejepa-plan", "lejepa_fast/train/pretrain.py"]
)
def test_commands_name_a_missing_extra_in_one_line(installed, command):
    program = str(installed[0] / command)
    code = "import runpy; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    run = python("-c", code, program, "--help", path=installed)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    last = run.stderr.splitlines()[-1]  # before it PyTorch warns that NumPy is missing
    assert re.fullmatch(r"error: torchvision, .* run: pip install 'lejepa_fast\[train\]'", last)


def scripts() -> dict[str, str]:
    text = (ROOT / "pyproject.toml").read_text()
    section = configparser.ConfigParser()
    section.read_string("[scripts]" + text.split("[project.scripts]")[1].split("\n[")[0])
    return {name: target.strip('"') for name, target in section["scripts"].items()}


@pytest.mark.parametrize("name", scripts())
def test_console_scripts_have_targets(name):
    module, function = scripts()[name].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def imported(files: Iterable[Path]) -> set[str]:
    """Top-level names that modules import from outside the standard library and this project."""
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"lejepa_fast"}


def test_every_import_is_declared():
    """Library and kernels need torch and triton; loader and trainer need what the extras name."""
    text = (ROOT / "pyproject.toml").read_text()

    def declared(table: str) -> set[str]:
        names = re.findall(r'^    "([\w-]+)', text.split(f"\n{table} = [")[1].split("\n]")[0], re.MULTILINE)
        return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}

    optional = {"nvidia", "wandb"}
    core, train = declared("dependencies"), declared("train")
    assert core == {"torch", "triton"}
    assert imported((ROOT / "lejepa_fast").glob("*.py")) <= core
    assert imported((ROOT / "kernels").glob("*.py")) <= core
    used = imported([*(ROOT / "lejepa_fast" / "data").rglob("*.py"), *(ROOT / "train").rglob("*.py")])
    assert used - core - optional <= train


@pytest.mark.parametrize("package", ["kernels", "train"])
def test_top_level_import_explains_itself(package):
    run = python("-c", f"import {package}", cwd=ROOT)
    assert run.returncode == 1
    assert f"imported as 'lejepa_fast.{package}'" in run.stderr


def test_version_is_stated_once():
    import lejepa_fast

    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert project.group(1) == lejepa_fast.__version__
