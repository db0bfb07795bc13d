"""How many floating-point operations a training step needs, counted once on the real crops.

PyTorch's flop counter runs over the encoder, the projector and the loss on the meta device: shapes
only, no arithmetic and no memory. Counted are matrix products and convolutions, two operations per
multiply-add, forward and backward. Not counted are the second forward of activation checkpointing and
the products that fused attention and SIGReg's backward compute again: these are work of an
implementation and not of the model, so "model flops utilisation" does not rise with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lejepa_fast import LeJEPALoss, SIGReg
from lejepa_fast.train.config import Config
from lejepa_fast.train.model.model import LeJEPAModel, build_model
from lejepa_fast.train.runtime.gpu_specs import by_device_name

# Images counted on; BatchNorm refuses one. Everything counted is proportional to their number.
_IMAGES = 2


@dataclass(frozen=True)
class Flops:
    """Operations of one image, forward and backward.

    `global_view` and `local_view` are one view through the encoder; `projector` and `loss` take all the
    views of the image. `convolutions` are those of all the views that are made by convolutions.
    """

    global_view: float
    local_view: float
    projector: float
    loss: float
    global_crops: int
    local_crops: int
    convolutions: float

    @property
    def per_image(self) -> float:
        """One image with all its views."""
        views = self.global_crops * self.global_view + self.local_crops * self.local_view
        return views + self.projector + self.loss


def count_flops(cfg: Config, model: LeJEPAModel | None = None) -> Flops:
    """Count the step of a configuration; `model` saves building one, and has to be on the meta device.

    Raises UsageError as `build_model` does.
    """
    if model is None:
        model = build_model(cfg, meta=True)
    crops = cfg.crops
    features, of_global, convolutions = _encoder(model.encoder, crops.global_size)
    convolutions *= crops.global_crops
    of_local = 0.0
    if crops.local_crops:
        _, of_local, more = _encoder(model.encoder, crops.local_size)
        convolutions += crops.local_crops * more
    views = crops.global_crops + crops.local_crops
    rows = torch.empty(views * _IMAGES, features, device="meta", requires_grad=True)
    embeddings, of_projector, _ = _counted(model.projector, rows)
    z = torch.empty(views, _IMAGES, embeddings.shape[-1], device="meta", requires_grad=True)
    loss = LeJEPALoss(sigreg=SIGReg(num_slices=cfg.loss.num_slices, impl="torch", sync=False)).to("meta")
    _, of_loss, _ = _counted(lambda z: loss(z[: crops.global_crops], z).total, z)
    return Flops(
        of_global, of_local, of_projector, of_loss, crops.global_crops, crops.local_crops, convolutions
    )


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations a second of a device; None where it is not known (CPUs among them)."""
    if device.type != "cuda":
        return None
    known = by_device_name(torch.cuda.get_device_name(device))
    return known.tflops * 1e12 if known else None


def _encoder(encoder: nn.Module, size: int) -> tuple[int, float, float]:
    """Width of the features, and operations for one view of this size: all, and those of convolutions."""
    features, flops, convolutions = _counted(encoder, torch.empty(_IMAGES, 3, size, size, device="meta"))
    return features.shape[-1], flops, convolutions


def _counted(call: Any, *inputs: Tensor) -> tuple[Tensor, float, float]:
    """The output, and the operations per image of forward and backward: all, and those of convolutions."""
    counter = FlopCounterMode(display=False, custom_mapping=_OURS)
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = call(*inputs)
        output.float().sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    convolutions = sum(flops for operator, flops in by_operator.items() if "convolution" in str(operator))
    return output, counter.get_total_flops() / _IMAGES, convolutions / _IMAGES


def _projections(x_shape: Any, A_shape: Any, *rest: Any, **options: Any) -> int:
    """x (V, N, K) times A (K, M)."""
    V, N, K = x_shape
    return 2 * V * N * K * A_shape[1]


def _projections_backward(grad_shape: Any, x_shape: Any, A_shape: Any, *rest: Any, **options: Any) -> int:
    return _projections(x_shape, A_shape)


def _convolution_backward(grad_shape: Any, x_shape: Any, w_shape: Any, *rest: Any, **options: Any) -> int:
    """PyTorch's own formula forgets that a grouped convolution's weight gradient is grouped too: it counts
    a depthwise layer as a full one."""
    transposed, output_mask = rest[4], rest[7]
    pixels = math.prod((x_shape if transposed else grad_shape)[2:])
    forward = 2 * grad_shape[0] * pixels * math.prod(w_shape)
    return forward * sum(output_mask[:2])


_OURS = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.lejepa_fast.ecf_sums: _projections,
    torch.ops.lejepa_fast.ecf_sums_backward: _projections_backward,
}
