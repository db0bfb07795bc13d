"""Segmentation without labels: what the last layer of an encoder tells apart, patch by patch.

Two maps of each image, scored against masks where there are any:

- attention of the last block, in vision transformers: how much each head's CLS token draws from each patch.
  Without CLS there is no such query; there, the mean over the queries of all patches is taken.
- principal components of the patch features, of all encoders: of the last layer, after its norm.

Sources: Caron et al., "Emerging properties in self-supervised vision transformers", arXiv 2104.14294
(threshold on the share of attention); Oquab et al., "DINOv2", arXiv 2304.07193 (components as colors);
LeJEPA, arXiv 2511.08544.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lejepa_fast.data import ImageSource
from lejepa_fast.errors import UsageError, first_line
from lejepa_fast.train.evaluation.embeddings import frozen

SHARES = tuple(i / 100 for i in range(1, 100))
"""Shares of the pixels, or of the attention, that are tried as foreground."""


class PatchMaps(NamedTuple):
    """Features and attention of B images on a grid of h x w patches."""

    features: Tensor
    """Of the last layer, (B, D, h, w) float32."""
    attention: Tensor | None
    """Shares of attention of each head, (B, heads, h, w) float32; the sum over the patches is 1. None: the
    encoder has no attention over the patches of an image, or computes it in another way."""


class _LastAttention(TorchFunctionMode):
    """Records the inputs of the last call of scaled dot-product attention.

    There q and k are what the block really compares, after its norms and rotary positions, and the mask holds
    relative positions. So this fits every model that calls this function, as timm's do if `fused_attn` is
    set.
    """

    inputs: tuple[Tensor, Tensor, Tensor | None, float] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            scale = given.get("scale") or given["query"].shape[-1] ** -0.5
            self.inputs = given["query"], given["key"], given.get("attn_mask"), scale
        return func(*args, **kwargs)


@torch.no_grad()
def patch_maps(encoder: nn.Module, images: Tensor) -> PatchMaps:
    """Features and attention of the last layer.

    Args:
        encoder: any timm model with `forward_intermediates`, in evaluation mode.
        images: (B, C, S, S), normalized, on its device.

    Raises:
        UsageError: the encoder has no map of features.
    """
    model: Any = encoder
    fused = {part: part.fused_attn for part in model.modules() if hasattr(part, "fused_attn")}
    recorder = _LastAttention()
    try:
        for part in fused:
            part.fused_attn = True
        with recorder:
            features = _last_features(model, images)
    finally:
        for part, value in fused.items():
            part.fused_attn = value
    return PatchMaps(features.float(), _attention(model, recorder.inputs, features))


def _last_features(model: Any, images: Tensor) -> Tensor:
    # To the end of the model, for CaiT and XCiT bring CLS in after the last block of patches.
    options = {"indices": 1, "output_fmt": "NCHW", "intermediates_only": False}
    try:
        try:
            _, maps = model.forward_intermediates(images, norm=True, **options)
        except AssertionError:  # some models have no norm for it
            _, maps = model.forward_intermediates(images, **options)
    except Exception as error:  # of timm's, or an attribute that is not there
        raise UsageError(
            f"model: {type(model).__name__} gives no map of features for {images.shape[-1]} px "
            f"({first_line(error)}); expected a timm model with forward_intermediates and a size it takes"
        ) from error
    return maps[-1]


def _attention(
    model: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float] | None, features: Tensor
) -> Tensor | None:
    """(B, heads, h, w), or None if the last attention was not over the patches of each image."""
    if inputs is None:
        return None
    q, k, mask, scale = inputs[0].float(), inputs[1].float(), inputs[2], inputs[3]
    B, _, h, w = features.shape
    prefix = k.shape[-2] - h * w  # CLS and registers
    if (
        q.shape[:2] != k.shape[:2]
        or q.shape[2:-1] not in (k.shape[2:-1], (1,))
        or q.ndim != 4
        or len(q) != B
        or prefix != getattr(model, "num_prefix_tokens", prefix)
        or prefix < 0
    ):
        return None  # over windows of the image, over channels, or between other tokens
    # VOLO has a CLS token, but not in the block recorded here; in CaiT and XCiT, CLS is the only query.
    has_cls = prefix > 0 and getattr(model, "cls_token", None) is not None
    queries = slice(0, 1) if has_cls or q.shape[-2] == 1 else slice(prefix, None)
    scores = scale * q[..., queries, :] @ k.mT
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2])[..., queries, :]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    shares = scores.softmax(-1)[..., prefix:].mean(-2)
    return (shares / shares.sum(-1, keepdim=True)).unflatten(-1, (h, w))


# ---- maps of a set of images ---------------------------------------------------------------------------


class SetMaps(NamedTuple):
    """Maps of n images, on the CPU."""

    components: Tensor
    """First three principal components of the patch features, (n, 3, h, w) float32. Components of all images
    together are on one scale. The sign of each: the border of the images is negative on average."""
    attention: Tensor | None
    """As in `PatchMaps`, (n, heads, h, w)."""

    def part(self, which: slice | Tensor) -> "SetMaps":
        """The maps of some of the images."""
        return SetMaps(self.components[which], None if self.attention is None else self.attention[which])


def set_maps(
    encoder: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
    *,
    per_image: bool = False,
) -> SetMaps:
    """Maps of all images of a loader.

    The features are not kept: for joint components the images go through the encoder twice.

    Args:
        encoder: as of `patch_maps`, on `device`; its mode stays as it is.
        loader: yields (images (B, C, S, S), targets), the same ones in each pass.
        device: of the encoder.
        per_image: principal components of each image alone, and not of all together.

    Raises:
        UsageError: as of `patch_maps`.
        RunError: the loader cannot read an image.
    """
    components, attention = [], []
    device = torch.device(device)
    with frozen(encoder, device):
        batches = (patch_maps(encoder, images.to(device)) for images, _ in loader)
        axes = None if per_image else _principal_axes(maps.features for maps in batches)
        if not per_image:
            batches = (patch_maps(encoder, images.to(device)) for images, _ in loader)
        for maps in batches:
            for features in maps.features:
                mean, directions = axes or _principal_axes([features[None]])
                values = features.double().flatten(1).T.sub(mean) @ directions
                components.append(values.T.unflatten(1, features.shape[1:]).float().cpu())
            if maps.attention is not None:
                attention.append(maps.attention.cpu())
    stacked = torch.stack(components)
    signs = stacked if per_image else stacked.transpose(0, 1)[None]
    edges = [signs[..., 0, :], signs[..., -1, :], signs[..., :, 0], signs[..., :, -1]]
    edge = torch.cat(edges, dim=-1).flatten(2).mean(-1)  # (n or 1, 3)
    stacked = torch.where(edge > 0, -1.0, 1.0)[..., None, None] * stacked
    return SetMaps(stacked, torch.cat(attention) if attention else None)


def _principal_axes(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and three principal axes (D, 3) in float64 of features (B, D, h, w)."""
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for features in batches:
        rows = features.double().transpose(0, 1).flatten(1).T
        count, total, square = count + len(rows), total + rows.sum(0), square + rows.T @ rows
    mean = total / count
    vectors = torch.linalg.eigh(square / count - mean.outer(mean)).eigenvectors
    return mean, F.pad(vectors, (3, 0))[:, -3:].flip(1)  # fewer than three features: zeros


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Maps (n, C, h, w) at size x size pixels, bilinear."""
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)


def attention_rank(attention: Tensor) -> Tensor:
    """Share of the attention that lies on less attended pixels: 1 where it is strongest.

    The pixels above 1 - p are the fewest that hold the share p of an image's attention.

    Args:
        attention: nonnegative maps (n, H, W).

    Returns:
        (n, H, W) in 0-1.
    """
    flat = attention.flatten(1).double()
    values, order = flat.sort(dim=1)
    below = values.cumsum(1) / values.sum(1, keepdim=True)
    return torch.empty_like(flat).scatter_(1, order, below).reshape(attention.shape).float()


# ---- against masks -------------------------------------------------------------------------------------


class MaskSource(ImageSource):
    """Masks in black and white, 255 for any value but 0, so that they are resized and cut as their images
    are. Opacity (alpha) is no value.

    Args:
        files: image files, one for each image.
        images: the images. Reading a mask raises UsageError if its image has another size.
    """

    def __init__(self, files: Sequence[Path], images: ImageSource) -> None:
        super().__init__(name="masks", classes=None, targets=None)
        self.files, self.images = list(files), images

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> str:
        return str(self.files[index])

    def open_image(self, index: int) -> Image.Image:
        with Image.open(self.files[index]) as file:
            values, alpha = np.atleast_3d(np.asarray(file)), file.mode in ("LA", "PA", "RGBA")
        mask = (values[..., :-1] if alpha else values).any(-1)
        if mask.shape[::-1] != (size := self.images.load(index).size):  # upright, as the encoder sees it
            width, height = mask.shape[::-1]
            got = f"{width} x {height} px for {size[0]} x {size[1]} px"
            raise UsageError(f"masks: expected the size of its image, got {self.files[index]} of {got}")
        return Image.fromarray(mask.astype(np.uint8) * 255)


class Overlap(NamedTuple):
    """Intersection over union (IoU) of foreground by threshold with masks, in percent, means over the
    images."""

    iou: float
    """Of the one threshold for all images that gives the largest mean."""
    oracle: float
    """Of the best threshold of each image alone."""
    random: float
    """Expectation for pixels drawn at random, as many as the one threshold takes of each image."""
    threshold: float
    """The one threshold, on the scale of the scores."""


def best_overlap(scores: Iterable[Tensor], masks: Tensor, thresholds: Tensor) -> Overlap:
    """IoU of `scores >= threshold` with the masks. The thresholds are chosen by the masks that they are
    judged by, for every encoder and baseline alike: one number for the set, or one for each image (the
    oracle).

    Args:
        scores: of each of n images, (H, W), high in the foreground; one is held at a time.
        masks: (n, H, W) bool, each with some foreground.
        thresholds: (T,), those to choose from.

    Raises:
        ValueError: another number of scores, or a mask without foreground.
    """
    if not masks.flatten(1).any(1).all():
        raise ValueError("masks: expected some foreground in each, got one without")
    thresholds = thresholds.sort().values
    taken: list[Tensor] = []
    hit: list[Tensor] = []
    for image, mask in zip(scores, masks, strict=True):
        # The number of thresholds that each pixel reaches.
        passed = torch.bucketize(image.contiguous(), thresholds.to(image), right=True)
        for found, bins in ((taken, passed), (hit, passed[mask])):
            counts = torch.bincount(bins.flatten(), minlength=len(thresholds) + 1)
            found.append(counts.flip(0).cumsum(0).flip(0)[1:])
    predicted, inside = torch.stack(taken).double(), torch.stack(hit).double()  # (n, T)
    # One by one: a sum of many bool makes a copy of 8 bytes a pixel.
    true, pixels = torch.stack([mask.sum() for mask in masks]).double()[:, None], masks[0].numel()
    ious = 100 * inside / (predicted + true - inside)
    best = int(ious.mean(0).argmax())
    chance = predicted[:, best] * true[:, 0] / pixels
    random = 100 * chance / (predicted[:, best] + true[:, 0] - chance)
    return Overlap(
        ious[:, best].mean().item(), ious.amax(1).mean().item(), random.mean().item(), thresholds[best].item()
    )


def score_maps(maps: SetMaps, masks: Tensor) -> dict[str, Overlap]:
    """IoU of the mean attention of all heads, of the best head, of where the mean attention is low, and of
    the first principal component.

    Which head is best is chosen by the masks as well, as the threshold is. Attention may avoid what the masks
    call foreground: an encoder attends to whatever the views of an image have in common.

    Args:
        maps: of n images.
        masks: (n, S, S) bool.

    Returns:
        keys "pca" and, where there is attention, "attention", "best_head" and "low_attention".
    """
    size = masks.shape[-1]

    def enlarged(each: Tensor) -> Iterator[Tensor]:
        return (enlarge(one[None, None], size)[0, 0] for one in each)  # all at once do not fit into memory

    def by_value(each: Tensor) -> Overlap:
        step = max(1, masks.numel() // 1_000_000)
        # Cloned, for a slice would keep its whole map.
        sample = [
            one.flatten()[-i * one.numel() % step :: step].clone() for i, one in enumerate(enlarged(each))
        ]
        return best_overlap(enlarged(each), masks, torch.quantile(torch.cat(sample), torch.tensor(SHARES)))

    def by_share(each: Tensor) -> Overlap:
        ranks = (attention_rank(one[None])[0] for one in enlarged(each))
        return best_overlap(ranks, masks, torch.tensor(SHARES))

    found = {"pca": by_value(maps.components[:, 0])}
    if maps.attention is not None:
        mean = maps.attention.mean(1)
        found["attention"] = by_share(mean)
        found["low_attention"] = by_value(-mean)
        found["best_head"] = max(map(by_share, maps.attention.unbind(1)), key=lambda o: o.iou)
    return found


def constant_overlap(masks: Tensor) -> dict[str, Overlap]:
    """What the same answer for every image reaches: "all_foreground", and "centered", the best disc around
    the center."""
    ramp = torch.linspace(-1, 1, masks.shape[-1])
    disc = -torch.hypot(*torch.meshgrid(ramp, ramp, indexing="ij"))
    radii = torch.quantile(disc.flatten(), torch.tensor(SHARES))
    return {
        "all_foreground": best_overlap(torch.zeros(()).expand(masks.shape), masks, torch.zeros(1)),
        "centered": best_overlap(disc.expand(masks.shape), masks, radii),
    }
