"""All targets, and what the rows of a run say about them."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import accuracy_bench
from benchlib import Row, print_table
from sigreg_variants import BASELINE, COMPILED, GRAPH, REDUCED, TRITON

_COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
FILES = ("sigreg.jsonl", "sigreg_accuracy.jsonl", "train.jsonl")


class NotMeasuredError(Exception):
    """Why a target has no figure."""


class Target(NamedTuple):
    """One line of the table: the figure is held to `relation bound`."""

    case: str
    """Key of the benchmark's case that it is read from, "accuracy", "training" or a "loader ..."."""
    name: str
    relation: str
    bound: float
    unit: str
    figure: tuple[Any, ...]
    """What finds the figure in the rows of a run, or raises `NotMeasuredError`, and its further arguments."""


def _value(rows: Sequence[Row], key: str, variant: str, what: str, **more: Any) -> tuple[float, Row]:
    """The figure `what` of the newest row of a variant in a case, which must be right, and the row.

    Of times it is the median in milliseconds.
    """
    case, dtype = key.split("-")
    wanted = {"case": case, "dtype": dtype, "variant": variant, **more}
    found = [row for row in rows if wanted.items() <= row.items()]
    if not found:
        raise NotMeasuredError(f"no row of {variant}")
    row = found[-1]
    if not row["correct"]:
        raise NotMeasuredError(f"{variant}: {row['problem']}")
    if what not in row:
        raise NotMeasuredError(f"{variant}: {what} was not measured")
    return row[what]["median_ms"] if isinstance(row[what], dict) else row[what], row


def _ours(rows: Sequence[Row], key: str, what: str, factor: float = 1.0) -> float:
    return factor * _value(rows, key, TRITON, what)[0]


def _against(rows: Sequence[Row], key: str, what: str, other: str, variant: str = TRITON) -> float:
    """Speedup of `variant` over `other`, or its share of the memory, in the same group, which took turns."""
    its, row = _value(rows, key, other, what)
    mine, _ = _value(rows, key, variant, what, group=row["group"])
    return mine / its if what == _MEMORY else its / mine


def _accuracy(rows: Sequence[Row], knots: int) -> float:
    """The largest share of the error that the rule allows, over all rows of so many knots.

    Some of the rows can show that the target is missed, but not that it is met.
    """
    wanted = {(variant.name, J) for variant, J in accuracy_bench.cases("cuda", [knots])}
    found = {(r["variant"], r["J"]): r for r in rows if "judged" in r and (r["variant"], r["J"]) in wanted}
    worst = max((row["share_of_allowed"] for row in found.values() if row["judged"]), default=0)
    if len(found) < len(wanted) and worst <= 1:
        raise NotMeasuredError(f"{len(found)} of {len(wanted)} rows of accuracy_bench.py")
    return worst


def _trained(rows: Sequence[Row], key: str, model: str | None = None) -> list[Row]:
    """Training rows that have this figure, of this model or of any."""
    asked = [row for row in rows if "model" in row and model in (None, row["model"])]
    found = [row for row in asked if row.get(key) is not None]
    if not found:
        errors = {row["error"] for row in asked if "error" in row}
        raise NotMeasuredError(", ".join(sorted(errors)) or f"no row with {key}")
    return found


def _largest(rows: Sequence[Row], key: str, model: str | None = None, factor: float = 100.0) -> float:
    return factor * max(row[key] for row in _trained(rows, key, model))


def _pair(rows: Sequence[Row], key: str, mine: Any, other: Any, model: str | None = None) -> float:
    """Speed of rows whose `key` is `mine` in percent of rows where it is `other`, same model and batch."""
    measured = [row for row in _trained(rows, "images_per_second", model) if not row["plan"]]
    speed = {(row["model"], row["images"], row[key]): row["images_per_second"] for row in measured}
    pairs = [
        100 * figure / speed[name, images, other]
        for (name, images, value), figure in speed.items()
        if value == mine and (name, images, other) in speed
    ]
    if not pairs:
        raise NotMeasuredError("not measured both ways at the same batch")
    return min(pairs)


def _gigantic_trains(rows: Sequence[Row]) -> float:
    """Its last loss over its first, each the mean of two batches."""
    recomputed = [r for r in rows if r.get("activation_checkpointing") != "none" or "error" in r]
    losses = _trained(recomputed, "losses", "vit_gigantic")[0]["losses"]
    if not all(map(math.isfinite, losses)):
        raise NotMeasuredError("the loss is not finite")
    return sum(losses[-2:]) / sum(losses[:2])


def _planned_memory(rows: Sequence[Row]) -> float:
    row = _trained(rows, "planned_memory_gib")[0]
    return 100 * abs(row["planned_memory_gib"] / row["peak_memory_gib"] - 1)


def _faster(rows: Sequence[Row], other: str, kind: str = "speed", factor: float = 1.0) -> float:
    """Our images per second over those of another loader, times `factor`."""
    speed = {row["contender"]: row["images_per_s"] for row in rows if row.get("kind") == kind}
    if missing := {_OURS, other} - speed.keys():
        raise NotMeasuredError(f"no row of {', '.join(sorted(missing))}")
    return factor * speed[_OURS] / speed[other]


def _growth(rows: Sequence[Row]) -> float:
    found = [row["growth"] for row in rows if row.get("kind") == "memory"]
    if not found:
        raise NotMeasuredError("memory was not measured")
    return max(found)


