"""Modules of this package that Numba compiles, where it is installed and works."""

import functools
import importlib
import logging
import os
from typing import Any

log = logging.getLogger("lejepa_fast")


@functools.cache
def compiled_module(name: str) -> Any:
    """The module `name` of this package, compiled or from the cache of Numba; None without Numba, or
    where NUMBA_DISABLE_JIT leaves it interpreted. Warns where it does not work."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return None
    try:
        return importlib.import_module(f".{name}", __package__)
    except Exception as failure:  # compilers raise anything
        if isinstance(failure, ModuleNotFoundError) and failure.name in ("numba", "numpy"):
            return None
        log.warning("SIGReg on the CPU does without Numba, which is slower: %r", failure)
        return None
