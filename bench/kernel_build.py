"""Compiles the kernels for any target without a GPU, with the arguments that the launchers would pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lejepa_fast import triton_operators
from lejepa_fast.kernels import backward, color_jitter, epilogue, forward, philox
from lejepa_fast.kernels.configs import Config, Tile, shipped_config
from lejepa_fast.kernels.runtime import OPTIONS
from lejepa_fast.kernels.table import COEF_BLOCK, Plan, count_splits

TILED = ("forward", "gradient", "product", "fused")
_PLAIN = Tile(32, 0, 0, 4, 3)
_STRIDES = ("stride_xv", "stride_xn", "stride_xk", "stride_ak", "stride_am", "stride_gv", "stride_gm")

Arguments = dict[str, Any]


class Size(NamedTuple):
    """Size of a problem: views, samples, dimensions, directions."""

    V: int
    N: int
    K: int
    M: int


class Kernel(NamedTuple):
    """A kernel with the arguments of one launch: tensors as "*type", numbers as values."""

    name: str
    function: Any
    arguments: Arguments
    tile: Tile


def tiled_kernel(
    name: str,
    target: str,
    dtype: str,
    plan: Plan,
    size: Size,
    tile: Tile | None = None,
    *,
    slice_grad: bool = False,
    directions: str | None = None,
) -> Kernel:
    """One of `TILED` as it is launched for a size, with its shipped tile or another.

    `slice_grad`: as the backward of a statistic for each direction (`reduction=None`) launches it.
    `directions`: their dtype, where it is not that of the embeddings: both are multiplied as float32.
    """
    mixed = directions not in (None, dtype)
    single = mixed or (slice_grad and name == "product")
    config = shipped_config(target, 4 if single else _itemsize(dtype))
    tile = config.tile(name, size.K) if tile is None else tile
    arguments = _common(target, dtype, plan, size)
    arguments |= _blocks(name, tile, size, config)
    if mixed:
        arguments |= {"a_ptr": f"*{directions}", "HAS_SCALE": False}
    if name == "forward":
        splits, samples = count_splits(size.V, size.N, size.M, plan.chunks, config.split)
        arguments |= {"out_ptr": "*fp32", "splits": splits, "split_samples": samples}
        arguments |= {"G": plan.chunk_giants, "CHUNKS": plan.chunks, "CHUNK_KNOTS": plan.chunk_knots}
        return Kernel(name, forward._sigreg_fwd_kernel, arguments, tile)
    arguments |= {"G": plan.G, "FAR": plan.chunks > 1, "SLICE_GRAD": slice_grad, "out_ptr": f"*{dtype}"}
    arguments |= {"coef_ptr": "*fp32", "grad_ptr": "*fp32", "dp_ptr": f"*{dtype}"}
    arguments |= dict.fromkeys(("SUB_TILES", "sub_tiles"), backward.count_sub_tiles(tile, plan, config.lanes))
    if slice_grad:
        arguments |= {"stride_gv": size.M, "stride_gm": 1}
    if slice_grad or mixed:  # dT/dp stays in float32
        arguments |= {"dp_ptr": "*fp32"} | ({"out_ptr": "*fp32"} if name == "gradient" else {})
    arguments |= {"NORMALIZE": dtype == "fp16" and not (slice_grad or mixed), "first_view": 0}
    if name == "fused":
        return Kernel(name, backward._sigreg_bwd_kernel, arguments, tile)
    if name == "product":
        arguments |= {"rows": size.V * size.N, "view_rows": size.N, "TABLE_ROWS": plan.rows}
        return Kernel(name, backward._sigreg_dx_kernel, arguments, tile)
    splits, samples = count_splits(size.V, size.N, size.M, 1, config.split)
    arguments |= {"splits": splits, "split_samples": samples, "n_first": 0, "n_stop": size.N}
    arguments["COEF_IN_REGISTERS"] = backward._in_registers(plan)
    return Kernel(name, backward._sigreg_dp_kernel, arguments, tile)


def plain_kernels(target: str, dtype: str, plan: Plan, size: Size) -> list[Kernel]:
    """The kernels without a choice of tiles."""
    common = _common(target, dtype, plan, size)
    pairs = (plan.G + 1) * (plan.B + 1) if plan.equidistant else plan.J
    splits, _ = count_splits(
        size.V, size.N, size.M, plan.chunks, shipped_config(target, _itemsize(dtype)).split
    )
    done = common | dict.fromkeys(("table_ptr", "count_ptr", "phi_ptr", "weights_ptr"), "*fp32")
    done |= {"value_ptr": "*fp32", "coef_ptr": "*fp32", "count": float(size.N), "splits": splits}
    done |= {"stride_split": size.V * plan.rows * size.M, "stride_pj": 1, "stride_pm": 0, "stride_wj": 1}
    done |= {"stride_wm": 0, "COUNT_ON_DEVICE": False, "UNBIASED": False, "SCALE_BY_N": True, "REDUCE": True}
    done |= {"G": plan.G, "BLOCK_M": COEF_BLOCK, "PAIRS": triton.next_power_of_2(pairs)}
    draw = common | {"step_ptr": "*i64", "out_ptr": f"*{dtype}", "seed": 3, "BLOCK_Q": 16, "BLOCK_M": 16}
    summing: Arguments = {"in_ptr": "*fp32", "out_ptr": "*fp32", "count": 256, "factor": 0.1, "BLOCK": 1024}
    return [
        Kernel("directions", philox._directions_kernel, draw, _PLAIN),
        Kernel("finish", epilogue._sigreg_finish_kernel, done, _PLAIN),
        Kernel("sum", epilogue._sum_kernel, summing, _PLAIN),
    ]


def colour_kernels(size: int, kernel_size: int) -> list[Kernel]:
    """Those of `kernels/color_jitter.py` for crops of `size` px: the blur's two passes are of two types."""
    common: dict[str, Any] = dict.fromkeys(("view_ptr", "middle_ptr", "out_ptr"), "*u8")
    common |= {"table_ptr": "*fp32"}
    common |= {"sums_ptr": "*i64", "stride_row": color_jitter.COLUMNS, "pixels": size * size}
    common |= {"threshold": 128, "BLOCK": color_jitter._BLOCK, "size": size, "KERNEL": kernel_size}
    first = common | {"source_ptr": "*u8", "out_ptr": "*fp32", "stride": 3, "LAST": False}
    second = common | {"source_ptr": "*fp32", "out_ptr": "*u8", "stride": 3 * size, "LAST": True}
    return [
        Kernel("gray sums", color_jitter._gray_sums_kernel, common, _PLAIN),
        Kernel("colour", color_jitter._color_kernel, common, _PLAIN),
        Kernel("blur", color_jitter._blur_kernel, first, _PLAIN),
        Kernel("blur", color_jitter._blur_kernel, second, _PLAIN),
    ]


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def _common(target: str, dtype: str, plan: Plan, size: Size) -> Arguments:
    half = _itemsize(dtype) == 2
    arguments: Arguments = {"x_ptr": f"*{dtype}", "a_ptr": f"*{dtype}"}
    arguments |= {"scale_ptr": "*fp32", "t_ptr": "*fp32"}
    arguments |= zip(_STRIDES, (size.N * size.K, size.K, 1, size.M, 1, 0, 0), strict=True)
    arguments |= {"views": size.V, "N": size.N, "K": size.K, "M": size.M, "J": plan.J}
    factors = ("factor_hi", "factor_lo", "giant_hi", "giant_lo", "out_factor")
    arguments |= dict.fromkeys(factors, 0.1)
    arguments |= {"HAS_SCALE": half, "EQUIDISTANT": plan.equidistant, "B": plan.B, "ROWS": plan.rows}
    # AMD's is that of the CPU.
    device = torch.device("cuda" if target.startswith("sm_") else "cpu")
    arguments["PRECISION"] = triton_operators.default_precision(device)
    return arguments


