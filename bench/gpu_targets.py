"""The targets of a GPU, and what the rows of a run say about them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import accuracy_bench
from sigreg_variants import BASELINE, COMPILED, GRAPH, REDUCED, TRITON

Row = dict[str, Any]
_COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


_REF, _REF32, _GIANT, _MINIMAL = (
    "reference-bfloat16",
    "reference-float32",
    "giant-bfloat16",
    "minimal-float32",
)


ACCURACY = "accuracy"
FILES = ("sigreg.jsonl", "sigreg_accuracy.jsonl")


class NotMeasuredError(Exception):
    """Why a target has no figure."""


class Figure(NamedTuple):
    """What was measured for a target, and what else a reader should know."""

    value: float
    note: str = ""


class Target(NamedTuple):
    """One line of the table.

    Attributes:
        case: key of the benchmark's case that it is read from, or `ACCURACY`.
        name: what is measured.
        relation, bound, unit: the figure is held to `relation bound`; None: it is enough that it exists.
        figure: from the rows of `FILES`; raises `NotMeasuredError`.
    """

    case: str
    name: str
    relation: str | None
    bound: float
    unit: str
    figure: Callable[[Sequence[Row]], Figure]

    @property
    def goal(self) -> str:
        return "runs" if self.relation is None else f"{self.relation} {self.bound:g}{self.unit}"


def find(rows: Sequence[Row], case: str, dtype: str, variant: str, **more: Any) -> Row:
    """The newest row of a variant that ran and was right."""
    wanted = {"case": case, "dtype": dtype, "variant": variant, "directions": "drawn", **more}
    found = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    if not found:
        raise NotMeasuredError(f"no row of {variant}")
    if not found[-1]["correct"]:
        raise NotMeasuredError(f"{variant}: {found[-1].get('problem', 'not correct')}")
    return found[-1]


def find_pair(
    rows: Sequence[Row], case: str, dtype: str, other: str, variant: str = TRITON
) -> tuple[Row, Row]:
    """The row of one of ours, and that of another variant which took turns with it."""
    theirs = find(rows, case, dtype, other)
    return find(rows, case, dtype, variant, group=theirs.get("group")), theirs


def _get(row: Mapping[str, Any], *keys: str) -> float:
    value: Any = row
    for key in keys:
        if key not in value:
            raise NotMeasuredError(f"{row['variant']}: {key} was not measured")
        value = value[key]
    return value


def _speed(case: str, dtype: str, other: str, phase: str = "forward_backward") -> Callable[..., Figure]:
    def figure(rows: Sequence[Row]) -> Figure:
        ours, theirs = find_pair(rows, case, dtype, other)
        mine, its = _get(ours, phase, "median_ms"), _get(theirs, phase, "median_ms")
        return Figure(its / mine, f"{mine:.3g} ms against {its:.3g} ms")

    return figure


def _against_reduced(rows: Sequence[Row]) -> Figure:
    """Graph against graph, by wall clock; the eager module's own figure beside it."""
    ours, theirs = find_pair(rows, "minimal", "float32", REDUCED, GRAPH)
    mine, its = _get(ours, "wall", "median_ms"), _get(theirs, "wall", "median_ms")
    try:
        eager = _get(find_pair(rows, "minimal", "float32", REDUCED)[0], "wall", "median_ms")
        note = f"; without a graph {its / eager:.2g}x"
    except NotMeasuredError:
        note = ""
    return Figure(its / mine, f"graph replay {mine:.3g} ms against {its:.3g} ms{note}")


def _memory(case: str, dtype: str) -> Callable[..., Figure]:
    def figure(rows: Sequence[Row]) -> Figure:
        ours, theirs = find_pair(rows, case, dtype, BASELINE)
        mine, its = _get(ours, "peak_extra_mib"), _get(theirs, "peak_extra_mib")
        return Figure(mine / its, f"{mine:.0f} MiB against {its:.0f} MiB")

    return figure


def _share(case: str) -> Callable[..., Figure]:
    def figure(rows: Sequence[Row]) -> Figure:
        row = find(rows, case, "bfloat16", TRITON)
        share, floor = _get(row, "share_of_floor"), _get(row, "floor_ms")
        note = f"floor {floor:.3g} ms, {_get(row, 'serial_floor_ms'):.3g} ms if nothing overlaps"
        try:
            given = find(rows, case, "bfloat16", TRITON, directions="given")
            note += f"; {100 * _get(given, 'share_of_floor'):.0f} % with given directions"
        except NotMeasuredError:
            pass
        return Figure(100 * share, note)

    return figure


