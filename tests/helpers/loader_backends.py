"""The backends on which the tests of what the loader promises run: each with its device."""

from __future__ import annotations

from typing import Any

import pytest

from lejepa_fast.data.backends.choose_backend import dali_fault

BACKENDS = ("torchvision", "dali", "gpu")


def skip_without(name: str) -> None:
    """Skip the test, with the reason, where this backend cannot run. "gpu" is DALI on a GPU."""
    if name != "torchvision" and (fault := dali_fault(name == "gpu")):
        pytest.skip(fault)


def on(name: str) -> dict[str, Any]:
    """Arguments for `multicrop_loader` and `eval_loader`."""
    return {"backend": "dali", "device": "cuda"} if name == "gpu" else {"backend": name}
