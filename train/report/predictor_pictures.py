"""What the predictor of a masked objective says of a target block, as pictures.

Features have no picture. Two stand for them: the patch of the training images whose target feature is nearest
(cosine of layer-normalized features), and the pixels that a ridge regression, fitted on the training images,
reads from the feature. Each is drawn of the prediction and of the true target feature, which shows how much
the pictures can tell at best.

A predictor has no variance of its own. How sure it is shows when several contexts around one block give
several predictions of it: where they differ, the block does not follow from what is seen.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lejepa_fast.data import eval_loader
from lejepa_fast.data.masks import MultiBlockMasks
from lejepa_fast.data.sources.base import ImageSource
from lejepa_fast.train.config import Config
from lejepa_fast.train.evaluation.embeddings import frozen
from lejepa_fast.train.evaluation.protocol import loading_options
from lejepa_fast.train.model.masked import MaskedModel, masked_batch
from lejepa_fast.train.report.overlays import DIMMED, dimmed, draw_page, heat_colors, to_pixels

KNOWN, SHOWN = 256, 6
"""Training images whose patches are searched, and images on a page."""
CONTEXTS, DRAWN = 8, 3
"""Contexts around a block, and how many of them are on a page."""
_CHUNK = 32  # images of a forward pass
_RIDGE = 1e-3  # of the mean variance of the features


class MaskedExamples(NamedTuple):
    """What the pages of masks and predictions are drawn from."""

    model: MaskedModel
    known: Tensor
    """Normalized training images, (n, C, S, S)."""
    images: Tensor
    """Normalized validation images, (B, C, S, S)."""
    targets: Tensor
    """Their target blocks, (B, M, h, w) bool."""
    around: Tensor
    """Contexts around the first target block of each image, (C, B, h, w) bool, its own first."""


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
    context, targets = model.masks(cfg.seed, 0, range(len(images)))
    around = contexts_around(model.masks, cfg.seed, context, targets[:, 0])
    return MaskedExamples(model, known, images, targets, around)


def contexts_around(masks: MultiBlockMasks, seed: int, context: Tensor, block: Tensor) -> Tensor:
    """`context`, and contexts of `CONTEXTS` - 1 further epochs without the patches of a block.

    Args:
        masks, seed: of the run.
        context: of each image, (B, h, w) bool.
        block: what all contexts leave out, (B, h, w) bool.

    Returns:
        (`CONTEXTS`, B, h, w) bool. An image of which nothing would stay has `context` again.
    """
    found = [context]
    for epoch in range(1, CONTEXTS):
        other = masks(seed, epoch, range(len(block)))[0] & ~block
        found.append(torch.where(other.flatten(1).any(1)[:, None, None], other, context))
    return torch.stack(found)


class Answers(NamedTuple):
    """What a model says of the first target block of each image: R patches, ordered by image and place."""

    said: Tensor
    """Predictions (C, R, K) from the contexts around the blocks."""
    truth: Tensor
    """Target features (R, K)."""
    block: Tensor
    """The R patches among all of the images, (B, P) bool."""
    features: Tensor
    """Target features of the patches of the training images, (n, K)."""
    patches: Tensor
    """Pixels of these patches, (n, Q)."""
    decode: Callable[[Tensor], Tensor]
    """Features (R, K) to pixels (R, Q)."""
    pixels: Tensor
    """The images, RGB (B, 3, S, S) in 0-1."""
    side: tuple[int, int]
    """Of a patch, (height, width) in pixels."""

    def filled(self, found: Tensor) -> Tensor:
        """The images, dark, with pixels (R, Q) or colors (R, 3) in the patches of the block: (B, 3, S, S)."""
        size, (height, width) = self.pixels.shape[-1], self.side
        pictures = DIMMED * _patches(self.pixels, self.side)
        pictures[self.block] = found.repeat_interleave(pictures.shape[-1] // found.shape[-1], dim=1)
        padded = size + -size % height, size + -size % width
        return F.fold(pictures.mT, padded, self.side, stride=self.side)[..., :size, :size]


def answers_of(examples: MaskedExamples, mean: tuple[float, ...], std: tuple[float, ...]) -> Answers:
    """Ask the model; `mean` and `std` are those by which the images are normalized."""
    model, known, images, targets, around = examples
    device = next(model.parameters()).device
    said, block = [], targets[:, 0].flatten(1)
    with frozen(model, device):
        on_device = images.to(device)
        for context in around:
            batch = masked_batch(context, targets[:, :1], model.encoder.num_prefix_tokens, device)
            out = model([on_device], batch)
            rows = torch.zeros_like(out.tokens, dtype=torch.float32).flatten(0, 1)
            rows[batch.wanted] = out.predictions.float()
            said.append(rows.view_as(out.tokens).cpu()[block])
        truth = out.tokens.float().cpu()[block]
        features = torch.cat([model.targets(part.to(device)).cpu() for part in known.split(_CHUNK)])
    features, side = features.float().flatten(0, 1), model.encoder.patch_embed.patch_size
    patches, pixels = _patches(to_pixels(known, mean, std), side).flatten(0, 1), to_pixels(images, mean, std)
    decode = _ridge(features, patches)
    return Answers(torch.stack(said), truth, block, features, patches, decode, pixels, side)


def predictor_pictures(examples: MaskedExamples, answers: Answers) -> dict[str, Tensor]:
    """Columns of a page, by name: RGB (B, 3, S, S) in 0-1, the first target block of each image filled in."""
    units = _unit(answers.features)
    columns = {"image": answers.pixels, "context": dimmed(answers.pixels, examples.around[0])}
    for name, values in (("predicted", answers.said[0]), ("target", answers.truth)):
        columns[f"{name}, nearest"] = answers.filled(answers.patches[(_unit(values) @ units.T).argmax(1)])
        columns[f"{name}, decoded"] = answers.filled(answers.decode(values))
    return columns | {"true block": dimmed(answers.pixels, examples.targets[:, 0])}


def uncertainty_pictures(
    examples: MaskedExamples, answers: Answers
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How predictions of a block from several contexts differ from each other, and from the truth.

    Returns:
        columns of a page, as of `predictor_pictures`, and two figures of each patch of the blocks, (R,):
        "spread" is the standard deviation of the predictions over the contexts, "error" the root mean square
        of their distances to the target. Unit: the standard deviation of target features over patches. Spread
        is 0 where all contexts give the same answer; error is 1 for the mean of all patches as the answer.
    """
    said, truth = answers.said, answers.truth
    columns: dict[str, Tensor] = {}
    for number, (context, values) in enumerate(zip(examples.around[:DRAWN], said, strict=False), 1):
        columns[f"context {number}"] = dimmed(answers.pixels, context)
        columns[f"answer {number}"] = answers.filled(answers.decode(values))
    unit = answers.features.var(0).mean().clamp_min(1e-12)
    figures = {
        "spread": (said.var(0).mean(-1) / unit).sqrt(),
        "error": ((said - truth).square().mean((0, -1)) / unit).sqrt(),
    }
    columns |= {name: answers.filled(heat_colors(values)) for name, values in figures.items()}
    return columns | {"true block": dimmed(answers.pixels, examples.targets[:, 0])}, figures


