"""The targets of a GPU, of SIGReg and of training, and what the rows of a run say about them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import accuracy_bench
from benchlib import Row
from sigreg_variants import BASELINE, COMPILED, GRAPH, REDUCED, TRITON

_COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
FILES = ("sigreg.jsonl", "sigreg_accuracy.jsonl", "train.jsonl")
Figure = tuple[float, str]
"""What was measured for a target, and a note for the reader."""


class NotMeasuredError(Exception):
    """Why a target has no figure."""


class Target(NamedTuple):
    """One line of the table."""

    case: str
    """Key of the benchmark's case that it is read from, "accuracy" or "training"."""
    name: str
    relation: str | None
    """The figure is held to `relation bound`; None: it is enough that it exists."""
    bound: float
    unit: str
    figure: Callable[[Sequence[Row]], Figure]
    """Reads the rows of `FILES`; raises `NotMeasuredError`."""

    @property
    def goal(self) -> str:
        return "runs" if self.relation is None else f"{self.relation} {self.bound:g}{self.unit}"


# --- SIGReg ---------------------------------------------------------------------------------------


def find(rows: Sequence[Row], key: str, variant: str, **more: Any) -> Row:
    """The newest row of a variant in a case, which must be right."""
    case, dtype = key.split("-")
    wanted = {"case": case, "dtype": dtype, "variant": variant, "directions": "drawn", **more}
    found = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    if not found:
        raise NotMeasuredError(f"no row of {variant}")
    if not found[-1]["correct"]:
        raise NotMeasuredError(f"{variant}: {found[-1].get('problem', 'not correct')}")
    return found[-1]


def value_of(row: Row, key: str) -> float:
    """The figure `key` of a row; of times, the median in milliseconds."""
    if key not in row:
        raise NotMeasuredError(f"{row['variant']}: {key} was not measured")
    return row[key]["median_ms"] if isinstance(row[key], dict) else row[key]


def _sigreg(
    key: str,
    name: str,
    goal: tuple[str | None, float, str],
    what: str,
    other: str | None = None,
    *,
    variant: str = TRITON,
    factor: float = 1.0,
) -> Target:
    """A figure `what` of ours; against `other`, the speedup, or of memory the share.

    Both come from the same group of variants, which took turns.
    """

    def figure(rows: Sequence[Row]) -> Figure:
        if other is None:
            row = find(rows, key, variant)
            kernels = ", ".join(f"{count} {name[:30]}" for name, count in row.get("kernels", {}).items())
            return factor * value_of(row, what), kernels if what == "launches" else ""
        theirs = find(rows, key, other)
        ours = find(rows, key, variant, group=theirs.get("group"))
        mine, its = value_of(ours, what), value_of(theirs, what)
        unit = "MiB" if what == "peak_extra_mib" else "ms"
        return mine / its if unit == "MiB" else its / mine, f"{mine:.3g} {unit} against {its:.3g} {unit}"

    return Target(key, name, *goal, figure)


def _accuracy(rows: Sequence[Row]) -> Figure:
    """The largest share of the error that the rule allows, over all rows that it holds for.

    Some of the rows can show that the target is missed, but not that it is met.
    """
    wanted = {(variant.name, J) for variant, J in accuracy_bench.cases("cuda")}
    found = {(r["variant"], r["J"]): r for r in rows if "judged" in r and (r["variant"], r["J"]) in wanted}
    shares = {f"{name}, J {J}": row["share_of_allowed"] for (name, J), row in found.items() if row["judged"]}
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is None or (len(found) < len(wanted) and shares[worst] <= 1):
        raise NotMeasuredError(f"{len(found)} of {len(wanted)} rows of accuracy_bench.py")
    return shares[worst], f"{worst}, the worst of {len(shares)}"


# --- Training -------------------------------------------------------------------------------------


