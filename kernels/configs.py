"""Tile sizes of the shipped configurations, one per architecture.

Source of the choices. No timing stands behind any of them yet. sm_90 in half precision was chosen from
the compiler's output (`bench/kernel_report.py`: no spills, tensor-core instructions, fewest instructions
per projected sample). The others are the same tiles with the pipeline depth that their shared memory
holds (99 KB a block on sm_89, 163 KB on sm_80, 64 KB on gfx942), compiled but neither run nor tuned:
the report shows spills for float32 (forward on sm_80 and sm_89, fused on sm_90 and sm_100) and for
forward on sm_100.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Sizes of one kernel's tile: directions, samples, dimensions; warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    """Tiles of one architecture and element size.

    Attributes:
        forward: sums; `block_k` is the step along K.
        gradient: dT/dp of a chunk of samples.
        product: dx = dT/dp A^T; `block_m` is the step along the directions, `block_k` a tile of dx.
        fused: backward in one kernel, for K up to `fused_max_dim`, whose dx stays in registers.
        fused_max_dim: largest such K.
        programs: programs to start at least, by splitting the samples of a view.
    """

    forward: Tile
    gradient: Tile
    product: Tile
    fused: Tile
    fused_max_dim: int
    programs: int


TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")


def _config(stages: int, programs: int) -> Config:
    return Config(
        forward=Tile(64, 64, 64, 4, stages),
        gradient=Tile(128, 32, 64, 8, stages),
        product=Tile(64, 64, 64, 4, stages),
        fused=Tile(64, 32, 64, 4, 1),
        fused_max_dim=64,
        programs=programs,
    )


# Half precision: two-byte elements. `programs`: about four a multiprocessor.
_HALF = {
    "sm_80": _config(3, 432),
    "sm_89": _config(3, 568),
    "sm_90": _config(3, 528),
    "sm_100": _config(3, 592),
    "gfx942": _config(2, 1216),
}


def _single(half: Config) -> Config:
    """The same for four-byte elements: half the step along K."""
    return half._replace(
        forward=half.forward._replace(block_k=32),
        gradient=half.gradient._replace(block_k=32),
        product=half.product._replace(block_m=32),
    )


_SINGLE = {target: _single(config) for target, config in _HALF.items()}
# Small enough for a few milliseconds a tile in Triton's interpreter, which runs NumPy.
_INTERPRETER = Config(
    forward=Tile(16, 16, 16, 1, 1),
    gradient=Tile(16, 16, 16, 1, 1),
    product=Tile(16, 16, 16, 1, 1),
    fused=Tile(16, 16, 16, 1, 1),
    fused_max_dim=32,
    programs=6,
)


def get_config(device: torch.device, itemsize: int) -> Config:
    """The configuration for tiles of `itemsize` bytes an element on a device."""
    if device.type == "cpu":
        return _INTERPRETER
    return shipped_config(target_of(device), itemsize)


def shipped_config(target: str, itemsize: int) -> Config:
    """The configuration of one of `TARGETS`."""
    return (_HALF if itemsize == 2 else _SINGLE)[target]


def target_of(device: torch.device) -> str:
    """Which of `TARGETS` a GPU is served by.

    Raises:
        ValueError: the GPU is older than sm_80.
    """
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"impl: 'triton' kernels need a GPU of compute capability 8.0 or newer, got {major}.{minor}; "
            "use impl='torch'"
        )
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    if major == 9:
        return "sm_90"
    # Consumer Blackwell (12.x) has the shared memory and the tensor-core instructions of sm_89.
    return "sm_100" if major in (10, 11) else "sm_89"
