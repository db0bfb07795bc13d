"""Tile sizes of the shipped configurations, one set per architecture and element size.

Source of the choices: the compiler's output (`bench/kernel_report.py`). No timing stands behind any of them
yet. In order: no spills, tensor-core instructions, then for sm_90 the least floor of the report, else the
least traffic among the tiles that were compiled.

- sm_90, half precision, K <= 512: directions resident, two programs a multiprocessor. Beyond: 128 x 128.
- sm_90, float32: 128 x 64; 128 x 128 spills.
- sm_80, sm_89: 128 x 64; float32 spills from 64 samples on, hence 128 x 32.
- sm_100: 64 directions; with 128, a thread holds a row of the accumulator and spills. 64 samples.
- gfx942: 64 x 64, two turns: 128 x 32 on 8 warps spills.
- fused: the largest K of which dx^T fits into registers beside the arithmetic. Eight warps take 128
  directions: with 64 both groups of four would work on the same projections.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layout import Split, ceil_div
from .rounding import Lost


class Tile(NamedTuple):
    """Sizes of one launch.

    Attributes:
        block_m, block_n, block_k: directions, samples, dimensions of a tile. `block_k` is the step along K;
            in `product` a tile of dx is (block_n, block_k) and `block_m` the step along the directions.
            `fused` holds all of K, in tiles of `block_k`.
        num_warps, num_stages: of Triton.
        turns: a tile of projections is worked on in so many turns. A turn needs registers.
        resident: the directions of a program stay in shared memory, all of K, and only samples are read.
        chain: dimensions that matrix units add in half precision before float32 does, a multiple of
            `block_k`; 0: all. More chains need more registers (why: `rounding.py`).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    turns: int = 1
    resident: bool = False
    chain: int = 128

    def steps(self, K: int) -> tuple[int, int]:
        """Step along K, and the tiles that cover K if the directions are resident, else 0."""
        block_k = min(self.block_k, max(16, 1 << (K - 1).bit_length()))
        return block_k, ceil_div(K, block_k) if self.resident else 0

    def for_sums(self, chunks: int, kind: str) -> Tile:
        """With the shortest chains for a table in chunks, which leaves no registers for others, and for fp16,
        which loses more.
        """
        short = self.resident and self.chain and (chunks > 1 or kind == "fp16")
        return self._replace(chain=self.block_k) if short else self


class Choice(NamedTuple):
    """The tile for K up to `max_dim`."""

    max_dim: int
    tile: Tile


class Config(NamedTuple):
    """Tiles of one architecture and element size, each kernel's by ascending `max_dim`.

    Attributes:
        forward: sums of the table.
        gradient: dT/dp of a chunk of samples.
        product: dx = dT/dp A^T.
        fused: backward in one kernel, where `fuses` says so, else `gradient` and `product`.
        split: how samples are shared.
        lost: what matrix units lose (`rounding.py`).
        lanes: threads that share a row of an accumulator; see `split_columns`.
        others: (kernel, tile) pairs that autotuning times beside the shipped tile.
    """

    forward: tuple[Choice, ...]
    gradient: tuple[Choice, ...]
    product: tuple[Choice, ...]
    fused: tuple[Choice, ...]
    split: Split
    lost: Lost = Lost()
    lanes: int = 4
    others: tuple[tuple[str, Tile], ...] = ()

    def fuses(self, K: int, M: int, *, slice_grad: bool = False) -> bool:
        """Whether the backward for K dimensions and M directions is one kernel.

        Only the first choice is for any case. The others have no registers to spare for sizes that do not
        fill the tiles, nor for float32 products, which a gradient for each direction asks for.
        """
        if not self.fused or K > self.fused[-1].max_dim:
            return False
        tile = self.tile("fused", K)
        fills = K % tile.block_k == 0 and M % tile.block_m == 0
        return K <= self.fused[0].max_dim or (fills and not slice_grad)

    def tile(self, kernel: str, K: int) -> Tile:
        """The shipped tile of "forward", "gradient", "product" or "fused" for K dimensions."""
        choices: tuple[Choice, ...] = getattr(self, kernel)
        return next(choice.tile for choice in choices if choice.max_dim >= K)

    def candidates(self, kernel: str, K: int) -> list[Tile]:
        """The shipped tile, then the others to time."""
        shipped = self.tile(kernel, K)
        others = [tile for name, tile in self.others if name == kernel and tile != shipped]
        return [shipped, *(tile for tile in others if K <= RESIDENT_MAX_DIM or not tile.resident)]


TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
ANY = 1 << 62
# 64 directions of two bytes an element then fill a third of an sm_90's shared memory.
RESIDENT_MAX_DIM = 512


