"""The command for a GPU machine: its stages, their limits, and what it says about the targets."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import accuracy_bench
import gpu_check
import gpu_targets
import pytest
import sigreg_variants
import torch
from sigreg_variants import BASELINE, COMPILED, GRAPH, REDUCED, TRITON

SCRIPT = Path(gpu_check.__file__)


def execute(code, limit=60.0):
    return gpu_check.execute(["-u", "-c", code], limit, {"PATH": "/usr/bin:/bin"}, Path.cwd())


# --- The whole command ----------------------------------------------------------------------------


def test_rehearsal_runs_every_stage(tmp_path):
    """The kernels run in the interpreter: this is what a GPU machine calls, as far as a CPU goes."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "rows"), "--rehearse"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows" / "gpu_check.jsonl").read_text().splitlines()]
    assert all(row["rehearsal"] for row in rows if row["benchmark"] == "gpu_check")
    stages = {row["stage"]: row["status"] for row in rows if "stage" in row}
    assert set(stages.values()) <= {"ok", "absent"}
    assert stages["kernel tests"] == stages["sigreg, all cases"] == "ok"
    assert {"environment", "kernel tests", "pretraining, 50 steps"} < set(stages)
    targets = {row["target"]: row["met"] for row in rows if "target" in row}
    assert targets == {f"{t.case}: {t.name}": None for t in gpu_targets.TARGETS}
    smoke = next(row for row in rows if row["benchmark"] == "pretrain_smoke")
    assert (smoke["steps"], smoke["problem"], len(smoke["losses"])) == (2, None, 2)
    measured = [json.loads(line) for line in (tmp_path / "rows" / "sigreg.jsonl").read_text().splitlines()]
    triton = [row for row in measured if row["variant"] == TRITON]
    assert triton
    for row in triton:
        assert row["correct"]
        assert row["kernels"]["_sigreg_fwd_kernel"] == 1, "launches are counted"
    assert "not measured" in run.stdout


def test_the_trainer_is_measured_without_tyro(tmp_path):
    """A GPU machine may lack it: the package need not be installed there."""
    code = (
        "import sys; sys.modules['tyro'] = None\n"
        "import pretrain_smoke; assert pretrain_smoke.main() == 0\n"
        "import train_case; assert train_case.Case('test_vit', 16).config(None).model.name == 'test_vit'"
    )
    options = ["--out", str(tmp_path), "--rehearse", "--steps", "1", "--device", "cpu", "--impl", "torch"]
    run = subprocess.run(
        [sys.executable, "-c", code, *options], capture_output=True, text=True, check=False, cwd=SCRIPT.parent
    )
    assert run.returncode == 0, run.stderr
    assert "1 steps through the Trainer: tyro is not installed, SIGReg torch: ok" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: PyTorch finds no GPU here")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_an_output_folder_that_cannot_be_is_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert gpu_check.main(["--out", str(tmp_path / "file" / "rows"), "--rehearse"]) == 2
    assert capsys.readouterr().err.startswith("error: --out: cannot write to")


# --- Stages ---------------------------------------------------------------------------------------


def test_lines_are_passed_on_and_a_failure_is_told(capfd):
    outcome = execute("print('one'); raise ValueError('broken')")
    assert outcome.status == "failed"
    assert outcome.problem == "exit code 1: ValueError: broken"
    assert "  one" in capfd.readouterr().out.splitlines()
    assert execute("pass").status == "ok"


