"""Masked prediction in feature space: I-JEPA (arXiv 2301.08243), and the same without a teacher.

The context encoder sees the context patches of an image, as many as its masks keep. For each target block the
predictor gets their features and a mask token with the position of each target patch, and says what the
target features there are. All blocks of all images go through the predictor in one pass.

I-JEPA's targets are the features of a second encoder, the target encoder, which sees the whole image. Its
weights are an exponential moving average of the context encoder's; no gradient reaches it. Its features are
normalized over their dimensions before they are compared. Masked LeJEPA has one encoder for both: the
projector's embeddings of the whole image are the targets, with a gradient, and SIGReg prevents collapse.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import PatchDropout, PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn
from torch.nn import functional as F

from lejepa_fast.data.masks import MultiBlockMasks
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import MaskedConfig
from lejepa_fast.train.model.average import local_shard
from lejepa_fast.train.model.packing import Packing, run_blocks, to_device

# Patches are averaged after the last norm, and there is no class token, as in the authors' code.
ENCODER_DEFAULTS = {"class_token": False, "global_pool": "avg", "fc_norm": False}


class MaskedBatch(NamedTuple):
    """Where the patches of a batch go. B images of P patches, p prefix tokens (class, registers) each.

    Sequences are sorted by length, for the attention of `packing.py` on a CPU.
    """

    kept: Tensor
    """Tokens that the context encoder sees, of all B (p + P), as its rows."""
    context: Packing
    """Its sequences, one for each image."""
    patches: Tensor
    """Its rows that are patches."""
    places: Tensor
    """Their positions in the grid."""
    sequence: Tensor
    """Rows of the predictor: numbers of `patches`, and from there on mask tokens by position."""
    blocks: Packing
    """Its sequences, one for each block of each image: context first, then the target patches."""
    predicted: Tensor
    """Its rows that are target patches."""
    wanted: Tensor
    """These patches, of all B P."""


def masked_batch(context: Tensor, targets: Tensor, prefix: int, device: torch.device) -> MaskedBatch:
    """Turn masks into indices.

    Args:
        context, targets: bool masks on the CPU, (B, h, w) and (B, M, h, w), of `MultiBlockMasks`.
        prefix: tokens of the encoder before the patches.
        device: where the indices go.
    """
    (images, blocks, P), width = targets.flatten(2).shape, prefix + context[0].numel()
    seen = context.flatten(1)
    tokens = torch.cat([seen.new_ones(images, prefix), seen], dim=1)
    image, column, context_lengths = _by_length(tokens)
    is_patch = column >= prefix
    places = column[is_patch] - prefix
    count = len(places)
    number = torch.zeros(images, P, dtype=torch.int64)  # of a context patch among those of the batch
    number[image[is_patch], places] = torch.arange(count)
    # Each block's row of context patches, then target patches.
    both = torch.cat([seen[:, None].expand(-1, blocks, -1), targets.flatten(2)], dim=2)
    block, patch, block_lengths = _by_length(both.flatten(0, 1))
    of, is_target = block // blocks, patch >= P
    patch = patch % P
    sequence = torch.where(is_target, count + patch, number[of, patch])
    found = (of * P + patch)[is_target]
    indices = image * width + column, _numbers(is_patch), places, sequence, _numbers(is_target), found
    kept, patches, places, sequence, predicted, found = to_device(device, *indices)
    packings = Packing(context_lengths, device), Packing(block_lengths, device)
    return MaskedBatch(
        kept, packings[0], patches, places, sequence, packings[1], predicted=predicted, wanted=found
    )


def _by_length(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The set places of masks (S, L), the mask with the fewest first: rows (T,), columns (T,), and how many
    each mask has (S,)."""
    lengths, order = mask.sum(1).sort(stable=True)
    row, column = mask[order].nonzero(as_tuple=True)
    return order[row], column, lengths


def _numbers(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


class MaskedOutputs(NamedTuple):
    """What the loss compares: R target patches of the batch."""

    tokens: Tensor
    """Targets of all patches of all images, (B, P, K)."""
    wanted: Tensor
    """Those of the target patches, (R, K)."""
    predictions: Tensor
    """(R, K)"""


class Predictor(nn.Module):
    """A narrow vision transformer with fixed 2-D sine-cosine positions.

    Args:
        features: width of the context encoder.
        out: width of the targets.
        grid: patches of an image (height, width).
        options: width, depth and heads.
    """

    positions: Tensor

    def __init__(self, features: int, out: int, grid: tuple[int, int], options: MaskedConfig):
        super().__init__()
        width, heads = options.predictor_width, options.predictor_heads
        if width % 4 or width % heads:
            raise UsageError(
                f"masked.predictor_width: expected a multiple of 4 and of masked.predictor_heads {heads}, "
                f"got {width}"
            )
        self.embed = nn.Linear(features, width)
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.register_buffer("positions", build_sincos2d_pos_embed(list(grid), width), persistent=False)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(options.predictor_depth))
        )
        self.norm = norm(width)
        self.project = nn.Linear(width, out)
        self.grid = grid
        self.apply(init_weights_vit_timm)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, 1):  # as in the authors' code: smaller with depth
                for linear in (block.attn.proj, block.mlp.fc2):  # type: ignore[union-attr]
                    linear.weight.div_((2 * number) ** 0.5)  # type: ignore[union-attr, operator]

    def forward(self, context: Tensor, batch: MaskedBatch, packed: bool) -> Tensor:
        """Features of the context patches (T, D) -> predictions of the target patches (R, K)."""
        seen = self.embed(context) + self.positions[batch.places]
        table = torch.cat([seen, self.mask_token + self.positions])
        x = run_blocks(self.blocks, table.index_select(0, batch.sequence), batch.blocks, packed=packed)
        return self.project(self.norm(x.index_select(0, batch.predicted)))


