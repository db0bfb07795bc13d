"""The targets: met, missed, or without a figure and why."""

import dataclasses
import math
import re

import accuracy_bench
import pytest
import targets
from loader_bench import DECODED, FALLBACK, OURS, PLAIN, PLAIN_TENSORS, STABLE
from sigreg_variants import BASELINE, COMPILED, GRAPH, REDUCED, TRITON
from train_bench import Case


def verdicts(rows, case):
    """Figure and verdict of each target of a case."""
    found = targets.judge(rows, case)
    return {row["target"].removeprefix(f"{case}: "): (row["figure"], row["met"]) for row in found}


def notes(rows, case):
    return {row["target"].removeprefix(f"{case}: "): row["note"] for row in targets.judge(rows, case)}


def row(variant, case="reference", dtype="bfloat16", ms=1.0, mib=100.0, **changes):
    base = {"variant": variant, "case": case, "dtype": dtype, "correct": True, "group": 0}
    base |= {"forward_backward": {"median_ms": ms}, "wall": {"median_ms": 2 * ms}, "peak_extra_mib": mib}
    return base | changes


def test_targets_are_met_or_not_by_their_bounds(capsys):
    rows = [row(BASELINE, ms=8.0, mib=8000.0), row(TRITON, ms=0.2, mib=200.0, share_of_floor=0.4)]
    # The clock of the device fell between the groups; each ratio stays in one.
    rows += [row(COMPILED, ms=2.0, group=1), row(TRITON, ms=0.4, group=1, share_of_floor=0.4)]
    found = {
        "speed against eager": (pytest.approx(40), True),
        "speed against torch.compile": (pytest.approx(5), False),
        "memory against eager": (pytest.approx(1 / 40), True),
        "time": (pytest.approx(0.4), False),
        "share of the floor": (pytest.approx(40), False),
    }
    assert verdicts(rows, "reference-bfloat16") == found
    targets.print_judged(targets.judge(rows, "reference-bfloat16"))
    assert re.search(r"16: speed against torch.compile +>= 8x +5x +NOT MET", capsys.readouterr().out)
    found |= {"speed against torch.compile": (None, None), "time": (pytest.approx(0.2), True)}
    assert verdicts(rows[:2], "reference-bfloat16") == found
    assert notes(rows[:2], "reference-bfloat16")["speed against torch.compile"] == f"no row of {COMPILED}"
    # The minimal size is judged by wall clock and launches.
    rows = [row(v, "minimal", "float32", ms) for v, ms in ((BASELINE, 3.0), (REDUCED, 3.0), (GRAPH, 1.0))]
    rows.append(row(TRITON, "minimal", "float32", 2.0, launches=7))
    assert verdicts(rows, "minimal-float32") == {
        "speed against eager, wall clock": (pytest.approx(1.5), True),
        "CUDA graph against eager": (pytest.approx(3), False),
        "CUDA graph against reduce-overhead": (pytest.approx(3), True),
        "launches, with directions": (7, False),
    }


@pytest.mark.parametrize("worst", [0.75, 2.0])
def test_accuracy_is_judged_by_the_worst_row_that_the_rule_holds_for(worst):
    """Some rows alone can show that the rule is broken, but not that it holds."""
    rows = [
        {"variant": v.name, "J": J, "judged": v.judged, "share_of_allowed": 0.5 if v.judged else None}
        for v, J in accuracy_bench.cases("cuda", [17])
    ]
    next(row for row in reversed(rows) if row["judged"])["share_of_allowed"] = worst
    for part, verdict in (
        ([row(TRITON), *rows], (worst, worst <= 1)),
        (rows[1:], (None, None) if worst <= 1 else (worst, False)),
        ([], (None, None)),
    ):
        assert [*verdicts(part, "accuracy").values()] == [verdict]


