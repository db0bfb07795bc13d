"""Packaging. `kernels/` and `train/` stand at the top of the repository and are packages of `lejepa_fast`.

The symbolic links `lejepa_fast/kernels` and `lejepa_fast/train` make folder and import path agree for Python,
type checkers, editors and pip alike. Everything else is declared in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["lejepa_fast", "lejepa_fast.*"]),
    package_data={
        "lejepa_fast": ["py.typed"],
        "lejepa_fast.data": ["trashnet96/*", "trashnet96/*/*"],
        "lejepa_fast.train.report": ["*.j2"],
    },
)
