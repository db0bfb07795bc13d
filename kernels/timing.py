"""Times every candidate tile of every tiled kernel, for benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import autotune, backward, epilogue, forward
from .configs import ANY, Choice, get_config
from .table import make_plan


def time_candidates(
    x: Tensor,
    A: Tensor,
    scale: Tensor | None = None,
    *,
    J: int = 17,
    t_max: float = 3.0,
    precision: str = "ieee",
    fused: bool,
    timer: Callable[[Callable[[], None]], float] = autotune.measure,
) -> list[dict[str, Any]]:
    """Time the candidates of the tiled kernels of one forward and backward pass.

    Args:
        x: embeddings (V, N, K), float32, bf16 or fp16.
        A: directions (K, M) in the dtype of x or float32.
        scale: multiplies the columns of A, (M,) float32.
        J, t_max: knots.
        precision: of float32 products, "ieee", "tf32x3" or "tf32".
        fused: True times the fused backward, for any K and M; False gradient and product.
        timer: seconds that its argument, a call, takes.

    Returns:
        Rows {"kernel", "V", "N", "K", "M", "J", "dtype", "tile": {...}, "shipped": bool,
        "seconds": float or None, "error": None or why the tile cannot run}.
    """
    (V, N, K), M = x.shape, A.shape[1]
    config = get_config(x.device, x.element_size() if x.dtype == A.dtype else 4)
    tile = config.tile("fused", min(K, config.fused[-1].max_dim))
    config = config._replace(fused=(Choice(ANY, tile),) if fused else ())  # the first choice serves any case
    t = torch.arange(J, device=x.device, dtype=torch.float32) * (t_max / max(1, J - 1))
    phi = torch.exp(-t.square() / 2)
    plan = make_plan(J, t_max / (J - 1) if J > 1 else None)
    options: dict[str, Any] = {"unbiased": False, "scale_by_n": True, "factor": 1.0}
    tuner = autotune.forced_tuner = autotune.Tuner(timer)
    try:
        table = forward.table_sums(x, A, scale, t, plan, config, precision)
        value, coef = epilogue.finish(table, N, scale, t, phi, phi, plan, **options)
        backward.gradient(torch.ones_like(value), 1.0, coef, x, A, scale, t, plan, config, precision)
    except autotune.CANNOT_RUN:  # no tile of a kernel can run: the rows say why
        if all(row["error"] is None for row in tuner.rows):
            raise
    finally:
        autotune.forced_tuner = None
    size = {"V": V, "N": N, "K": K, "M": M, "J": J, "dtype": str(x.dtype)[6:]}
    return [{"kernel": row.pop("kernel"), **size, **row} for row in tuner.rows]