def test_what_has_no_figure_says_why():
    lost = row(BASELINE, "giant", correct=False, problem="does not fit: needs about 80 GiB")
    rows = [lost, row(TRITON, "giant", ms=4.0, mib=1024.0)]
    found = {"time (it runs)": (4, True), "extra memory": (1, True), "share of the floor": (None, None)}
    assert verdicts(rows, "giant-bfloat16") == found
    assert notes(rows, "giant-bfloat16")["share of the floor"] == f"{TRITON}: share_of_floor was not measured"
    wrong = row(TRITON, "giant", correct=False, problem="WRONG (error 1)")
    assert {*notes([wrong], "giant-bfloat16").values()} == {f"{TRITON}: WRONG (error 1)"}
    rehearsed = verdicts([r | {"rehearsal": True} for r in rows], "giant-bfloat16")
    assert {*rehearsed.values()} == {(None, None)}


LARGE, GIGANTIC = Case("vit_large", 128), Case("vit_gigantic", 64)
SMALL = Case("vit_small_patch16_224", 512)
RECOMPUTED = dataclasses.replace(GIGANTIC, activation_checkpointing="full", strategy="fsdp")
TRAINS = "ViT-gigantic on one GPU, loss after / before"


def trained(case, changes=None, **figures):
    usual = {} if "error" in figures else {"peak_memory_gib": 90.0, "images_per_second": 100.0}
    return dataclasses.asdict(case) | usual | (changes or {}) | figures


def test_training_targets():
    rows = [
        trained(LARGE, mfu=0.47, sigreg_share=0.004, checkpoint_stall_steps=1.2),
        trained(LARGE, {"strategy": "ddp"}, mfu=0.46),
        trained(LARGE, {"strategy": "fsdp"}, mfu=0.44, images_per_second=98.0),
        trained(LARGE, {"images": 64, "plan": True}, planned_memory_gib=99.1),
        trained(RECOMPUTED, mfu=0.56, losses=[0.41, 0.39, 0.3, 0.2], sigreg_share=0.002),
        trained(SMALL, images_per_second=5000.0),
        trained(SMALL, {"loader": True}, images_per_second=4800.0, data_wait=0.03),
    ]
    assert verdicts(rows, "training") == {
        "ViT-L/14 MFU": (pytest.approx(47), True),
        "ViT-L/14 MFU, goal": (pytest.approx(47), False),
        "ViT-giant MFU": (None, None),
        "ViT-gigantic MFU, goal": (pytest.approx(56), True),
        "checkpoint stall": (pytest.approx(1.2), False),
        "FSDP2 against DDP, one GPU": (pytest.approx(98), False),
        "ViT-S/16 from files": (pytest.approx(96), False),
        TRAINS: (pytest.approx(0.625), True),
        "SIGReg's share of the step": (pytest.approx(0.4), True),
        "planned memory, off by": (pytest.approx(100 * 9.1 / 90), False),
    }
    for case, figures, note in (
        (RECOMPUTED, {"error": "out of memory"}, "out of memory"),
        (RECOMPUTED, {"losses": [0.4, math.nan, 0.2]}, "the loss is not finite"),
        (GIGANTIC, {"losses": [0.4, 0.3, 0.2]}, "no row with losses"),  # the claim is about recomputation
    ):
        rows = [trained(case, **figures)]
        assert verdicts(rows, "training")[TRAINS][1] is None
        assert notes(rows, "training")[TRAINS] == note


@pytest.mark.parametrize(("case", "least"), [("loader on a CPU", 5), ("loader on a GPU", 8)])
@pytest.mark.parametrize("met", [True, False])
def test_loader_targets(case, least, met):
    plain = {"kind": "speed", "images_per_s": 100.0 if met else 100.5}
    rows = [{**plain, "contender": name} for name in (PLAIN, PLAIN_TENSORS)]
    ours = {OURS: 100.0 * least, DECODED: (166 if met else 167) * least}
    rows += [{**plain, "contender": name, "images_per_s": speed} for name, speed in ours.items()]
    rows += [{"kind": "memory", "contender": k, "growth": 1.04 if met else 1.06} for k in (OURS, FALLBACK)]
    assert {verdict for _, verdict in verdicts(rows, case).values()} == {met}
    speeds = {OURS: 500.0, STABLE: 50.0 if met else 50.1}
    peers = [{"kind": "peers", "contender": name, "images_per_s": speed} for name, speed in speeds.items()]
    assert [verdict for _, verdict in verdicts(peers, "loader, peers").values()] == [met]