_REF, _REF32 = "reference-bfloat16", "reference-float32"
_GIANT, _MINIMAL = "giant-bfloat16", "minimal-float32"
_BOTH, _MEMORY, _SHARE = "forward_backward", "peak_extra_mib", "share_of_floor"
_WALL, _EAGER, _COMPILED = "wall", "speed against eager", "speed against torch.compile"
_S16 = "vit_small_patch16_224"
_OURS, _V2 = "lejepa_fast", "torchvision v2"  # as loader_bench.py, which imports this module, calls them
_STABLE, _DALI = "stable-pretraining", "decode only, DALI"
_PLACES = {"CPU": 5, "GPU": 8}
_GRAPHS = (_against, _MINIMAL, _WALL, REDUCED, GRAPH)
TARGETS = (
    Target(_REF, _EAGER, ">=", 40, "x", (_against, _REF, _BOTH, BASELINE)),
    Target(_REF, _COMPILED, ">=", 8, "x", (_against, _REF, _BOTH, COMPILED)),
    Target(_REF, "memory against eager", "<=", 1 / 40, "", (_against, _REF, _MEMORY, BASELINE)),
    Target(_REF, "time", "<=", 0.2, " ms", (_ours, _REF, _BOTH)),
    Target(_REF, "share of the floor", ">=", 50, " %", (_ours, _REF, _SHARE, 100)),
    Target(_GIANT, "time (it runs)", "<", math.inf, " ms", (_ours, _GIANT, _BOTH)),
    Target(_GIANT, "extra memory", "<", 2, " GiB", (_ours, _GIANT, _MEMORY, 1 / 1024)),
    Target(_GIANT, "share of the floor", ">=", 50, " %", (_ours, _GIANT, _SHARE, 100)),
    Target(_MINIMAL, f"{_EAGER}, wall clock", ">=", 1.5, "x", (_against, _MINIMAL, _WALL, BASELINE)),
    Target(_MINIMAL, "CUDA graph against eager", ">=", 4, "x", (_against, _MINIMAL, _WALL, BASELINE, GRAPH)),
    Target(_MINIMAL, "CUDA graph against reduce-overhead", ">=", 2, "x", _GRAPHS),
    Target(_MINIMAL, "launches, with directions", "<=", 6, "", (_ours, _MINIMAL, "launches")),
    Target(_REF32, _EAGER, ">=", 20, "x", (_against, _REF32, _BOTH, BASELINE)),
    Target(_REF32, _COMPILED, ">=", 4, "x", (_against, _REF32, _BOTH, COMPILED)),
    Target(_REF32, "memory against eager", "<=", 1 / 40, "", (_against, _REF32, _MEMORY, BASELINE)),
    Target("accuracy", "error as a share of what the rule allows, J 17", "<=", 1, "", (_accuracy, 17)),
    Target("training", "ViT-L/14 MFU", ">=", 45, " %", (_largest, "mfu", "vit_large")),
    Target("training", "ViT-L/14 MFU, goal", ">=", 50, " %", (_largest, "mfu", "vit_large")),
    Target("training", "ViT-giant MFU", ">=", 50, " %", (_largest, "mfu", "vit_giant")),
    Target("training", "ViT-gigantic MFU, goal", ">=", 55, " %", (_largest, "mfu", "vit_gigantic")),
    Target("training", "checkpoint stall", "<=", 1, " steps", (_largest, "checkpoint_stall_steps", None, 1)),
    # FSDP2 gathers position embeddings in bf16, so between blocks it has bf16, DDP float32.
    Target("training", "FSDP2 against DDP, one GPU", ">=", 99, " %", (_pair, "strategy", "fsdp", "ddp")),
    Target("training", "ViT-S/16 from files", ">=", 97, " %", (_pair, "loader", True, False, _S16)),
    Target("training", "ViT-gigantic on one GPU, loss after / before", "<", 1, "", (_gigantic_trains,)),
    Target("training", "SIGReg's share of the step", "<", 1, " %", (_largest, "sigreg_share")),
    Target("training", "planned memory, off by", "<=", 10, " %", (_planned_memory,)),
    *(
        Target(f"loader on a {place}", f"speed against {other}", ">=", least, "x", (_faster, other))
        for place, least in _PLACES.items()
        for other in (_V2, f"{_V2}, tensors")
    ),
    *(
        Target(f"loader on a {place}", "memory, largest / smallest epoch", "<=", 1.05, "", (_growth,))
        for place in _PLACES
    ),
    Target("loader on a GPU", "share of DALI's decoder", ">=", 60, " %", (_faster, _DALI, "speed", 100)),
    Target("loader, peers", f"speed against {_STABLE}", ">=", 10, "x", (_faster, _STABLE, "peers")),
)


def judge(rows: Sequence[Row], *cases: str) -> list[Row]:
    """A row for each target of these cases: figure and whether it is met, or why there is none."""
    judged: list[Row] = []
    for case, name, relation, bound, unit, (read, *arguments) in TARGETS:
        if case not in cases:
            continue
        row: Row = {"case": case, "target": f"{case}: {name}", "goal": f"{relation} {bound:g}{unit}"}
        row |= {"unit": unit, "figure": None, "met": None, "note": ""}
        try:
            if any(r.get("rehearsal") for r in rows):
                raise NotMeasuredError("this was a rehearsal")
            row["figure"] = read(rows, *arguments)
            row["met"] = _COMPARE[relation](row["figure"], bound)
        except NotMeasuredError as why:
            row["note"] = str(why)
        judged.append(row)
    return judged


def print_judged(judged: Sequence[Row]) -> None:
    """Print a table of target, goal, figure and whether it is met or why there is no figure."""
    cells = []
    for row in judged:
        figure = "-" if row["figure"] is None else f"{row['figure']:.3g}{row['unit']}"
        met = {True: "met", False: "NOT MET", None: f"not measured: {row['note']}"}[row["met"]]
        cells.append([row["target"], row["goal"], figure, met])
    print_table(["target", "goal", "figure", "met or not"], cells)
