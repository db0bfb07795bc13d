"""What is installed: one top-level package, with the embedded images and their licence."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as `pip install .` builds it, from a copy so that no build folder is left behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("lejepa_fast", "kernels", "train", "bench", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
    ]
    run = subprocess.run(build, cwd=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_wheel_holds_one_top_level_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lejepa_fast"}
    for module in ("sigreg", "kernels/__init__", "train/pretrain", "train/evaluate", "data/recipe"):
        assert f"lejepa_fast/{module}.py" in names


def test_wheel_holds_the_embedded_images_and_licences(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        embedded = [i for i in archive.infolist() if i.filename.startswith("lejepa_fast/data/trashnet96/")]
    files = {Path(i.filename).name for i in embedded}
    assert {"LICENSE", "README.md", "classes.txt"} <= files
    assert sum(i.filename.endswith(".tar") for i in embedded) >= 2
    assert sum(i.file_size for i in embedded) < 12 * 2**20
    assert sum(name.endswith("LICENSE") for name in names if ".dist-info/" in name) == 2


def test_installed_wheel_imports_without_shadowing(wheel, tmp_path):
    """Unpacked on an empty path: `lejepa_fast.kernels` is there, `kernels` and `train` are not."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import importlib.util, lejepa_fast, lejepa_fast.kernels, lejepa_fast.train, lejepa_fast.data; "
        f"assert lejepa_fast.__file__.startswith({str(tmp_path)!r}), lejepa_fast.__file__; "
        "assert not importlib.util.find_spec('kernels') and not importlib.util.find_spec('train')"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("package", ["kernels", "train"])
def test_top_level_import_explains_itself(package):
    run = subprocess.run(
        [sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert f"imported as 'lejepa_fast.{package}'" in run.stderr


def test_version_is_stated_once():
    import re

    import lejepa_fast

    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert project.group(1) == lejepa_fast.__version__
