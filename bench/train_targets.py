"""The trainer's targets on an H200, and what the rows of train_bench.py say about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gpu_targets import Figure, NotMeasuredError, Row, Target

_CASE = "training"


def _measured(rows: Sequence[Row], key: str, *models: str) -> list[Row]:
    """Rows that have this figure, of these models or of any; NotMeasuredError, with the errors, if none."""
    asked = [row for row in rows if not models or row["model"] in models]
    found = [row for row in asked if row.get(key) is not None]
    if not found:
        errors = {row["error"] for row in asked if "error" in row}
        raise NotMeasuredError(", ".join(sorted(errors)) or f"no row with {key}")
    return found


def _says(row: Row) -> str:
    extras = [row["strategy"], row["activation_checkpointing"]]
    return " ".join([f"{row['model']} x {row['images']}", *(word for word in extras if word != "none")])


def _mfu(model: str) -> Callable[[Sequence[Row]], Figure]:
    """The best of the model's cases."""

    def figure(rows: Sequence[Row]) -> Figure:
        best = max(_measured(rows, "mfu", model), key=lambda row: row["mfu"])
        note = f"{_says(best)}: {best['images_per_second']:.1f} images/s, {best['peak_memory_gib']:.1f} GiB"
        return Figure(100 * best["mfu"], note)

    return figure


def _stall(rows: Sequence[Row]) -> Figure:
    worst = max(
        _measured(rows, "checkpoint_stall_steps"),
        key=lambda row: row["checkpoint_stall_steps"],
    )
    note = f"{_says(worst)}: complete after {worst['checkpoint_seconds']:.1f} s"
    return Figure(worst["checkpoint_stall_steps"], note)


def _fsdp_against_ddp(rows: Sequence[Row]) -> Figure:
    """Of the same model and batch."""
    usual = [row for row in _measured(rows, "images_per_second") if not row["plan"]]
    speed = {(row["model"], row["images"], row["strategy"]): row["images_per_second"] for row in usual}
    pairs = {
        (model, images): (speed[model, images, "fsdp"], ddp)
        for (model, images, strategy), ddp in speed.items()
        if strategy == "ddp" and (model, images, "fsdp") in speed
    }
    if not pairs:
        raise NotMeasuredError("no model was measured with both, at the same batch")
    (model, images), (fsdp, ddp) = min(pairs.items(), key=lambda pair: pair[1][0] / pair[1][1])
    note = f"{model} x {images}: {fsdp:.1f} against {ddp:.1f} images/s"
    # Not the same computation: FSDP2 gathers position embeddings in bf16, and so the blocks add to bf16.
    return Figure(100 * fsdp / ddp, f"{note}; between blocks FSDP2 has bf16, DDP float32")


def _from_files(rows: Sequence[Row]) -> Figure:
    """Images through the loader against views that are there already: the same model and batch."""
    found = _measured(rows, "images_per_second", "vit_small_patch16_224")
    speed = {(row["images"], row["loader"]): row["images_per_second"] for row in found}
    pairs = {
        n: (fast, speed[n, False]) for (n, loader), fast in speed.items() if loader and (n, False) in speed
    }
    if not pairs:
        raise NotMeasuredError("not measured both from files and on synthetic views, at the same batch")
    images, (files, synthetic) = max(pairs.items())
    waits = ", ".join(f"{row['data_wait']:.1%}" for row in found if row["loader"])
    note = f"x {images}: {files:.0f} against {synthetic:.0f} images/s, data wait {waits}"
    return Figure(100 * files / synthetic, note)


def _gigantic_trains(rows: Sequence[Row]) -> Figure:
    """Its last loss over its first, both means of two batches; the curve stands in the row."""
    recomputed = [r for r in rows if r["activation_checkpointing"] != "none" or "error" in r]
    row = _measured(recomputed, "losses", "vit_gigantic")[0]
    losses = row["losses"]
    if not all(map(math.isfinite, losses)):
        raise NotMeasuredError("the loss is not finite")
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    note = f"{_says(row)}: loss {first:.3f} -> {last:.3f} in {len(losses)} steps"
    return Figure(last / first, f"{note}, {row['peak_memory_gib']:.1f} GiB")


def _sigreg_share(rows: Sequence[Row]) -> Figure:
    """The largest of all cases."""
    found = _measured(rows, "sigreg_share")
    by_model = {row["model"]: row["sigreg_share"] for row in sorted(found, key=lambda r: r["sigreg_share"])}
    note = ", ".join(f"{model} {share:.2%}" for model, share in by_model.items())
    return Figure(100 * max(by_model.values()), note)


def _planned_memory(rows: Sequence[Row]) -> Figure:
    row = _measured(rows, "planned_memory_gib")[0]
    planned, measured = row["planned_memory_gib"], row["peak_memory_gib"]
    note = f"{_says(row)}: planned {planned:.1f} GiB, the allocator's peak {measured:.1f} GiB"
    return Figure(100 * abs(planned / measured - 1), note)


TARGETS = (
    Target(_CASE, "ViT-L/14 MFU", ">=", 45, " %", _mfu("vit_large")),
    Target(_CASE, "ViT-L/14 MFU, goal", ">=", 50, " %", _mfu("vit_large")),
    Target(_CASE, "ViT-giant MFU", ">=", 50, " %", _mfu("vit_giant")),
    Target(_CASE, "ViT-gigantic MFU, goal", ">=", 55, " %", _mfu("vit_gigantic")),
    Target(_CASE, "checkpoint stall", "<=", 1, " steps", _stall),
    Target(_CASE, "FSDP2 against DDP, one GPU", ">=", 99, " %", _fsdp_against_ddp),
    Target(_CASE, "ViT-S/16 from files against synthetic views", ">=", 97, " %", _from_files),
    Target(_CASE, "ViT-gigantic on one GPU, loss after / before", "<", 1, "", _gigantic_trains),
    Target(_CASE, "SIGReg's share of the step", "<", 1, " %", _sigreg_share),
    Target(_CASE, "planned memory, off by", "<=", 10, " %", _planned_memory),
)