def _always(tile: Tile) -> tuple[Choice, ...]:
    return (Choice(ANY, tile),)


def _up_to(max_dim: int, tile: Tile, beyond: Tile) -> tuple[Choice, ...]:
    return Choice(max_dim, tile), Choice(ANY, beyond)


# Directions stay, two programs fit a multiprocessor and overlap; and the tile with the least traffic of those
# that fit into registers, for a K beyond that.
_RESIDENT = Tile(64, 32, 64, 4, 1, turns=2, resident=True)
_RESIDENT_GRADIENT = _RESIDENT._replace(chain=256)  # shorter ones spill; the gradient is rounded anyway
_WIDE = Tile(128, 128, 64, 8, 2, turns=4)
_HALF_OTHERS = (
    ("forward", _RESIDENT),
    ("forward", Tile(128, 64, 64, 8, 1, turns=2, resident=True)),
    ("forward", Tile(64, 64, 64, 4, 3)),
    ("forward", Tile(64, 128, 64, 4, 3, turns=2)),
    ("forward", Tile(128, 64, 64, 8, 3, turns=2, chain=64)),
    ("forward", _WIDE),
    ("gradient", _RESIDENT_GRADIENT),
    ("gradient", Tile(64, 64, 64, 4, 3, turns=2)),
    ("gradient", Tile(128, 64, 64, 8, 3, turns=2, chain=64)),
    ("gradient", _WIDE),
    ("product", Tile(64, 64, 64, 4, 3)),
    ("product", Tile(64, 128, 128, 8, 3)),
    ("product", Tile(64, 128, 256, 8, 3)),
    ("product", Tile(64, 128, 256, 8, 4)),
    ("fused", Tile(64, 32, 64, 4, 1)),
    ("fused", Tile(64, 32, 64, 4, 1, turns=2)),
    ("fused", Tile(64, 32, 64, 4, 1, turns=4)),
    ("fused", Tile(64, 32, 128, 4, 1, turns=4)),
    ("fused", Tile(128, 32, 128, 8, 1, turns=2)),
)
_SINGLE_OTHERS = (
    ("forward", Tile(64, 64, 32, 4, 3)),
    ("forward", Tile(128, 32, 32, 8, 3)),
    ("forward", Tile(128, 64, 32, 8, 3, turns=2)),
    ("gradient", Tile(64, 64, 32, 4, 3, turns=2)),
    ("gradient", Tile(128, 32, 32, 8, 3)),
    ("gradient", Tile(128, 64, 32, 8, 3, turns=2)),
    ("product", Tile(32, 64, 64, 4, 3)),
    ("product", Tile(32, 128, 64, 8, 3)),
    ("product", Tile(32, 128, 128, 8, 3)),
    ("fused", Tile(64, 32, 32, 4, 1)),
    ("fused", Tile(64, 16, 32, 4, 1)),
)


def _config(
    programs: int,
    lost: Lost,
    forward: tuple[Choice, ...],
    gradient: tuple[Choice, ...],
    product: Tile,
    fused: tuple[Choice, ...],
    others: tuple[tuple[str, Tile], ...],
) -> Config:
    return Config(forward, gradient, _always(product), fused, Split(64, 128, programs), lost, others=others)


