"""Shipped tile sizes, one set per architecture and element size.

They were chosen from the compiler's output (`bench/kernel_report.py`), not from timings: first no spills and
tensor-core instructions, then on sm_90 the smallest predicted time, elsewhere the least memory traffic.

- sm_90, half precision: up to K 512 directions are resident and two programs share a multiprocessor; beyond,
  four stages, so that two steps of the product are on their way.
- sm_90, float32: 128 x 64; 128 x 128 spills.
- sm_80, sm_89: 128 x 64; float32 spills from 64 samples on, hence 128 x 32.
- sm_100: 64 directions; with 128 a thread holds a whole row of the accumulator and spills.
- gfx942: 64 x 64 in two sub-tiles; 128 x 32 with 8 warps spills.
- product, half precision: narrower where M is no multiple of 16, as its loads then take more registers.
- fused: up to the largest K whose dx^T fits into registers, on sm_90 into those of two programs. Eight warps
  take 128 directions; with 64 both groups of four warps would compute the same projections.
"""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .runtime import OPTIONS
from .table import Plan, Split, ceil_div


class Tile(NamedTuple):
    """Sizes of one launch."""

    block_m: int
    """Directions of a tile; in `product` the step along the directions."""
    block_n: int
    """Samples of a tile."""
    block_k: int
    """Step along the dimensions. A tile of dx in `product` is (block_n, block_k)."""
    num_warps: int
    num_stages: int
    sub_tiles: int = 1
    """A tile of projections is processed in this many parts: fewer values are live in registers."""
    resident: bool = False
    """The directions of a program, all of K, stay in shared memory; only samples are read in the loop.
    NVIDIA only, half precision."""

    def steps(self, K: int) -> tuple[int, int]:
        """Step along K, and the number of tiles that cover K if the directions are resident, else 0.

        Resident tiles are as long as the largest power of two that divides K, or 64: each is one wait for
        the tensor cores.
        """
        block_k = min(self.block_k, max(16, 1 << (K - 1).bit_length()))
        if self.resident:
            block_k = min(block_k, max(64, K & -K))
        return block_k, ceil_div(K, block_k) if self.resident else 0

    def options(self, K: int, precision: str) -> dict[str, Any]:
        """Arguments of every tiled kernel."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.steps(K)[0]}
        warps = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**blocks, "PRECISION": precision, **warps, **OPTIONS}


class Config(NamedTuple):
    """Tiles of one architecture and element size, by the largest K that each serves, ascending."""

    forward: dict[int, Tile]
    """Sums of the table."""
    gradient: dict[int, Tile]
    """dT/dp of a chunk of samples."""
    product: dict[int, Tile]
    """dx = dT/dp A^T of a chunk."""
    fused: dict[int, Tile]
    """Backward in one kernel, where `fuses` says so; else `gradient` and `product`."""
    split: Split
    """How samples are shared between programs."""
    others: dict[str, tuple[Tile, ...]]
    """Tiles of each kernel that autotuning times beside the shipped one."""
    stretch: float = 1.0
    """Multiplies projections in tf32x3. Tensor cores cut sums off where float32 rounds, which shrinks every
    projection by about 9e-8 (sm_80) or 7e-8 (sm_90) in tiles of 32 dimensions: predicted by the models
    of Xie et al. (arXiv 2511.10909); no GPU has been measured."""
    uneven_product: Tile | None = None
    """The tile of `product` where M is no multiple of 16; None: the same. Numbers are then loaded one by one,
    and their addresses would not leave enough registers for a wider tile."""

    def for_directions(self, M: int) -> "Config":
        """The configuration for M directions."""
        if self.uneven_product is None or M % 16 == 0:
            return self
        return self._replace(product={ANY: self.uneven_product})

    def fuses(self, K: int, M: int, *, slice_grad: bool = False) -> bool:
        """Whether the backward for K dimensions and M directions is one kernel.

        Only the first tile serves every case. The others have no registers left for sizes that do not fill
        them, nor for the float32 products of a gradient for each direction (`slice_grad`).
        """
        if K <= min(self.fused, default=0):
            return True
        if slice_grad or K > max(self.fused, default=0):
            return False
        tile = self.tile("fused", K)
        return K % tile.block_k == 0 and M % tile.block_m == 0

    def tile(self, kernel: str, K: int) -> Tile:
        """The shipped tile of "forward", "gradient", "product" or "fused" for K dimensions."""
        return next(tile for largest, tile in getattr(self, kernel).items() if largest >= K)

    def arguments(
        self, tile: Tile, x: Tensor, A: Tensor, scale: Tensor | None, plan: Plan, precision: str
    ) -> dict[str, Any]:
        """Numbers that all kernels with projections take; the tensors as for `forward.table_sums`."""
        options = tile.options(x.shape[2], precision)
        strides = zip(("xv", "xn", "xk", "ak", "am"), (*x.stride(), *A.stride()), strict=True)
        return {
            "K": A.shape[0],
            "M": A.shape[1],
            "J": plan.J,
            "factor_hi": plan.factor_hi,
            "factor_lo": plan.factor_lo,
            **{f"stride_{name}": stride for name, stride in strides},
            "HAS_SCALE": scale is not None,
            "EQUIDISTANT": plan.equidistant,
            "B": plan.B,
            "ROWS": plan.rows,
            "EVEN_K": A.shape[0] % options["BLOCK_K"] == 0,
            **options,
        }

    def candidates(self, kernel: str, K: int) -> list[Tile]:
        """The shipped tile, then the others to time."""
        others = (tile for tile in self.others[kernel] if K <= RESIDENT_MAX_DIM or not tile.resident)
        return list(dict.fromkeys((self.tile(kernel, K), *others)))


def operands(x: Tensor, A: Tensor, scale: Tensor | None, t: Tensor) -> dict[str, Tensor]:
    """Tensors that all kernels with projections read."""
    return {"x_ptr": x, "a_ptr": A, "scale_ptr": A if scale is None else scale, "t_ptr": t}


def problem_of(x: Tensor, A: Tensor, scale: Tensor | None, plan: Plan, precision: str) -> Hashable:
    """What `Config.arguments` and `operands` depend on, but for the tile; see `runtime.launch`."""
    sizes = (x.shape, x.stride(), x.dtype, A.shape, A.stride(), A.dtype)
    return sizes, x.device, scale is None, plan, precision


TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
ANY = 1 << 62
# 64 directions of two bytes an element then fill a third of the shared memory of an sm_90 multiprocessor.
RESIDENT_MAX_DIM = 512


def _config(
    tiles: dict[int, Tile],
    product: Tile,
    fused: dict[int, Tile],
    multiprocessors: int,
    others: dict[str, tuple[Tile, ...]],
    stretch: float = 1.0,
    uneven_product: Tile | None = None,
) -> Config:
    """A configuration whose forward and gradient share their `tiles`; two programs on a multiprocessor."""
    split = Split(64, 128, 2 * multiprocessors)
    return Config(tiles, tiles, {ANY: product}, fused, split, others, stretch, uneven_product)


_RESIDENT = Tile(64, 32, 512, 4, 1, sub_tiles=2, resident=True)
_WIDE = Tile(128, 128, 64, 8, 4, sub_tiles=4)
_MIDDLE = Tile(128, 64, 64, 8, 3, sub_tiles=2)
_SMALL = Tile(64, 64, 64, 4, 3, sub_tiles=2)
_SMALL_AMD = _SMALL._replace(num_stages=2)
_PRODUCT = Tile(64, 128, 128, 8, 3)
_PRODUCT_WIDE = Tile(64, 128, 256, 8, 3)
_PRODUCT_UNEVEN = Tile(32, 128, 128, 8, 3)
_FUSED = Tile(64, 32, 64, 4, 1, sub_tiles=2)
_FUSED_FOUR = _FUSED._replace(sub_tiles=4)  # triton 3.6 spills with two
_FUSED_WIDE = Tile(128, 32, 128, 8, 1, sub_tiles=2)
_FUSED_SM_100 = Tile(64, 32, 128, 4, 1, sub_tiles=4)
_HALF_OTHERS = {
    "forward": (
        _RESIDENT,
        Tile(128, 64, 64, 8, 1, sub_tiles=2, resident=True),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 128, 64, 4, 3, sub_tiles=2),
        _MIDDLE,
        _WIDE,
        _WIDE._replace(num_stages=2),
    ),
    "gradient": (_RESIDENT, _SMALL, _MIDDLE, _WIDE, _WIDE._replace(num_stages=2)),
    "product": (Tile(64, 64, 64, 4, 3), _PRODUCT, _PRODUCT_WIDE, Tile(64, 128, 256, 8, 4)),
    "fused": (Tile(64, 32, 64, 4, 1), _FUSED, _FUSED_FOUR, _FUSED_SM_100, _FUSED_WIDE),
}
_AMD_OTHERS = {k: tuple(tile for tile in tiles if not tile.resident) for k, tiles in _HALF_OTHERS.items()}
_RESIDENT_OR_WIDE = {RESIDENT_MAX_DIM: _RESIDENT, ANY: _WIDE}
# Not 512 (`_FUSED_WIDE`): one program fills a multiprocessor, so that its product and its arithmetic add. The
# model of bench/kernel_report.py takes it for a quarter slower than two kernels, at K 256 for a bit faster.
_FUSED_SM_90 = {64: _FUSED, 128: _FUSED, 256: _FUSED_FOUR}
_FUSED_TO_256 = {64: _FUSED, 256: _FUSED}
_HALF = {
    target: _config(tiles, product, fused, multiprocessors, _HALF_OTHERS, uneven_product=_PRODUCT_UNEVEN)
    for target, tiles, product, fused, multiprocessors in (
        ("sm_80", {ANY: _MIDDLE}, _PRODUCT, {64: _FUSED, 256: _FUSED_WIDE}, 108),
        ("sm_89", {ANY: _MIDDLE}, _PRODUCT, _FUSED_TO_256, 142),
        ("sm_90", _RESIDENT_OR_WIDE, _PRODUCT_WIDE, _FUSED_SM_90, 132),
        ("sm_100", {ANY: _SMALL}, _PRODUCT_WIDE, {**_FUSED_TO_256, 512: _FUSED_SM_100}, 148),
    )
}
_HALF["gfx942"] = _config({ANY: _SMALL_AMD}, _PRODUCT._replace(num_stages=2), _FUSED_TO_256, 304, _AMD_OTHERS)
_NARROW = Tile(128, 32, 32, 8, 3)
_MIDDLE_32 = _MIDDLE._replace(block_k=32)
_SMALL_32 = _SMALL._replace(block_k=32)
_SMALL_32_AMD = _SMALL_32._replace(num_stages=2)
_PRODUCT_32 = Tile(32, 128, 64, 8, 3)
_PRODUCT_32_WIDE = Tile(32, 128, 128, 8, 3)
_FUSED_32 = _FUSED._replace(block_k=32)
_FUSED_32_NARROW = _FUSED_32._replace(block_n=16)  # triton 3.8 spills with 32 samples
_SINGLE_OTHERS = {
    "forward": (Tile(64, 64, 32, 4, 3), _NARROW, _MIDDLE_32),
    "gradient": (_SMALL_32, _NARROW, _MIDDLE_32),
    "product": (Tile(32, 64, 64, 4, 3), _PRODUCT_32, _PRODUCT_32_WIDE),
    "fused": (Tile(64, 32, 32, 4, 1), Tile(64, 16, 32, 4, 1)),
}
_FUSED_32_TO_64 = {32: _FUSED_32, 64: _FUSED_32_NARROW}
_SINGLE = {
    "sm_80": _config({ANY: _NARROW}, _PRODUCT_32, _FUSED_32_TO_64, 108, _SINGLE_OTHERS, 1 + 9e-8),
    "sm_89": _config({ANY: _NARROW}, _PRODUCT_32, {32: _FUSED_32}, 142, _SINGLE_OTHERS, 1 + 9e-8),
    "sm_90": _config({ANY: _MIDDLE_32}, _PRODUCT_32_WIDE, _FUSED_32_TO_64, 132, _SINGLE_OTHERS, 1 + 7e-8),
    "sm_100": _config(
        {ANY: _SMALL_32}, _PRODUCT_32_WIDE, {32: _FUSED_32_NARROW}, 148, _SINGLE_OTHERS, 1 + 7e-8
    ),
    "gfx942": _config(
        {ANY: _SMALL_32_AMD},
        _PRODUCT_32_WIDE._replace(num_stages=2),
        {64: _FUSED, 128: _FUSED},
        304,
        _SINGLE_OTHERS,
    ),
}
_STEP = Tile(16, 16, 16, 1, 1)
_STEP_RESIDENT, _STEP_TWO = _STEP._replace(resident=True), _STEP._replace(sub_tiles=2)
# Small enough for a few milliseconds a tile in Triton's interpreter, which runs NumPy.
_INTERPRETER = Config(
    forward={32: _STEP_RESIDENT, ANY: _STEP_TWO},
    gradient={48: _STEP_RESIDENT, ANY: _STEP_TWO},
    product={ANY: _STEP},
    fused={24: _STEP_TWO, 32: _STEP._replace(block_m=32)},
    split=Split(16, 32, 6),
    others={
        "forward": (_STEP_RESIDENT, _STEP._replace(block_m=32, block_n=32)),
        "gradient": (_STEP._replace(block_n=32, sub_tiles=4),),
        "product": (_STEP._replace(block_k=32),),
        "fused": (_STEP._replace(block_n=32),),
    },
    uneven_product=_STEP._replace(block_k=32),
)


def get_config(device: torch.device, itemsize: int) -> Config:
    """The configuration for operands of `itemsize` bytes on a device; the interpreter's on a CPU."""
    if device.type == "cpu":
        return _INTERPRETER
    return shipped_config(target_of(device), itemsize)


def shipped_config(target: str, itemsize: int) -> Config:
    """The configuration of one of `TARGETS`."""
    return (_HALF if itemsize == 2 else _SINGLE)[target]


@functools.cache
def target_of(device: torch.device) -> str:
    """The one of `TARGETS` whose configuration serves a GPU.

    Raises:
        ValueError: an NVIDIA GPU older than sm_80, or an AMD GPU that is not of the CDNA family.
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
    # Consumer Blackwell (12.x) has the shared memory and the tensor-core instructions of sm_89.
    return "sm_100" if major in (10, 11) else "sm_89"
