"""Embed a data set with a frozen model. Model and random states stay as they were."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lejepa_fast.errors import RunError, UsageError


class Embeddings(NamedTuple):
    """A data set seen through a model. All tensors are on the CPU, rows in the order of the source."""

    features: Tensor
    """Pooled encoder output, (n, D) float32: the input of kNN."""
    probe: Tensor
    """Input of the linear probe, (n, D') float32. Vision transformers: the CLS tokens of the last blocks side
    by side (the mean of the patch tokens if there is no CLS), D' = 2 D for two. Others: `features` itself."""
    z: Tensor
    """Projector output, (n, K) float32: the input of the loss."""
    targets: Tensor
    """Classes (n,) int64, negative where the label is unknown."""


@contextmanager
def frozen(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients and autocast; afterwards modes and random states are as before."""
    modes = {module: module.training for module in model.modules()}
    # A DataLoader draws a seed from the random state on every pass.
    rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    try:
        model.eval()
        with rng, torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def embed_source(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
    *,
    amp_dtype: torch.dtype | None = None,
    linear_blocks: int = 2,
) -> Embeddings:
    """Embed all images of `loader` with `model` in evaluation mode.

    Args:
        model: a `LeJEPAModel` on `device`, or any module with attributes `encoder` and `projector` and a
            method `embed(images) -> (features (B, D), z (B, K))`.
        loader: yields images (B, 3, S, S) and targets (B,), as `lejepa_fast.data.eval_loader` does.
        device: where the images go.
        amp_dtype: autocast dtype of the forward pass; None: the dtype of the weights.
        linear_blocks: how many of the last blocks of a vision transformer the linear probe sees.

    Raises:
        UsageError: the loader yields nothing.
        RunError: an embedding is NaN or infinite.
    """
    device = torch.device(device)
    batches: list[tuple[Tensor, ...]] = []
    with frozen(model, device):
        for images, targets in loader:
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                features, z, *probe = _forward(model, images.to(device, non_blocking=True), linear_blocks)
            batches.append((targets.cpu().long(), *(x.float().cpu() for x in (features, z, *probe))))
    if not batches:
        raise UsageError(
            "there is no image to embed: the data source is empty; choose another split or folder"
        )
    targets, features, z, *probe = map(torch.cat, zip(*batches, strict=True))
    for name, values in (("encoder", features), ("projector", z)):
        if not values.isfinite().all():
            reason = "the training has diverged, or the weights are damaged"
            raise RunError(f"the {name} gives NaN or infinite embeddings: {reason}")
    return Embeddings(features, probe[0] if probe else features, z, targets)


def _forward(model: Any, images: Tensor, linear_blocks: int) -> tuple[Tensor, ...]:
    """Features (B, D), embeddings (B, K) and, of a vision transformer, input of the linear probe (B, D')."""
    encoder = model.encoder
    method = getattr(encoder, "forward_intermediates", model.embed)
    # Only timm's plain vision transformers return the tokens of any block.
    if not hasattr(encoder, "blocks") or "return_prefix_tokens" not in inspect.signature(method).parameters:
        return model.embed(images)
    final, blocks = encoder.forward_intermediates(
        images,
        indices=min(linear_blocks, len(encoder.blocks)),
        norm=True,
        output_fmt="NLC",
        return_prefix_tokens=True,
    )
    features = encoder.forward_head(final)
    has_cls = getattr(encoder, "cls_token", None) is not None
    pairs = [block if isinstance(block, tuple) else (block, None) for block in blocks]
    probe = [prefix[:, 0] if has_cls else patches.mean(dim=1) for patches, prefix in pairs]
    z = model.project(features, final[:, encoder.num_prefix_tokens :])
    return features, z, torch.cat(probe, dim=1)


def calibrate_batchnorm(
    model: Any, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device | str
) -> None:
    """Set the running statistics of all BatchNorm layers from images.

    At initialization they are mean 0 and variance 1, not those of the activations, which would make the
    untrained encoder look weaker than it is. Afterwards they are averages over the batches; a batch smaller
    than the first is skipped. Only BatchNorm runs in training mode. Parameters, modes and random states stay
    as they were. UsageError if there are BatchNorm layers, but no batch of two images or more.
    """
    device = torch.device(device)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    first = 0  # the size of the first batch
    with frozen(model, device):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average instead of an exponential one
            norm.training = True
        for images, *_ in loader:
            if len(images) >= max(2, first):
                model.embed(images.to(device, non_blocking=True))
                first = first or len(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    if not first:
        raise UsageError(
            "BatchNorm statistics need a batch of at least 2 training images, got none: "
            "raise the evaluation batch size or give more images"
        )
