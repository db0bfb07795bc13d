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
from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.train.config import Config
from lejepa_fast.train.model.masked import MaskedModel
from lejepa_fast.train.model.model import TrainedModule, build_model
from lejepa_fast.train.model.objective import MaskedLoss
from lejepa_fast.train.runtime.gpu_specs import by_device_name

_IMAGES = 2  # to count on; BatchNorm refuses one. All operations are proportional to their number.
_MASKED_IMAGES = 16  # whose masks leave different numbers of patches


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
    center: float = 0.0
    """The views of the center through the averaged model, forward; also counted before the average begins."""

    def summary(self, crops: MultiCropRecipe) -> str:
        """The parts, in 10^9 operations."""
        center = f", center {self.center / 1e9:,.1f}" if self.center else ""
        return (
            f"global {crops.global_size} px {crops.global_crops} x {self.global_view / 1e9:,.1f}, "
            f"local {crops.local_size} px {crops.local_crops} x {self.local_view / 1e9:,.1f}, "
            f"projector {self.projector / 1e9:,.1f}{center}, loss {self.loss / 1e9:,.2f}"
        )


@dataclass(frozen=True)
class MaskedFlops:
    """Operations of one image of masked prediction, the mean over a few masks."""

    context: float
    """Context patches through the encoder, forward and backward, as `predictor`."""
    target: float
    """The whole image through the target encoder, forward; without one, through encoder and projector,
    forward and backward."""
    predictor: float
    loss: float
    per_image: float
    """The whole step."""

    def summary(self, crops: MultiCropRecipe) -> str:
        """The parts, in 10^9 operations."""
        return (
            f"context at {crops.global_size} px {self.context / 1e9:,.1f}, targets {self.target / 1e9:,.1f}, "
            f"predictor {self.predictor / 1e9:,.1f}, loss {self.loss / 1e9:,.2f}"
        )


def count_flops(cfg: Config, model: TrainedModule | None = None) -> Flops | MaskedFlops:
    """Count the operations of a configuration; `model`, on the meta device, saves building one."""
    model = model or build_model(cfg, meta=True)
    if isinstance(model, MaskedModel):
        return _count_masked(cfg, model)
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
    of_center = 0.0
    if cfg.loss.center_from == "average":
        images = [large] * crops.global_crops
        if cfg.loss.center == "all":
            images += [small] * crops.local_crops
        with torch.no_grad():
            _, of_center = _counted(lambda *views: model(views)[1], *images)
    whole = views + of_projector + of_center + of_loss
    return Flops(of_global, of_local, of_projector, of_loss, whole, of_center)


def _count_masked(cfg: Config, model: MaskedModel) -> MaskedFlops:
    size, images = cfg.crops.global_size, _MASKED_IMAGES
    view = torch.empty(images, cfg.data.channels, size, size, device="meta")
    batch = model.batch(cfg.seed, 0, range(images), view.device)
    outputs, step = _counted(lambda view: model([view], batch), view, images=images)
    rows, width = len(batch.places), model.encoder.num_features
    context = torch.empty(rows, width, device="meta", requires_grad=True)
    _, predictor = _counted(lambda x: model.predictor(x, batch, model.packed), context, images=images)
    with torch.set_grad_enabled(model.target is None):
        _, target = _counted(model.targets, view, images=images)
    loss = 0.0
    if model.target is None:
        z = torch.empty(outputs.tokens.shape, device="meta", requires_grad=True)
        regularizer = SIGReg(num_slices=cfg.loss.num_slices, impl="torch", sync=False).to("meta")
        loss_fn = MaskedLoss("l2", regularizer, cfg.loss.sigreg_over)
        pair = torch.empty(outputs.wanted.shape, device="meta")
        _, loss = _counted(lambda z: loss_fn(z, pair, pair).total, z, images=images)
    return MaskedFlops(step - predictor - target, target, predictor, loss, step + loss)


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