class MaskedModel(nn.Module):
    """Context encoder, predictor, and target encoder or projector, under one forward.

    `target` is None without a teacher. It is a module of the same construction as the encoder, so that it is
    sharded like it. `packed`: see `packing.py`.
    """

    encoder: VisionTransformer
    target: VisionTransformer | None

    def __init__(
        self,
        encoder: VisionTransformer,
        projector: nn.Module,
        predictor: Predictor,
        target: VisionTransformer | None,
        masks: MaskedConfig,
        *,
        packed: bool = True,
    ):
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor
        self.target = target
        self.packed = packed
        areas = masks.target_area, masks.target_aspect, masks.context_area
        try:
            self.masks = MultiBlockMasks(predictor.grid, masks.targets, *areas, masks.min_keep)
        except (ValueError, TypeError) as error:  # what the grid cannot have
            raise UsageError(f"masked.{error}") from error
        if target is not None:
            target.load_state_dict(encoder.state_dict())
            target.requires_grad_(False)

    def train(self, mode: bool = True) -> "MaskedModel":
        """As of every module; the target encoder stays in evaluation mode."""
        super().train(mode)
        if self.target is not None:
            self.target.eval()
        return self

    def batch(self, seed: int, epoch: int, indices: Sequence[int], device: torch.device) -> MaskedBatch:
        """The masks of the images with these numbers, as indices on `device`."""
        return masked_batch(*self.masks(seed, epoch, indices), self.encoder.num_prefix_tokens, device)

    def forward(self, views: Sequence[Tensor], batch: MaskedBatch) -> MaskedOutputs:
        """One view (B, C, S, S) of each image, and its masks."""
        (images,) = views
        encoder, tokens = self.encoder, self.targets(images)
        x = _embedded(encoder, images).flatten(0, 1).index_select(0, batch.kept)
        x = run_blocks(encoder.blocks, x, batch.context, packed=self.packed)
        context = encoder.fc_norm(encoder.norm(x.index_select(0, batch.patches)))
        predictions = self.predictor(context, batch, self.packed)
        return MaskedOutputs(tokens, tokens.flatten(0, 1).index_select(0, batch.wanted), predictions)

    def targets(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) -> targets of all patches (B, P, K)."""
        if self.target is None:
            features = _tokens(self.encoder, images)
            return self.projector(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        with torch.no_grad():
            features = _tokens(self.target, images)
            return F.layer_norm(features, features.shape[-1:])

    @torch.no_grad()
    def follow(self, momentum: float, skipped: Tensor) -> None:
        """Move the target encoder to the encoder: g = momentum g + (1 - momentum) f, in place, on the shards
        of this rank. `skipped`: 0-dim tensor, above 0 where the step was skipped, which changes nothing."""
        if self.target is None:
            return
        weight = torch.where(skipped > 0, 0.0, 1 - momentum)
        for mine, its in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
            own, new = local_shard(mine), local_shard(its)
            own.lerp_(new, weight.to(own.dtype))


def _embedded(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """All tokens with their positions, before the blocks: (B, p + P, D)."""
    return encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))


def _tokens(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Features of all patches of whole images, (B, P, D)."""
    x = _embedded(encoder, images)
    for block in encoder.blocks:
        x = block(x)
    return encoder.fc_norm(encoder.norm(x[:, encoder.num_prefix_tokens :]))


def check_masked_encoder(encoder: nn.Module, name: str) -> VisionTransformer:
    """Return the encoder if its patches can be masked: UsageError for other models than plain vision
    transformers."""
    problem = None
    if not isinstance(encoder, VisionTransformer):
        problem = "is no plain vision transformer of timm"
    elif not isinstance(encoder.patch_embed, PatchEmbed):
        problem = "sees beyond a patch before its patches can be masked"
    elif encoder.attn_pool is not None:
        problem = "pools its patches by attention, which masked prediction does not train"
    elif isinstance(encoder.patch_drop, PatchDropout):
        problem = "drops patches itself"
    elif not all(getattr(getattr(block, "attn", block), "fused_attn", True) for block in encoder.blocks):
        problem = "runs without fused attention here (TIMM_FUSED_ATTN)"
    if problem is not None:
        raise UsageError(
            f"model {name}: {problem}; use a vision transformer such as vit_base, or --objective lejepa"
        )
    assert isinstance(encoder, VisionTransformer)
    return encoder


@torch.no_grad()
def start_positions(encoder: VisionTransformer) -> None:
    """Start the learned positions of the patches from 2-D sines and cosines, which the authors keep fixed."""
    positions, grid = encoder.pos_embed, encoder.patch_embed.grid_size
    if positions is not None and positions.shape[-1] % 4 == 0:
        count = grid[0] * grid[1]
        positions[:, -count:] = build_sincos2d_pos_embed(list(grid), positions.shape[-1])
