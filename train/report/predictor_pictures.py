"""What the predictor of a masked objective says of a target block, as pictures.

Features have no picture. Two stand for them: the patch of the training images whose target feature is nearest
(cosine of layer-normalized features), and the pixels that a ridge regression, fitted on the training images,
reads from the feature. Each is drawn of the prediction and of the true target feature, which shows how much
the pictures can tell at best.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lejepa_fast.data import eval_loader
from lejepa_fast.data.sources.base import ImageSource
from lejepa_fast.train.config import Config
from lejepa_fast.train.evaluation.embeddings import frozen
from lejepa_fast.train.evaluation.protocol import loading_options
from lejepa_fast.train.model.masked import MaskedModel, masked_batch
from lejepa_fast.train.report.mask_overlays import DIMMED, mask_pictures
from lejepa_fast.train.report.overlays import draw_page, to_pixels

KNOWN, SHOWN = 256, 6
"""Training images whose patches are searched, and images on a page."""
_CHUNK = 32  # images of a forward pass
_RIDGE = 1e-3  # of the mean variance of the features


class MaskedExamples(NamedTuple):
    """What the pages of masks and predictions are drawn from."""

    model: MaskedModel
    known: Tensor
    """Normalized training images, (n, C, S, S)."""
    images: Tensor
    """Normalized validation images, (B, C, S, S)."""
    context: Tensor
    """Their masks, (B, h, w) bool."""
    targets: Tensor
    """(B, M, h, w) bool."""


def masked_examples(model: MaskedModel, cfg: Config, train: ImageSource, val: ImageSource) -> MaskedExamples:
    """Random images of both sources, the same for a seed, and masks of epoch 0."""
    options = {
        **loading_options(cfg.data, torch.device("cpu"), None),
        "image_size": cfg.crops.global_size,
        "batch_size": _CHUNK,
        "mean": cfg.crops.mean,
        "std": cfg.crops.std,
        "max_bad_fraction": 1.0,
    }

    def some(source: ImageSource, count: int) -> Tensor:
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(cfg.seed))[:count]
        return torch.cat([images.cpu() for images, _ in eval_loader(source.subset(order.numpy()), **options)])

    known, images = some(train, KNOWN), some(val, SHOWN)
    return MaskedExamples(model, known, images, *model.masks(cfg.seed, 0, range(len(images))))


def predictor_pictures(
    examples: MaskedExamples, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Tensor]:
    """Columns of a page, by name: RGB (B, 3, S, S) in 0-1, the first target block of each image filled in.

    Args:
        examples: model and images.
        mean, std: by which the images are normalized.
    """
    model, known, images, context, targets = examples
    device = next(model.parameters()).device
    batch = masked_batch(context, targets[:, :1], model.encoder.num_prefix_tokens, device)
    with frozen(model, device):
        out = model([images.to(device)], batch)
        features = torch.cat([model.targets(part.to(device)).cpu() for part in known.split(_CHUNK)])
    dictionary, side = features.float().flatten(0, 1), model.encoder.patch_embed.patch_size
    patches = _patches(to_pixels(known, mean, std), side).flatten(0, 1)
    units, decode, pixels = _unit(dictionary), _Decoder(dictionary, patches), to_pixels(images, mean, std)
    columns = mask_pictures(pixels, context, targets[:, :0])
    block = targets[:, 0].flatten(1)  # its patches in the order of `predicted` and `wanted`
    for name, rows in (("predicted", out.predictions), ("target", out.wanted)):
        values = rows.float().cpu()
        nearest = patches[(_unit(values) @ units.T).argmax(1)]
        for how, found in (("nearest", nearest), ("decoded", decode(values))):
            filled = DIMMED * _patches(pixels, side)
            filled[block] = found
            columns[f"{name}, {how}"] = _image(filled, pixels.shape[-1], side)
    columns["true block"] = mask_pictures(pixels, targets[:, 0], targets[:, :0])["context"]
    return columns


def draw_predictions(
    path: Path, examples: MaskedExamples, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Write a PNG of `predictor_pictures`, a row for each image."""
    draw_page(path, predictor_pictures(examples, mean, std), [""] * len(examples.images))


def _patches(pixels: Tensor, side: tuple[int, int]) -> Tensor:
    """RGB (B, 3, S, S) -> patches of `side` (height, width) in row-major order, (B, P, Q); padded."""
    size = pixels.shape[-1]
    return F.unfold(F.pad(pixels, (0, -size % side[1], 0, -size % side[0])), side, stride=side).mT


def _image(patches: Tensor, size: int, side: tuple[int, int]) -> Tensor:
    """The inverse of `_patches`."""
    padded = size + -size % side[0], size + -size % side[1]
    return F.fold(patches.mT, padded, side, stride=side)[..., :size, :size]


def _unit(features: Tensor) -> Tensor:
    return F.normalize(F.layer_norm(features, features.shape[-1:]), dim=-1)


class _Decoder:
    """Ridge regression from features (n, K) to pixels (n, Q) in 0-1."""

    def __init__(self, features: Tensor, pixels: Tensor):
        self._from, self._to = features.mean(0), pixels.mean(0)
        x = (features - self._from).double()
        gram = x.T @ x
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp_min(1e-12))
        self._weight = torch.linalg.solve(gram, x.T @ (pixels - self._to).double()).float()

    def __call__(self, features: Tensor) -> Tensor:
        return ((features - self._from) @ self._weight + self._to).clamp(0, 1)
