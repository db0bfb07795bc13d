"""Floating-point operations of a training step, counted on the meta device.

PyTorch's flop counter runs over encoder, projector and loss: shapes only, no arithmetic and no memory. It
counts matrix products and convolutions, forward and backward, as two operations per multiply-add. What an
implementation repeats (activation checkpointing, the backward pass of fused attention and of SIGReg) does not
count, so it does not raise the "model flops utilization".
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lejepa_fast import LeJEPALoss, SIGReg
from lejepa_fast.train.config import Config
from lejepa_fast.train.model.masked import MaskedModel
from lejepa_fast.train.model.model import TrainedModule, build_model
from lejepa_fast.train.model.objective import MaskedLoss
from lejepa_fast.train.runtime.gpu_specs import by_device_name

_IMAGES = 2  # to count on; BatchNorm refuses one. All operations are proportional to their number.
_MASKED_IMAGES = 16  # whose masks leave different numbers of patches


class Flops(NamedTuple):
    """Operations of one image in a step."""

    per_image: float
    parts: dict[str, float]
    """Those of one view, and of what all views of the image go through. Forward and backward; a center from
    averaged weights, also before the average begins, and targets of a teacher: forward."""
    times: dict[str, int]
    """How often a part is there, if not once."""

    def summary(self) -> str:
        """The parts, in 10^9 operations."""
        return ", ".join(
            f"{self.times.get(name, 1)} x {name} {count / 1e9:,.2f}".removeprefix("1 x ")
            for name, count in self.parts.items()
        )


def count_flops(cfg: Config, model: TrainedModule | None = None) -> Flops:
    """Count the operations of a configuration; `model`, on the meta device, saves building one."""
    model = model or build_model(cfg, meta=True)
    if isinstance(model, MaskedModel):
        return _count_masked(cfg, model)
    crops = cfg.crops
    large, small = (
        torch.empty(_IMAGES, cfg.data.channels, s, s, device="meta")
        for s in (crops.global_size, crops.local_size)
    )
    parts: dict[str, float] = {}
    features, parts["global view"] = _counted(model.encoder, large)
    if crops.local_crops:
        _, parts["local view"] = _counted(model.encoder, small)
    rows = torch.empty(crops.num_views * _IMAGES, features.shape[-1], device="meta", requires_grad=True)
    embeddings, parts["projector"] = _counted(model.projector, rows)
    if cfg.loss.center_from == "average":
        local_crops = crops.local_crops if cfg.loss.center == "all" else 0
        with torch.no_grad():
            images = [large] * crops.global_crops + [small] * local_crops
            _, parts["center"] = _counted(lambda *views: model(views)[1], *images)
    z = torch.empty(crops.num_views, _IMAGES, embeddings.shape[-1], device="meta", requires_grad=True)
    loss = LeJEPALoss(sigreg=SIGReg(num_slices=cfg.loss.num_slices, impl="torch", sync=False)).to("meta")
    _, parts["loss"] = _counted(lambda z: loss(z[: crops.global_crops], z).total, z)
    times = {"global view": crops.global_crops, "local view": crops.local_crops}
    return Flops(sum(times.get(name, 1) * count for name, count in parts.items()), parts, times)


def _count_masked(cfg: Config, model: MaskedModel) -> Flops:
    size, images = cfg.crops.global_size, _MASKED_IMAGES
    view = torch.empty(images, cfg.data.channels, size, size, device="meta")
    batch = model.batch(cfg.seed, 0, range(images), view.device)
    outputs, step = _counted(lambda view: model([view], batch), view, images=images)
    rows, width = len(batch.places), model.encoder.num_features
    context = torch.empty(rows, width, device="meta", requires_grad=True)
    _, predictor = _counted(lambda x: model.predictor(x, batch, model.packed), context, images=images)
    with torch.set_grad_enabled(model.target is None):
        _, target = _counted(model.targets, view, images=images)
    parts = {"context": step - predictor - target, "targets": target, "predictor": predictor}
    if model.target is None:
        z = torch.empty(outputs.tokens.shape, device="meta", requires_grad=True)
        regularizer = SIGReg(num_slices=cfg.loss.num_slices, impl="torch", sync=False).to("meta")
        loss_fn = MaskedLoss("l2", regularizer, cfg.loss.sigreg_over)
        pair = torch.empty(outputs.wanted.shape, device="meta")
        _, parts["loss"] = _counted(lambda z: loss_fn(z, pair, pair).total, z, images=images)
    return Flops(sum(parts.values()), parts, {})


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 operations per second of a device; None if unknown, as for CPUs."""
    if device.type != "cuda":
        return None
    known = by_device_name(torch.cuda.get_device_name(device))
    return known.tflops * 1e12 if known else None


def _counted(call: Any, *inputs: Tensor, images: int = _IMAGES) -> tuple[Any, float]:
    """Return the output and the operations per image, forward and, if there is a gradient, backward."""
    counter = FlopCounterMode(display=False, custom_mapping=_OURS)
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = call(*inputs)
        found = output if isinstance(output, tuple) else (output,)
        if torch.is_grad_enabled():
            torch.stack([each.float().sum() for each in found]).sum().backward()
    return output, counter.get_total_flops() / images


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