def draw_predictions(
    folder: Path, examples: MaskedExamples, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Write masks.png, predictor.png and uncertainty.png, a row for each image."""
    answers = answers_of(examples, mean, std)
    masks = {"context": examples.around[0]}
    masks |= {f"target {i + 1}": target for i, target in enumerate(examples.targets.unbind(1))}
    pictures = {name: dimmed(answers.pixels, mask) for name, mask in masks.items()}
    draw_page(folder / "masks.png", {"image": answers.pixels, **pictures})
    draw_page(folder / "predictor.png", predictor_pictures(examples, answers))
    columns, figures = uncertainty_pictures(examples, answers)
    counts = answers.block.sum(1).tolist()
    of_image = ([v.square().mean().sqrt() for v in figures[name].split(counts)] for name in figures)
    labels = [f"spread {spread:.2f}, error {error:.2f}" for spread, error in zip(*of_image, strict=True)]
    draw_page(folder / "uncertainty.png", columns, labels)


def _patches(pixels: Tensor, side: tuple[int, int]) -> Tensor:
    """RGB (B, 3, S, S) -> patches of `side` (height, width) in row-major order, (B, P, Q); padded."""
    size = pixels.shape[-1]
    return F.unfold(F.pad(pixels, (0, -size % side[1], 0, -size % side[0])), side, stride=side).mT


def _unit(features: Tensor) -> Tensor:
    return F.normalize(F.layer_norm(features, features.shape[-1:]), dim=-1)


def _ridge(features: Tensor, pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression from features (n, K) to pixels (n, Q) in 0-1."""
    center, offset = features.mean(0), pixels.mean(0)
    x = (features - center).double()
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(gram, x.T @ (pixels - offset).double()).float()
    return lambda values: ((values - center) @ weight + offset).clamp(0, 1)
