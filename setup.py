"""Packaging: folders at the top of the repository become sub-packages of `lejepa_fast`.

A top-level package called `kernels` or `train` would collide with other projects, so the
wheel holds `lejepa_fast/...` only. Everything else is declared in pyproject.toml.
"""

from setuptools import setup

setup(
    packages=[
        "lejepa_fast",
        "lejepa_fast.data",
        "lejepa_fast.kernels",
        "lejepa_fast.train",
    ],
    package_dir={
        "lejepa_fast": "lejepa_fast",
        "lejepa_fast.kernels": "kernels",
        "lejepa_fast.train": "train",
    },
    package_data={
        "lejepa_fast": ["py.typed"],
        "lejepa_fast.data": ["trashnet96/*", "trashnet96/*/*"],
    },
)
