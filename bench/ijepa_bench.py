"""Time and memory of contexts of different lengths: packed, padded, and cut to the shortest of the batch.

    python bench/ijepa_bench.py
    python bench/ijepa_bench.py --model vit_base_patch16_224 --kwargs '{}' --predictor 384 6 12    # on a GPU

A step is forward and backward of context encoder and predictor, on random images and with the masks of
`MultiBlockMasks`; the targets are given, and there is no optimizer. "packed" and "padded" are those of
`train/model/packing.py`. "truncated" is a formulation of our own of what the collator of
github.com/facebookresearch/ijepa does: all contexts and all targets of a batch are cut to the shortest, in
row-major order, so that nothing is padded and part of each image is thrown away.

The ways take turns, and ratios are those of a round. Memory is what one step holds above what is there before
it, each way in a process of its own. The narrow masks show that both follow the number of tokens. bf16 on a
GPU, float32 on a CPU. Appends a row for each way and kind of masks to ijepa.jsonl.
"""

import statistics
from argparse import Namespace
from collections.abc import Callable, Sequence

import timing
import torch
from benchlib import Row, Rows, command_line, print_rows
from torch import Tensor
from torch.nn import functional as F

from lejepa_fast.data import MultiCropRecipe
from lejepa_fast.data.masks import MultiBlockMasks
from lejepa_fast.train.config import Config, MaskedConfig, ModelConfig
from lejepa_fast.train.model.masked import MaskedBatch, MaskedModel, masked_batch
from lejepa_fast.train.model.model import build_model

WAYS = ("packed", "padded", "truncated")
CONTEXT_AREAS = {"I-JEPA": (0.85, 1.0), "narrow": (0.4, 0.5)}
"""Of the context block, by name of the masks."""


def model_of(options: Namespace, device: torch.device) -> MaskedModel:
    """The model of a run, with random targets in place of those of the target encoder."""
    width, depth, heads = options.predictor
    cfg = Config(
        objective="ijepa",
        crops=MultiCropRecipe(global_crops=1, local_crops=0, global_size=options.size),
        model=ModelConfig(name=options.model, kwargs=options.kwargs),
        masked=MaskedConfig(predictor_width=width, predictor_depth=depth, predictor_heads=heads),
    )
    model = build_model(cfg).to(device).train()
    assert isinstance(model, MaskedModel)
    model.target = None
    patches, features = model.predictor.positions.shape[0], model.predictor.project.out_features
    targets = torch.randn(options.batch, patches, features, device=device)
    model.targets = lambda images: targets  # type: ignore[method-assign]
    return model


def shortened(masks: Tensor) -> Tensor:
    """Cut bool masks (..., h, w) to the smallest of them: the last patches in row-major order go."""
    flat = masks.flatten(-2)
    return (flat & (flat.cumsum(-1) <= flat.sum(-1).min())).view_as(masks)


def batch_of(way: str, masks: str, model: MaskedModel, images: int, device: torch.device) -> MaskedBatch:
    """Masks of images 0, 1, ... of seed 0."""
    draw = MultiBlockMasks(model.predictor.grid, context_area=CONTEXT_AREAS[masks])
    context, targets = draw(0, 0, range(images))
    prefix = model.encoder.num_prefix_tokens
    if way != "truncated":
        return masked_batch(context, targets, prefix, device)
    batch = masked_batch(shortened(context), shortened(targets), prefix, device)
    for packing in (batch.context, batch.blocks):
        packing.keys = None  # type: ignore[assignment]  # one length: attention needs no mask
    return batch


def step_of(
    way: str, masks: str, model: MaskedModel, images: Tensor
) -> tuple[MaskedBatch, Callable[[], None]]:
    """A batch, and a step on it."""
    device = images.device
    batch = batch_of(way, masks, model, len(images), device)

    def step() -> None:
        model.zero_grad()
        model.packed = way == "packed"
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = model([images], batch)
        F.smooth_l1_loss(out.predictions.float(), out.wanted).backward()

    return batch, step


def images_of(options: Namespace, device: torch.device) -> Tensor:
    return torch.randn(options.batch, 3, options.size, options.size, device=device)


def peak_mib(way: str, masks: str, options: Namespace) -> float:
    """What a step holds at its peak beside weights and images, in MiB."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model, images = model_of(options, device), images_of(options, device)
    _, step = step_of(way, masks, model, images)
    step()
    model.zero_grad()
    return timing.peak_extra_bytes(step, device) / 2**20


def measured(masks: str, options: Namespace) -> list[Row]:
    """A row for each way with one kind of masks."""
    device = torch.device(options.device)
    model, images = model_of(options, device), images_of(options, device)
    made = {way: step_of(way, masks, model, images) for way in WAYS}
    clock = timing.GpuClock(device) if device.type == "cuda" else timing.once
    seconds = timing.interleave({way: made[way][1] for way in WAYS}, options.rounds, clock, warm_up=1)
    rows: list[Row] = []
    for way, (batch, _) in made.items():
        taken, packed = seconds[way], seconds["packed"]
        packings = batch.context, batch.blocks
        held = sum(p.rows for p in packings)
        padded = sum(p.size[0] * p.size[1] for p in packings)
        row = {"masks": masks, "way": way, "context_patches": len(batch.patches), "tokens": held}
        row |= {"target_patches": len(batch.wanted), "padding": 1 - held / padded}
        row["step"] = timing.summary(taken)
        row["time_over_packed"] = statistics.median(a / b for a, b in zip(taken, packed, strict=True))
        row["peak_mib"] = timing.in_fresh_process(peak_mib, way, masks, options)
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="(%(default)s)")
    parser.add_argument("--kwargs", default='{"depth": 4}', help="of the model, JSON (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of an image in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images (%(default)s)")
    about = "width, depth and heads (%(default)s)"
    parser.add_argument("--predictor", type=int, nargs=3, default=[96, 2, 3], help=about)
    parser.add_argument("--rounds", type=int, default=9, help="of all ways in turn (%(default)s)")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.threads = torch.get_num_threads()
    writer = Rows(options.out / "ijepa.jsonl", "ijepa_bench", torch.device(options.device))
    setting = {name: getattr(options, name) for name in ("model", "kwargs", "size", "batch", "predictor")}
    rows: list[Row] = []
    for masks in CONTEXT_AREAS:
        rows += writer.write(*({**each, **setting} for each in measured(masks, options)))
    columns = {
        "masks, way": "{masks}, {way}",
        "context patches": "{context_patches:,}",
        "target patches": "{target_patches:,}",
        "tokens": "{tokens:,}",
        "padding": "{padding:.1%}",
        "ms": "{step[median_ms]:.1f}",
        "/ packed": "{time_over_packed:.2f}",
        "peak MiB": "{peak_mib:.0f}",
        "KiB a token": "{kib:.1f}",
    }
    print_rows([{**row, "kib": 1024 * row["peak_mib"] / row["tokens"]} for row in rows], columns)


if __name__ == "__main__":
    main()
