"""Full fine-tuning: the encoder and a linear head on its pooled features, trained with labels.

Of the untrained encoder this is supervised training from scratch. Random resized crops (area 0.3 to 1) and
flips; AdamW with weight decay 0.05, batch 64, linear warm-up over a tenth of the steps and a cosine to 0,
gradients clipped at norm 1. At least 100 steps, so that few labels are enough. The rate is chosen from 1e-4
and 1e-3 on a fifth of the TRAINING images, by `held_out_losses`; then the encoder is trained on all of them.
"""

import copy
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lejepa_fast.data import ImageSource, multicrop_loader
from lejepa_fast.errors import RunError
from lejepa_fast.train.config import Config
from lejepa_fast.train.evaluation.probes import (
    held_out_losses,
    percent,
    stratified_holdout,
    warmup_cosine,
)
from lejepa_fast.train.evaluation.regression import regression_score

LEARNING_RATES = (1e-4, 1e-3)
BATCH = 64
SMALLEST_NUMBER_OF_STEPS = 100


def fine_tune(
    encoder: nn.Module,
    source: ImageSource,
    y: Tensor,
    val_batches: Callable[[ImageSource], Iterable[tuple[Tensor, Tensor]]],
    val_source: ImageSource,
    val_y: Tensor,
    cfg: Config,
    *,
    num_classes: int | None,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    loading: dict[str, Any],
) -> float:
    """Fine-tune a copy of the encoder; return its accuracy in percent, or R2 of numbers.

    Args:
        encoder: images (B, C, S, S) -> features (B, D); it stays as it is.
        source, val_source: images of both splits, whose targets are their numbers in `y` and `val_y`.
        y, val_y: classes or numbers to predict. Those of other images than the given ones are not read.
        val_batches: makes batches (images, targets) of a source without augmentation.
        cfg: `eval.image_size` of the crops, or `crops.global_size`; flips, aspect ratios, `mean` and `std` of
            `crops`; `eval.fine_tune` passes over `source`, without its incomplete last batches; `seed` of
            crops, order, held-out images and dropout.
        num_classes: None: the labels are numbers.
        device, amp_dtype: where, and in which dtype under autocast.
        loading: further arguments of `multicrop_loader`.

    Raises:
        RunError: the predictions are not finite.
    """
    plain: dict[str, Any] = dict.fromkeys(
        ("local_crops", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob"), 0
    )
    plain |= {"global_crops": 1, "global_scale": (0.3, 1.0), "min_image_size": 1}
    recipe = replace(cfg.crops, **plain, global_size=cfg.eval.image_size or cfg.crops.global_size)
    numbers = torch.tensor(source.targets)
    center, scale = 0.0, 1.0
    if num_classes is None:
        center, deviation = y[numbers].mean().item(), y[numbers].std(correction=0).item()
        scale = deviation if deviation > 1e-14 * abs(center) else 1.0  # below that it is rounding

    def batches(images: ImageSource) -> Generator[tuple[Tensor, Tensor], None, None]:
        if len(images) == 1:
            images = images.subset([0, 0])  # BatchNorm takes statistics over at least two crops
        options = {"batch_size": min(BATCH, len(images)), "seed": cfg.seed, **loading}
        loader = multicrop_loader(images, recipe, **options)
        try:
            while True:
                for (views,), targets in loader:
                    assert targets is not None  # the source has them
                    yield views, y[targets.cpu()].to(device)
        finally:
            loader.close()

    def fit(images: ImageSource, rate: float) -> nn.Module:
        torch.manual_seed(cfg.seed)
        trunk = copy.deepcopy(encoder).train().requires_grad_()  # a target encoder is frozen
        steps = max(SMALLEST_NUMBER_OF_STEPS, cfg.eval.fine_tune * (len(images) // min(BATCH, len(images))))
        head = None
        with torch.enable_grad():
            given = batches(images)
            for step in range(steps):
                views, labels = next(given)
                with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                    features = trunk(views)
                    if head is None:
                        head = nn.Linear(features.shape[1], num_classes or 1, device=device)
                        nn.init.zeros_(head.weight)
                        nn.init.zeros_(head.bias)
                        model = nn.Sequential(trunk, head)
                        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
                    out = head(features).float()
                if num_classes:
                    loss = F.cross_entropy(out, labels)
                else:
                    loss = F.mse_loss(out[:, 0], ((labels - center) / scale).float())
                for group in optimizer.param_groups:
                    group["lr"] = rate * warmup_cosine(step, steps)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            given.close()
        return model.eval()

    def predict(model: nn.Module, images: ImageSource, labels: Tensor) -> tuple[Tensor, Tensor]:
        outputs, truth = [], []
        for views, targets in val_batches(images):
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                outputs.append(model(views.to(device)).float().cpu())
            truth.append(labels[targets.cpu()])
        out = torch.cat(outputs)
        if not out.isfinite().all():
            raise RunError("fine-tuning gives NaN or infinite predictions: it has diverged")
        return out, torch.cat(truth)

    def score(out: Tensor, truth: Tensor) -> float:
        if num_classes:
            return percent(out.argmax(dim=1), truth)
        return regression_score(out[:, 0].double() * scale + center, truth).r2

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.no_grad():
        labels = y[numbers]
        held_out = stratified_holdout(labels if num_classes else torch.zeros_like(numbers), cfg.seed)
        best = LEARNING_RATES[-1]
        if int(held_out.sum()) and int((~held_out).sum()) > 1:
            parts = [source.subset(part.nonzero().flatten().numpy()) for part in (~held_out, held_out)]
            found = [predict(fit(parts[0], rate), parts[1], y) for rate in LEARNING_RATES]
            rank = (lambda *each: -float(held_out_losses(*each).min())) if num_classes else score
            scores = [rank(*each) for each in found]
            best = LEARNING_RATES[scores.index(max(scores))]
        return score(*predict(fit(source, best), val_source, val_y))