# Four fifths of what normal embeddings lose: sparse ones lose less (`bench/rounding_bench.py`).
_AMPERE_LOST = Lost(bf16=6.2e-10, fp16=1.4e-9, tf32x3=2.8e-9)
_HOPPER_LOST = Lost(bf16=6.0e-10, fp16=1.1e-9, tf32x3=2.2e-9)  # and later
# `programs`: two a multiprocessor.
_FUSED = Tile(64, 32, 64, 4, 1, turns=2)
_FUSED_TURNS = _FUSED._replace(turns=4)  # triton 3.6 spills with two
_FUSED_WIDE = Tile(128, 32, 128, 8, 1, turns=2)
_MIDDLE = Tile(128, 64, 64, 8, 3, turns=2, chain=64)
_SMALL = Tile(64, 64, 64, 4, 3, turns=2)
_AMPERE = (_always(_MIDDLE), _always(_MIDDLE), Tile(64, 128, 128, 8, 3))
_HALF = {
    "sm_80": _config(
        216, _AMPERE_LOST, *_AMPERE, (Choice(64, _FUSED), Choice(256, _FUSED_WIDE)), _HALF_OTHERS
    ),
    "sm_89": _config(284, _AMPERE_LOST, *_AMPERE, (Choice(64, _FUSED), Choice(256, _FUSED)), _HALF_OTHERS),
    "sm_90": _config(
        264,
        _HOPPER_LOST,
        _up_to(RESIDENT_MAX_DIM, _RESIDENT, _WIDE),
        _up_to(RESIDENT_MAX_DIM, _RESIDENT_GRADIENT, _WIDE),
        Tile(64, 128, 256, 8, 3),
        (Choice(64, _FUSED), Choice(128, _FUSED), Choice(256, _FUSED_TURNS), Choice(512, _FUSED_WIDE)),
        _HALF_OTHERS,
    ),
    "sm_100": _config(
        296,
        _HOPPER_LOST,
        _always(_SMALL._replace(chain=64)),
        _always(_SMALL),
        Tile(64, 128, 256, 8, 3),
        (Choice(64, _FUSED), Choice(256, _FUSED), Choice(512, Tile(64, 32, 128, 4, 1, turns=4))),
        _HALF_OTHERS,
    ),
    "gfx942": _config(
        608,
        Lost(),
        _always(_SMALL._replace(num_stages=2, chain=0)),
        _always(_SMALL._replace(num_stages=2, chain=0)),
        Tile(64, 128, 128, 8, 2),
        (Choice(64, _FUSED._replace(chain=0)), Choice(256, _FUSED._replace(chain=0))),
        tuple((kernel, tile._replace(chain=0)) for kernel, tile in _HALF_OTHERS),
    ),
}
_NARROW = Tile(128, 32, 32, 8, 3)
_MIDDLE_SINGLE = _MIDDLE._replace(block_k=32)
_SMALL_SINGLE = _SMALL._replace(block_k=32)
_FUSED_SINGLE = _FUSED._replace(block_k=32)
_AMPERE_SINGLE = (
    _always(_NARROW),
    _always(_NARROW),
    Tile(32, 128, 64, 8, 3),
    (Choice(32, _FUSED_SINGLE), Choice(64, _FUSED_SINGLE)),
    _SINGLE_OTHERS,
)
_SINGLE = {
    "sm_80": _config(216, _AMPERE_LOST, *_AMPERE_SINGLE),
    "sm_89": _config(284, _AMPERE_LOST, *_AMPERE_SINGLE),
    "sm_90": _config(
        264,
        _HOPPER_LOST,
        _always(_MIDDLE_SINGLE),
        _always(_MIDDLE_SINGLE),
        Tile(32, 128, 128, 8, 3),
        (Choice(32, _FUSED_SINGLE), Choice(64, _FUSED_SINGLE._replace(block_n=16))),
        _SINGLE_OTHERS,
    ),
    "sm_100": _config(
        296,
        _HOPPER_LOST,
        _always(_SMALL_SINGLE),
        _always(_SMALL_SINGLE),
        Tile(32, 128, 128, 8, 3),
        (Choice(32, _FUSED_SINGLE),),
        _SINGLE_OTHERS,
    ),
    "gfx942": _config(
        608,
        Lost(),
        _always(_SMALL_SINGLE._replace(num_stages=2)),
        _always(_SMALL_SINGLE._replace(num_stages=2)),
        Tile(32, 128, 128, 8, 2),
        (Choice(64, _FUSED), Choice(128, _FUSED)),
        _SINGLE_OTHERS,
    ),
}
_STEP = Tile(16, 16, 16, 1, 1, chain=32)
# Small enough for a few milliseconds a tile in Triton's interpreter, which runs NumPy.
_INTERPRETER = Config(
    forward=_up_to(32, _STEP._replace(resident=True), _STEP._replace(turns=2)),
    gradient=_up_to(48, _STEP._replace(resident=True), _STEP._replace(turns=2)),
    product=_always(_STEP),
    fused=(Choice(24, _STEP._replace(turns=2)), Choice(32, _STEP._replace(block_m=32))),
    split=Split(16, 32, 6),
    others=(
        ("forward", _STEP._replace(resident=True)),
        ("forward", _STEP._replace(block_m=32, block_n=32)),
        ("gradient", _STEP._replace(block_n=32, turns=4)),
        ("product", _STEP._replace(block_k=32)),
        ("fused", _STEP._replace(block_n=32)),
    ),
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
        ValueError: the GPU is older than sm_80, or one of AMD without matrix cores of that kind.
    """
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        if not name.startswith(("gfx90a", "gfx94", "gfx95")):
            raise ValueError(
                "impl: 'triton' kernels need a CDNA GPU (gfx90a, gfx942, gfx950) on ROCm, "
                f"got {name}; use impl='torch'"
            )
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
    # Consumer Blackwell (12.x) has the shared memory and the tensor-core instructions of sm_89. It loses less
    # of a projection: what is made up for too much is a small part of what the accuracy rule allows.
    return "sm_100" if major in (10, 11) else "sm_89"
