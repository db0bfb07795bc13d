"""Autocast of GPUs on the CPU: which operators a plan runs in float32.

Under bfloat16 autocast a GPU computes norms, softmax, powers and sums in float32 and keeps float32 inputs for
the backward pass; a CPU keeps most of them in bfloat16. PyTorch has no GPU autocast without a GPU, so this
module registers the GPU's rules for the CPU. The operators are those of ATen/autocast_mode.h (AT_FORALL_FP32
and AT_FORALL_FP32_SET_OPT_DTYPE) that encoders use.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_INPUTS_IN_FLOAT32 = """
    layer_norm native_layer_norm rms_norm group_norm pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar exp expm1
    log log1p logsumexp reciprocal rsqrt softplus cosine_similarity upsample_nearest2d upsample_bilinear2d
    _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa
"""
# These read bfloat16 and accumulate in float32 by themselves.
_RESULT_IN_FLOAT32 = "softmax.int log_softmax.int cumsum cumprod linalg_vector_norm sum sum.dim_IntList"

_OFF = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


@contextlib.contextmanager
def autocast_as_on_gpus() -> Iterator[None]:
    """In this context `torch.autocast("cpu")` has the rules of `torch.autocast("cuda")`."""
    rules, has_rule = torch.library.Library("aten", "IMPL"), torch._C._dispatch_has_kernel_for_dispatch_key
    try:
        for kernel, names in ((_cast_inputs, _INPUTS_IN_FLOAT32), (_set_dtype, _RESULT_IN_FLOAT32)):
            for name in names.split():
                if has_rule(f"aten::{name}", "AutocastCUDA") and not has_rule(f"aten::{name}", "AutocastCPU"):
                    packet, _, overload = name.partition(".")
                    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
                    rules.impl(name, functools.partial(kernel, op), "AutocastCPU")
        yield
    finally:
        rules._destroy()


def _cast_inputs(op: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(_OFF):
        return op(*map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()})


def _set_dtype(op: Any, *args: Any, **kwargs: Any) -> Any:
    place = [argument.name for argument in op._schema.arguments].index("dtype")  # by position or by name
    given = args[place] if len(args) > place else kwargs.get("dtype")
    if given is None and args[0].dtype in (torch.bfloat16, torch.float16):
        args, kwargs = args[:place], {**kwargs, "dtype": torch.float32}
    with torch._C._ExcludeDispatchKeyGuard(_OFF):
        return op(*args, **kwargs)


def _float32(value: Any) -> Any:
    is_low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_low else value