def _trained(rows: Sequence[Row], key: str, *models: str) -> list[Row]:
    """Training rows that have this figure, of these models or of any."""
    asked = [row for row in rows if "model" in row and (not models or row["model"] in models)]
    found = [row for row in asked if row.get(key) is not None]
    if not found:
        errors = {row["error"] for row in asked if "error" in row}
        raise NotMeasuredError(", ".join(sorted(errors)) or f"no row with {key}")
    return found


def _said(row: Row) -> str:
    extras = [row["strategy"], row["activation_checkpointing"]]
    return " ".join([f"{row['model']} x {row['images']}", *(word for word in extras if word != "none")])


def _largest(key: str, *models: str, factor: float = 100.0) -> Callable[[Sequence[Row]], Figure]:
    def figure(rows: Sequence[Row]) -> Figure:
        best = max(_trained(rows, key, *models), key=lambda row: row[key])
        return factor * best[key], _said(best)

    return figure


def _pair(
    rows: Sequence[Row], mine: dict[str, Any], other: dict[str, Any], *models: str
) -> tuple[float, str]:
    """Speed of rows like `mine` in percent of rows like `other`, of the same model and batch."""
    speed: dict[tuple[str, int], dict[str, float]] = {}
    for row in _trained(rows, "images_per_second", *models):
        for name, wanted in (("mine", mine), ("other", other)):
            if not row["plan"] and all(row[k] == v for k, v in wanted.items()):
                speed.setdefault((row["model"], row["images"]), {})[name] = row["images_per_second"]
    pairs = {key: found for key, found in speed.items() if len(found) == 2}
    if not pairs:
        raise NotMeasuredError("not measured both ways at the same batch")
    (model, images), found = min(pairs.items(), key=lambda pair: pair[1]["mine"] / pair[1]["other"])
    note = f"{model} x {images}: {found['mine']:.1f} against {found['other']:.1f} images/s"
    return 100 * found["mine"] / found["other"], note


def _fsdp_against_ddp(rows: Sequence[Row]) -> Figure:
    # FSDP2 gathers position embeddings in bf16, so its blocks add to bf16.
    share, note = _pair(rows, {"strategy": "fsdp"}, {"strategy": "ddp"})
    return share, f"{note}; between blocks FSDP2 has bf16, DDP float32"


def _from_files(rows: Sequence[Row]) -> Figure:
    return _pair(rows, {"loader": True}, {"loader": False}, "vit_small_patch16_224")


def _gigantic_trains(rows: Sequence[Row]) -> Figure:
    """Its last loss over its first, each the mean of two batches."""
    recomputed = [r for r in rows if r.get("activation_checkpointing") != "none" or "error" in r]
    row = _trained(recomputed, "losses", "vit_gigantic")[0]
    losses = row["losses"]
    if not all(map(math.isfinite, losses)):
        raise NotMeasuredError("the loss is not finite")
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    return last / first, f"{_said(row)}: loss {first:.3f} -> {last:.3f} in {len(losses)} steps"


def _planned_memory(rows: Sequence[Row]) -> Figure:
    row = _trained(rows, "planned_memory_gib")[0]
    planned, measured = row["planned_memory_gib"], row["peak_memory_gib"]
    note = f"{_said(row)}: planned {planned:.1f} GiB, the allocator's peak {measured:.1f} GiB"
    return 100 * abs(planned / measured - 1), note


# --- The table ------------------------------------------------------------------------------------

