"""Floating-point operations of a training step, counted on the meta device.

PyTorch's flop counter runs over encoder, projector and loss: shapes only, no arithmetic and no memory. It
counts matrix products and convolutions, forward and backward, as two operations per multiply-add. What an
implementation repeats (activation checkpointing, the backward pass of fused attention and of SIGReg) does not
count, so it does not raise the "model flops utilization".
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lejepa_fast import LeJEPALoss, SIGReg
from lejepa_fast.train.config import Config
from lejepa_fast.train.model.model import LeJEPAModel, build_model
from lejepa_fast.train.runtime.gpu_specs import by_device_name

_IMAGES = 2  # to count on; BatchNorm refuses one. All operations are proportional to their number.


@dataclass(frozen=True)
class Flops:
    """Operations of one image, forward and backward."""

    global_view: float
    """One view through the encoder, as `local_view`."""
    local_view: float
    projector: float
    """All views of the image, as `loss`."""
    loss: float
    per_image: float
    """The whole step."""


def count_flops(cfg: Config, model: LeJEPAModel | None = None) -> Flops:
    """Count the operations of a configuration; `model`, on the meta device, saves building one."""
    model = model or build_model(cfg, meta=True)
    crops = cfg.crops
    large, small = (
        torch.empty(_IMAGES, cfg.data.channels, s, s, device="meta")
        for s in (crops.global_size, crops.local_size)
    )
    features, of_global = _counted(model.encoder, large)
    of_local = _counted(model.encoder, small)[1] if crops.local_crops else 0.0
    rows = torch.empty(crops.num_views * _IMAGES, features.shape[-1], device="meta", requires_grad=True)
    embeddings, of_projector = _counted(model.projector, rows)
    z = torch.empty(crops.num_views, _IMAGES, embeddings.shape[-1], device="meta", requires_grad=True)
    loss = LeJEPALoss(sigreg=SIGReg(num_slices=cfg.loss.num_slices, impl="torch", sync=False)).to("meta")
    _, of_loss = _counted(lambda z: loss(z[: crops.global_crops], z).total, z)
    views = crops.global_crops * of_global + crops.local_crops * of_local
    return Flops(of_global, of_local, of_projector, of_loss, views + of_projector + of_loss)


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 operations per second of a device; None if unknown, as for CPUs."""
    if device.type != "cuda":
        return None
    known = by_device_name(torch.cuda.get_device_name(device))
    return known.tflops * 1e12 if known else None


def _counted(call: Any, *inputs: Tensor) -> tuple[Tensor, float]:
    """Return the output and the operations per image, forward and backward."""
    counter = FlopCounterMode(display=False, custom_mapping=_OURS)
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = call(*inputs)
        output.float().sum().backward()
    return output, counter.get_total_flops() / _IMAGES


def _projections(x_shape: Any, A_shape: Any, *rest: Any, **options: Any) -> int:
    """x (V, N, K) times A (K, M)."""
    V, N, K = x_shape
    return 2 * V * N * K * A_shape[1]


def _convolution_backward(grad_shape: Any, x_shape: Any, w_shape: Any, *rest: Any, **options: Any) -> int:
    """Count grouped convolutions right: PyTorch's formula counts the weight gradient of a depthwise layer as
    that of a full one."""
    transposed, output_mask = rest[4], rest[7]
    pixels = math.prod((x_shape if transposed else grad_shape)[2:])
    forward = 2 * grad_shape[0] * pixels * math.prod(w_shape)
    return forward * sum(output_mask[:2])


_OURS = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.lejepa_fast.ecf_sums: _projections,
    torch.ops.lejepa_fast.ecf_sums_backward: lambda grad, x, A, *rest, **options: _projections(x, A),
}