def _giant_time(rows: Sequence[Row]) -> Figure:
    row = find(rows, "giant", "bfloat16", TRITON)
    try:
        other = _get(find(rows, "giant", "bfloat16", BASELINE), "forward_backward", "median_ms")
        note = f"the authors' formulation needs {other:.3g} ms"
    except NotMeasuredError as why:
        note = str(why)
    return Figure(_get(row, "forward_backward", "median_ms"), note)


def _giant_memory(rows: Sequence[Row]) -> Figure:
    return Figure(_get(find(rows, "giant", "bfloat16", TRITON), "peak_extra_mib") / 1024)


def _launches(rows: Sequence[Row]) -> Figure:
    row = find(rows, "minimal", "float32", TRITON)
    kernels = row.get("kernels", {})
    names = ", ".join(f"{count} {name[:30]}" for name, count in list(kernels.items())[:12])
    return Figure(_get(row, "launches"), names)


def _graph(rows: Sequence[Row]) -> Figure:
    row = find(rows, "minimal", "float32", GRAPH)
    return Figure(
        _get(row, "forward_backward", "median_ms"), f"error {row['relative_error']:.1e} after replay"
    )


def _accuracy(rows: Sequence[Row]) -> Figure:
    """The largest share of the error that the rule allows, over all rows that it holds for.

    A part of the rows can show that the target is missed, but not that it is met.
    """
    wanted = {(variant.name, J) for variant, J in accuracy_bench.cases("cuda")}
    measured = {(row["variant"], row["J"]): row for row in rows if "judged" in row}
    found = {case: row for case, row in measured.items() if case in wanted}
    shares = {f"{name}, J {J}": row["share_of_allowed"] for (name, J), row in found.items() if row["judged"]}
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is None or (len(found) < len(wanted) and shares[worst] <= 1):
        raise NotMeasuredError(f"{len(found)} of {len(wanted)} rows of accuracy_bench.py")
    return Figure(shares[worst], f"{worst}, the worst of {len(shares)}")


TARGETS = (
    Target(_REF, "speed against eager", ">=", 40, "x", _speed("reference", "bfloat16", BASELINE)),
    Target(_REF, "speed against torch.compile", ">=", 8, "x", _speed("reference", "bfloat16", COMPILED)),
    Target(_REF, "memory against eager", "<=", 1 / 40, "", _memory("reference", "bfloat16")),
    Target(_REF, "share of the floor", ">=", 50, " %", _share("reference")),
    Target(_GIANT, "time", None, 0, " ms", _giant_time),
    Target(_GIANT, "extra memory", "<", 2, " GiB", _giant_memory),
    Target(_GIANT, "share of the floor", ">=", 50, " %", _share("giant")),
    Target(_MINIMAL, "speed against eager", ">=", 4, "x", _speed("minimal", "float32", BASELINE, "wall")),
    Target(_MINIMAL, "speed against reduce-overhead", ">=", 2, "x", _against_reduced),
    Target(_MINIMAL, "launches, with directions", "<=", 6, "", _launches),
    Target(_MINIMAL, "replay of a CUDA graph", None, 0, " ms", _graph),
    Target(_REF32, "speed against eager", ">=", 20, "x", _speed("reference", "float32", BASELINE)),
    Target(_REF32, "speed against torch.compile", ">=", 4, "x", _speed("reference", "float32", COMPILED)),
    Target(_REF32, "memory against eager", "<=", 1 / 40, "", _memory("reference", "float32")),
    Target(ACCURACY, "error as a share of what the rule allows", "<=", 1, "", _accuracy),
)


def judge(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[Row]:
    """A row for each target: figure and whether it is met, or the reason why there is none."""
    judged = []
    for target in targets:
        row: Row = {"target": f"{target.case}: {target.name}", "goal": target.goal, "unit": target.unit}
        row |= {"figure": None, "met": None, "reason": None}
        try:
            if any(r.get("rehearsal") for r in rows):
                raise NotMeasuredError("this was a rehearsal")
            figure = target.figure(rows)
            met = target.relation is None or _COMPARE[target.relation](figure.value, target.bound)
            row |= {"figure": figure.value, "met": met, "note": figure.note}
        except NotMeasuredError as why:
            row["reason"] = str(why)
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