_REF, _REF32, _GIANT, _MINIMAL = (
    "reference-bfloat16",
    "reference-float32",
    "giant-bfloat16",
    "minimal-float32",
)
_BOTH, _MEMORY, _SHARE = "forward_backward", "peak_extra_mib", "share_of_floor"
TARGETS = (
    _sigreg(_REF, "speed against eager", (">=", 40, "x"), _BOTH, BASELINE),
    _sigreg(_REF, "speed against torch.compile", (">=", 8, "x"), _BOTH, COMPILED),
    _sigreg(_REF, "memory against eager", ("<=", 1 / 40, ""), _MEMORY, BASELINE),
    _sigreg(_REF, "time", ("<=", 0.2, " ms"), _BOTH),
    _sigreg(_REF, "share of the floor", (">=", 50, " %"), _SHARE, factor=100),
    _sigreg(_GIANT, "time", (None, 0, " ms"), _BOTH),
    _sigreg(_GIANT, "extra memory", ("<", 2, " GiB"), _MEMORY, factor=1 / 1024),
    _sigreg(_GIANT, "share of the floor", (">=", 50, " %"), _SHARE, factor=100),
    _sigreg(_MINIMAL, "speed against eager, wall clock", (">=", 1.5, "x"), "wall", BASELINE),
    _sigreg(
        _MINIMAL, "CUDA graph against eager, wall clock", (">=", 4, "x"), "wall", BASELINE, variant=GRAPH
    ),
    _sigreg(_MINIMAL, "CUDA graph against reduce-overhead", (">=", 2, "x"), "wall", REDUCED, variant=GRAPH),
    _sigreg(_MINIMAL, "launches, with directions", ("<=", 6, ""), "launches"),
    _sigreg(_REF32, "speed against eager", (">=", 20, "x"), _BOTH, BASELINE),
    _sigreg(_REF32, "speed against torch.compile", (">=", 4, "x"), _BOTH, COMPILED),
    _sigreg(_REF32, "memory against eager", ("<=", 1 / 40, ""), _MEMORY, BASELINE),
    Target("accuracy", "error as a share of what the rule allows", "<=", 1, "", _accuracy),
    Target("training", "ViT-L/14 MFU", ">=", 45, " %", _largest("mfu", "vit_large")),
    Target("training", "ViT-L/14 MFU, goal", ">=", 50, " %", _largest("mfu", "vit_large")),
    Target("training", "ViT-giant MFU", ">=", 50, " %", _largest("mfu", "vit_giant")),
    Target("training", "ViT-gigantic MFU, goal", ">=", 55, " %", _largest("mfu", "vit_gigantic")),
    Target("training", "checkpoint stall", "<=", 1, " steps", _largest("checkpoint_stall_steps", factor=1)),
    Target("training", "FSDP2 against DDP, one GPU", ">=", 99, " %", _fsdp_against_ddp),
    Target("training", "ViT-S/16 from files against synthetic views", ">=", 97, " %", _from_files),
    Target("training", "ViT-gigantic on one GPU, loss after / before", "<", 1, "", _gigantic_trains),
    Target("training", "SIGReg's share of the step", "<", 1, " %", _largest("sigreg_share")),
    Target("training", "planned memory, off by", "<=", 10, " %", _planned_memory),
)


def judge(rows: Sequence[Row], *cases: str) -> list[Row]:
    """A row for each target of these cases: figure and whether it is met, or why there is none."""
    judged = []
    for target in TARGETS:
        if target.case not in cases:
            continue
        row: Row = {"target": f"{target.case}: {target.name}", "goal": target.goal, "unit": target.unit}
        row |= {"figure": None, "met": None, "note": ""}
        try:
            if any(r.get("rehearsal") for r in rows):
                raise NotMeasuredError("this was a rehearsal")
            figure, note = target.figure(rows)
            met = target.relation is None or _COMPARE[target.relation](figure, target.bound)
            row |= {"figure": figure, "met": met, "note": note}
        except NotMeasuredError as why:
            row["note"] = str(why)
        judged.append(row)
    return judged


def table_of(judged: Sequence[Row]) -> list[list[str]]:
    """Cells of a printed table: target, goal, figure, met."""
    cells = []
    for row in judged:
        figure = "-" if row["figure"] is None else f"{row['figure']:.3g}{row['unit']}"
        met = {True: "met", False: "NOT MET", None: "not measured"}[row["met"]]
        cells.append([row["target"], row["goal"], figure, met])
    return cells