def test_a_stage_that_overruns_is_stopped_with_all_its_processes(tmp_path):
    note = tmp_path / "pid"
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(note)!r}).write_text(str(child.pid))
time.sleep(60)
"""
    outcome = execute(code, limit=3.0)
    assert (outcome.status, outcome.problem) == ("stopped", "not done after 3 s")
    child = Path("/proc", note.read_text())
    for _ in range(50):
        if not child.exists() or "State:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the process that the stage had started lives on")


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A check of small stages; the path of the process as it was afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(minutes, only=None):
        run = gpu_check.Run(tmp_path / "rows", False)
        return gpu_check.Check(run, minutes, tmp_path / f"folder{minutes}", time.monotonic(), only)

    monkeypatch.setattr(gpu_check, "link_checkout", lambda site: site.mkdir(parents=True))
    return make


def stage(name, code, seconds=60, cases=()):
    return gpu_check.Stage(name, seconds, lambda run: ["-c", code], cases)


def test_later_stages_run_after_a_failure_and_the_exit_code_tells(check, tmp_path, capfd):
    (tmp_path / "folder9.0").mkdir()
    nine = check(9.0)
    for each in (stage("good", "pass"), stage("bad", "raise SystemExit(3)"), stage("last", "pass")):
        nine.carry_out(each)
    nine.carry_out(gpu_check.Stage("later", 60, gpu_check._script("no_such_bench.py")))
    statuses = [outcome.status for outcome in nine.outcomes.values()]
    assert statuses == ["ok", "failed", "ok", "absent"]
    assert nine.summarise() == 1
    assert "later: no bench/no_such_bench.py in this checkout" in capfd.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows" / "gpu_check.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["good", "bad", "last", "later"]
    assert rows[1]["problem"].startswith("exit code 3")
    del nine.outcomes["bad"]
    assert nine.summarise() == 0, "what is absent is no failure"


def test_nothing_begins_when_the_time_is_up(check, tmp_path):
    (tmp_path / "folder0.01").mkdir()
    late = check(0.01)
    late.carry_out(stage("late", "pass", cases=("giant-bfloat16",)))
    assert late.outcomes["late"].status == "skipped"
    assert {row["met"] for row in late.judged} == {None}
    assert late.judged[0]["reason"] == f"no row of {TRITON}"
    assert late.summarise() == 1


def test_one_stage_alone_has_all_the_minutes_and_its_targets_decide(check, tmp_path, monkeypatch):
    (tmp_path / "folder9.0").mkdir()
    alone = check(9.0, only="training")
    (training,) = alone.stages()
    assert 515 < training.seconds <= 520

    def run(arguments, limit, environment, folder):
        assert Path(arguments[0]).name == "train_bench.py"
        minutes = float(arguments[arguments.index("--budget-minutes") + 1])
        assert 8.2 < minutes < 8.5
        target = {"kind": "target", "target": "x", "goal": ">= 1", "figure": 0.5, "unit": "", "note": ""}
        rows = [{"kind": "GPU", **alone.about}, {**target, "met": False, "reason": None, **alone.about}]
        alone.lib.append_rows(tmp_path / "rows" / "train.jsonl", rows)
        return gpu_check.Outcome("ok", 500.0)

    monkeypatch.setattr(gpu_check, "execute", run)
    alone.carry_out(training)
    assert [row["target"] for row in alone.judged] == ["x"]
    assert alone.summarise() == 1
    alone.judged[0]["met"] = True
    assert alone.summarise() == 0


def test_stages_fit_the_files_and_the_time(monkeypatch):
    stages = {s.name: s for s in gpu_check.STAGES}
    assert len(stages) == len(gpu_check.STAGES)
    keys = {case.key for case in sigreg_variants.GPU_CASES} | {gpu_targets.ACCURACY}
    run_cases = {case for s in gpu_check.STAGES for case in s.cases}
    assert {t.case for t in gpu_targets.TARGETS} <= run_cases <= keys
    assert {t.case for t in gpu_targets.TARGETS} == {
        c for s in stages.values() if not s.optional for c in s.cases
    }
    optional = [s.optional for s in gpu_check.STAGES]
    assert optional == sorted(optional), "what must be done comes first"
    run = gpu_check.Run(Path("x"), False)
    names = {Path(argument).name for argument in stages["kernel tests"].command(run)}
    assert {"kernel_operators.py", "kernel_accuracy.py", "test_kernels_gpu.py"} <= names
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert "hypothesis is not installed" in stages["generated cases"].command(run)


def test_a_stage_that_overruns_leaves_their_seconds_to_those_that_must_run(check, tmp_path):
    (tmp_path / "folder9.0").mkdir()
    nine = check(9.0)
    must = [s for s in gpu_check.STAGES if not s.optional]
    left = 60 * 9 - gpu_check.LAST_SECONDS
    assert sum(s.seconds for s in must) <= left
    for number, each in enumerate(gpu_check.STAGES):
        limit = nine.limit(each, left, gpu_check.STAGES[number + 1 :])
        assert limit >= each.seconds or each.optional
        left -= limit
    assert left >= 0
    first, second = must[0]._replace(seconds=30), must[1]._replace(seconds=60)
    assert nine.limit(first, 300.0, [second]) == 60, "what others left, but not all of it"
    assert nine.limit(first, 45.0, [second]) == 15, "a share where there is too little"


def test_an_optional_stage_may_lack_time_but_not_fail(check, tmp_path):
    (tmp_path / "folder9.0").mkdir()
    nine = check(9.0)
    nine.outcomes = {"environment": gpu_check.Outcome("ok", 1.0)}
    for status, code in (("stopped", 0), ("skipped", 0), ("failed", 1)):
        nine.outcomes["sanitizer"] = gpu_check.Outcome(status, 1.0)
        assert nine.summarise() == code
    del nine.outcomes["sanitizer"]
    nine.outcomes["accuracy"] = gpu_check.Outcome("stopped", 1.0)
    assert nine.summarise() == 1


def test_parallel_tests_share_all_tests_and_tell_what_fails(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pathlib, pytest\n"
        "@pytest.mark.parametrize('i', range(30))\n"
        f"def test_it(i):\n    pathlib.Path({str(tmp_path)!r}, f'ran{{i}}').touch(exist_ok=False)\n"
        "    assert i != 7, 'seven is broken'\n"
    )
    script = str(SCRIPT.parent / "parallel_tests.py")
    command = [sys.executable, script, str(tmp_path / "test_some.py"), "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 1
    assert "seven is broken" in run.stdout
    assert len(list(tmp_path.glob("ran*"))) == 30
    none = subprocess.run([*command, "-k", "none"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert none.returncode == 5


# --- Targets --------------------------------------------------------------------------------------


def row(variant, case="reference", dtype="bfloat16", ms=1.0, mib=100.0, **changes):
    figure = {"median_ms": ms}
    base = {"variant": variant, "case": case, "dtype": dtype, "directions": "drawn", "correct": True}
    base |= {"forward_backward": figure, "wall": {"median_ms": 2 * ms}, "peak_extra_mib": mib}
    return base | {"relative_error": 1e-7, **changes}


def judged(rows):
    return {r["target"]: r for r in gpu_targets.judge(rows)}


def test_targets_are_met_or_not_by_their_bounds():
    rows = [row(BASELINE, ms=8.0, mib=8000.0), row(COMPILED, ms=1.0)]
    rows.append(row(TRITON, ms=0.2, mib=200.0, share_of_floor=0.4, floor_ms=0.08, serial_floor_ms=0.15))
    found = judged(rows)
    speed = found["reference-bfloat16: speed against eager"]
    assert (speed["figure"], speed["met"]) == (pytest.approx(40), True)
    compiled = found["reference-bfloat16: speed against torch.compile"]
    assert (compiled["figure"], compiled["met"]) == (pytest.approx(5), False)
    memory = found["reference-bfloat16: memory against eager"]
    assert (memory["figure"], memory["met"]) == (pytest.approx(1 / 40), True)
    share = found["reference-bfloat16: share of the floor"]
    assert (share["figure"], share["met"]) == (pytest.approx(40), False)
    cells = gpu_targets.table_of(gpu_targets.judge(rows))
    assert ["reference-bfloat16: speed against torch.compile", ">= 8x", "5x", "NOT MET"] in cells


def test_ratios_are_of_figures_that_took_turns():
    """The clock of the device fell between the groups; each ratio stays in one."""
    rows = [row(BASELINE, ms=8.0, group=0), row(TRITON, ms=0.2, mib=200.0, group=0)]
    rows += [row(COMPILED, ms=3.2, group=1), row(TRITON, ms=0.4, group=1)]
    found = judged(rows)
    assert found["reference-bfloat16: speed against eager"]["figure"] == pytest.approx(40)
    assert found["reference-bfloat16: speed against torch.compile"]["figure"] == pytest.approx(8)
    stopped = judged(rows[:2])
    assert stopped["reference-bfloat16: speed against eager"]["met"]
    assert stopped["reference-bfloat16: speed against torch.compile"]["reason"] == f"no row of {COMPILED}"


def test_the_minimal_size_is_judged_by_wall_clock_and_launches():
    rows = [row(v, "minimal", "float32", ms) for v, ms in ((BASELINE, 8.0), (REDUCED, 3.0), (GRAPH, 1.0))]
    rows.append(row(TRITON, "minimal", "float32", 2.0, launches=7, kernels={"_fwd": 7}))
    rows[0]["wall"] = {"median_ms": 6.0}
    found = judged(rows)
    assert found["minimal-float32: speed against eager"]["figure"] == pytest.approx(6.0 / 4.0)
    reduced = found["minimal-float32: speed against reduce-overhead"]
    assert (reduced["figure"], reduced["met"]) == (pytest.approx(3), True)
    assert "without a graph 1.5x" in reduced["note"]
    launches = found["minimal-float32: launches, with directions"]
    assert (launches["met"], launches["note"]) == (False, "7 _fwd")
    assert found["minimal-float32: replay of a CUDA graph"]["met"]


def test_accuracy_is_judged_by_the_worst_row_that_the_rule_holds_for():
    cases = accuracy_bench.cases("cuda")
    rows = [
        {"variant": v.name, "J": J, "judged": v.judged, "share_of_allowed": 0.5 if v.judged else None}
        for v, J in cases
    ]
    count, held = len(rows), sum(v.judged for v, _ in cases)
    last = max(number for number, (v, _) in enumerate(cases) if v.judged)
    of_last = f"{cases[last][0].name}, J {cases[last][1]}"

    def found(rows):
        return judged(rows)["accuracy: error as a share of what the rule allows"]

    rows[last]["share_of_allowed"] = 0.75
    whole = found([row(TRITON), *rows])
    assert (whole["figure"], whole["met"]) == (0.75, True)
    assert whole["note"] == f"{of_last}, the worst of {held}"
    # A stage that was stopped: what is missing may be worse.
    for part in (rows[:-1], rows[1:], rows[:1], []):
        stopped = found([*part, *part[:1]])
        assert (stopped["figure"], stopped["met"]) == (None, None)
        assert stopped["reason"] == f"{len(part)} of {count} rows of accuracy_bench.py"
    rows[last]["share_of_allowed"] = 2
    for part in (rows, rows[last:]):
        beyond = found(part)
        assert (beyond["figure"], beyond["met"]) == (2, False)


def test_what_has_no_figure_says_why():
    lost = {"correct": False, "problem": "does not fit: needs about 80 GiB"}
    rows = [row(BASELINE, "giant", **lost), row(TRITON, "giant", ms=4.0, mib=1024.0)]
    found = judged(rows)
    assert found["giant-bfloat16: time"]["met"]
    assert "does not fit" in found["giant-bfloat16: time"]["note"]
    assert found["giant-bfloat16: extra memory"]["figure"] == 1
    assert (
        found["giant-bfloat16: share of the floor"]["reason"] == f"{TRITON}: share_of_floor was not measured"
    )
    wrong = row(TRITON, "giant", correct=False, problem="WRONG (error 1)")
    assert judged([rows[0], wrong])["giant-bfloat16: time"]["reason"] == f"{TRITON}: WRONG (error 1)"
    assert judged([r | {"rehearsal": True} for r in rows])["giant-bfloat16: time"]["met"] is None