def _blocks(name: str, tile: Tile, size: Size, config: Config) -> Arguments:
    block_k, resident = tile.steps(size.K)
    blocks: Arguments = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "RESIDENT": resident}
    blocks |= {"BLOCK_K": tile.block_k if name == "product" else block_k}
    blocks |= {"TILES": triton.cdiv(size.K, block_k), "EVEN_K": size.K % block_k == 0}
    blocks |= {"MASK_M": size.M % tile.block_m != 0, "EVEN_N": size.N % tile.block_n == 0}
    blocks |= {"SUB_TILES": tile.sub_tiles, "sub_tiles": tile.sub_tiles, "sub_tile_stride": 0}
    return blocks | {"LANES": config.lanes}


def compile_kernel(kernel: Kernel, target: str) -> Any:
    """Compile as the launcher would: types from values, 1 as a constant, divisibility by 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.function.params):
        value = kernel.arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or one:
            constants[parameter.name] = value
            signature[parameter.name] = "constexpr"
        elif isinstance(value, str):
            signature[parameter.name] = value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, str) or (isinstance(value, int) and value % 16 == 0)
        if signature[parameter.name] != "constexpr" and aligned and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature=signature, constexprs=constants, attrs=attributes)
    options = {**OPTIONS, "num_warps": kernel.tile.num_warps, "num_stages": kernel.tile.num_stages}
    return triton.compile(source, target=gpu_target(target), options=options)


def gpu_target(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)
