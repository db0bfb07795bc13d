"""The random states of a process: Python's, NumPy's, PyTorch's and the GPU's."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """Return all random states of this process as JSON."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set the random states that `capture_rng` returned, also after a round trip through JSON."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    for name, restore in (("torch", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        if name in state and (name == "torch" or torch.cuda.is_available()):
            restore(torch.frombuffer(bytearray.fromhex(state[name]), dtype=torch.uint8))


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the random states at the end, whatever happens inside."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)


def seed_rng(seed: int, rank: int, step: int = 0) -> None:
    """Seed all random states of this process; ranks differ, and so do starts at different steps."""
    seed += 7919 * rank + step
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
