"""Embedding a data set with a frozen model, without leaving a trace in the model or the random state."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lejepa_fast.errors import RunError, UsageError


class Embeddings(NamedTuple):
    """A data set seen through a model; all on the CPU, rows in the order of the source.

    Attributes:
        features: pooled output of the encoder, (n, D) float32; what kNN compares.
        probe: input of the linear probe, (n, D') float32. For vision transformers the CLS tokens of the
            last two blocks side by side (the mean of the patch tokens where there is no CLS), D' = 2 D;
            for all other encoders the very same tensor as `features`.
        z: output of the projector, (n, K) float32; what the loss acts on.
        targets: classes (n,) int64, negative where the label is unknown.
    """

    features: Tensor
    probe: Tensor
    z: Tensor
    targets: Tensor


@contextmanager
def frozen(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients or autocast; modes and random states return as they were.

    The mode of every module is kept on its own, because a caller may have put parts of a training model
    into evaluation mode. The random state is kept because a DataLoader draws a seed from it on every pass.
    """
    modes = {module: module.training for module in model.modules()}
    cuda = [device] if device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(devices=cuda), torch.no_grad(), torch.autocast(device.type, enabled=False):
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
) -> Embeddings:
    """Embed all images of `loader` with `model` in evaluation mode.

    Args:
        model: a `LeJEPAModel` on `device`, or any module with the attributes `encoder` and `projector`
            and the method `embed(images) -> (features (B, D), z (B, K))`.
        loader: yields images (B, 3, S, S) and targets (B,), as `lejepa_fast.data.eval_loader` does.
        device: where the images go.
        amp_dtype: autocast dtype of the forward pass; None computes in the dtype of the weights.

    Raises:
        UsageError: the loader yields nothing.
        RunError: an embedding is NaN or infinite.
    """
    device = torch.device(device)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with frozen(model, device):
        for images, targets in loader:
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                features, probe, z = _forward(model, images.to(device, non_blocking=True))
            # One copy where the probe takes the pooled features themselves.
            on_cpu = features.float().cpu()
            parts.append(
                (on_cpu, on_cpu if probe is features else probe.float().cpu(), z.float().cpu(), targets)
            )
    if not parts:
        raise UsageError(
            "there is no image to embed: the data source is empty; choose another split or folder"
        )
    features = torch.cat([part[0] for part in parts])
    shared = all(part[0] is part[1] for part in parts)
    probe = features if shared else torch.cat([part[1] for part in parts])
    z, targets = torch.cat([part[2] for part in parts]), torch.cat([part[3] for part in parts])
    for name, values in (("encoder", features), ("projector", z)):
        if not bool(torch.isfinite(values).all()):
            raise RunError(f"the {name} gives NaN or infinite embeddings: the training has diverged")
    return Embeddings(features, probe, z, targets.to(torch.int64).cpu())


def _forward(model: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, D), linear-probe features (B, D') and embeddings (B, K)."""
    encoder = model.encoder
    if not _has_token_blocks(encoder):
        features, z = model.embed(images)
        return features, features, z
    final, blocks = encoder.forward_intermediates(
        images, indices=min(2, len(encoder.blocks)), norm=True, output_fmt="NLC", return_prefix_tokens=True
    )
    features = encoder.forward_head(final)
    return (
        features,
        torch.cat([_summary(encoder, block) for block in blocks], dim=1),
        model.projector(features),
    )


def _has_token_blocks(encoder: nn.Module) -> bool:
    """True for timm's plain vision transformers, which can return the tokens of any of their blocks."""
    method = getattr(encoder, "forward_intermediates", None)
    return (
        method is not None
        and hasattr(encoder, "blocks")
        and "return_prefix_tokens" in inspect.signature(method).parameters
    )


def _summary(encoder: nn.Module, block: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """One vector (B, D) for the tokens of a block: CLS, or the mean of the patches where there is none."""
    patches, prefix = block if isinstance(block, tuple) else (block, None)
    if prefix is not None and getattr(encoder, "cls_token", None) is not None:
        return prefix[:, 0]
    return patches.mean(dim=1)


def calibrate_batchnorm(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
) -> int:
    """Set the running statistics of all BatchNorm layers from training images; return the images used.

    A network fresh from its initialisation has running mean 0 and variance 1, which are not the
    statistics of its activations. Scored like that, the untrained encoder would look weaker than random
    features are, and training better than it is. Afterwards the statistics are plain averages over the
    batches that were used; a last batch smaller than the first would count too much and is left out.
    Only BatchNorm runs in training mode, so no dropout acts; parameters, modes and random states stay
    as they were.

    Args:
        model: an encoder, or a whole model: with an attribute `embed` that is called, else the model itself.
        loader: yields (images (B, 3, S, S), anything).
        device: where the images go and the model lies.

    Raises:
        UsageError: there are BatchNorm layers but no batch of two images or more.
    """
    device = torch.device(device)
    norms = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    forward = getattr(model, "embed", model)
    momenta = [norm.momentum for norm in norms]
    used = first = 0
    with frozen(model, device):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average instead of an exponential one
            norm.training = True
        try:
            for images, *_ in loader:
                if len(images) >= max(2, first):
                    forward(images.to(device, non_blocking=True))
                    first = first or len(images)
                    used += len(images)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if used == 0:
        raise UsageError(
            "BatchNorm statistics need a batch of at least 2 training images; got none: "
            "raise the evaluation batch size or give more images"
        )
    return used
