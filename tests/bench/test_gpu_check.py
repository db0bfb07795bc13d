"""The command for a GPU machine: its stages, their limits, and what counts as a failure."""

import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import accuracy_bench
import benchlib
import gpu_check
import pytest
import sigreg_variants
import targets
import torch
from gpu_check import STAGES, Outcome, Stage
from sigreg_variants import TRITON

SCRIPT = str(gpu_check.__file__)
BY_NAME = {stage.name: stage for stage in STAGES}


@pytest.mark.slow
def test_a_rehearsal_runs_its_stages(tmp_path):
    """The kernels run in the interpreter: this is what a GPU machine calls, as far as a CPU goes."""
    command = [sys.executable, SCRIPT, "--out", str(tmp_path / "rows"), "--rehearse"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr
    rows = benchlib.read_rows(tmp_path / "rows" / "gpu_check.jsonl")
    stages = {row["stage"]: row["status"] for row in rows if "stage" in row}
    assert stages == {stage.name: "ok" for stage in gpu_check.REHEARSAL}
    met = {row["met"] for row in rows if "target" in row}
    assert met == {None}, "a rehearsal measures nothing"
    (smoke,) = benchlib.read_rows(tmp_path / "rows" / "train.jsonl")
    assert smoke["rehearsal"]
    assert "error" not in smoke
    measured = benchlib.read_rows(tmp_path / "rows" / "sigreg.jsonl")
    assert {row["correct"] for row in measured if row["variant"] == TRITON} == {True}
    assert "not measured" in run.stdout


def test_wrong_usage_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--out", str(tmp_path / "none")], "error: PyTorch finds no GPU here"),
        (["--out", str(tmp_path / "file" / "rows"), "--rehearse"], "error: --out: cannot write to"),
    ):
        assert gpu_check.main(arguments) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(message)
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--cache", str(tmp_path)])
    assert "--cache: expected a folder that bake_cache.py has filled, got" in capsys.readouterr().err


def test_a_stage_that_overruns_is_stopped_with_all_its_processes(tmp_path):
    note = tmp_path / "pid"
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(note)!r}).write_text(str(child.pid))
time.sleep(60)
"""
    outcome = gpu_check.execute(["-c", code], 3.0, {"PATH": "/usr/bin:/bin"}, tmp_path)
    assert (outcome.status, outcome.problem) == ("stopped", "not done after 3 s")
    child = Path("/proc", note.read_text())
    for _ in range(50):
        if not child.exists() or "State:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the process that the stage had started lives on")


@pytest.fixture
def writer(tmp_path):
    return benchlib.Rows(tmp_path / "rows" / "gpu_check.jsonl", "gpu_check")


def stage(name, code, part=1, **more):
    return Stage(name, part, 60, ("-c", code), **more)


def test_later_stages_run_after_a_failure_and_one_that_wrote_no_row_has_failed(writer):
    stages = (
        stage("good", "pass"),
        stage("bad", "raise SystemExit(3)"),
        stage("silent", "pass", rows="sigreg.jsonl"),
        stage("absent", "pass", needs="no_such_program"),
        stage("no module", "pass", needs="json.no_such_module"),
        stage("no package", "pass", needs="no_such_package.module"),
    )
    gpu_check.run_stages(stages, writer, 540)
    rows = benchlib.read_rows(writer.path)
    assert [(row["stage"], row["status"], row["problem"]) for row in rows] == [
        ("good", "ok", None),
        ("bad", "failed", "exit code 3"),
        ("silent", "failed", "it wrote no row to sigreg.jsonl"),
        ("absent", "absent", "no_such_program is not installed"),
        ("no module", "absent", "json.no_such_module is not installed"),
        ("no package", "absent", "no_such_package.module is not installed"),
    ]


def test_nothing_begins_when_the_time_is_up_and_an_optional_stage_may_lack_time_or_tool(writer):
    late = stage("late", "pass", case="giant-bfloat16")
    outcomes = gpu_check.run_stages([late], writer, 0.6)
    assert outcomes[late].status == "skipped"
    assert gpu_check.summarize(outcomes, writer) == 1
    judged = [row for row in benchlib.read_rows(writer.path) if "target" in row]
    assert {(row["met"], row["note"]) for row in judged} == {(None, f"no row of {TRITON}")}
    outcomes = {late: Outcome("ok", 1.0)}  # what nobody measures is missed, if no other part measures it
    assert gpu_check.summarize(outcomes, writer) == 0
    outcomes |= {other: Outcome("ok", 1.0) for other in STAGES if other.case == late.case}
    assert gpu_check.summarize(outcomes, writer) == 1
    for part, status in itertools.product((1, 3), ("ok", "stopped", "skipped", "absent", "failed")):
        outcomes = {stage("it", "pass", part): Outcome(status, 1.0)}
        wanted = int(status == "failed" or (part == 1 and status != "ok"))
        assert gpu_check.summarize(outcomes, writer) == wanted


@pytest.mark.parametrize(("share", "code"), [(2.0, 1), (0.5, 0)])
def test_a_missed_target_is_exit_code_1(writer, tmp_path, monkeypatch, share, code):
    rows = benchlib.Rows(tmp_path / "rows" / "sigreg_accuracy.jsonl", "sigreg_accuracy")
    measured = accuracy_bench.cases("cuda", [17])
    written = [{"variant": v.name, "J": J, "judged": True, "share_of_allowed": share} for v, J in measured]
    monkeypatch.setattr(gpu_check, "execute", lambda *_: rows.write(*written) and Outcome("ok", 1.0))
    outcomes = gpu_check.run_stages([BY_NAME["accuracy"]], writer, 540)
    assert gpu_check.summarize(outcomes, writer) == code


def test_stages_fit_the_targets_the_files_and_the_time(writer, monkeypatch):
    assert len(BY_NAME) == len(STAGES)
    keys = {case.key for case in sigreg_variants.GPU_CASES} | {"accuracy", ""}
    run_cases = {s.case for s in STAGES}
    # train_bench.py and loader_bench.py judge themselves: optional stages may not measure everything.
    wanted = {t.case for t in targets.TARGETS if not t.case.startswith(("training", "loader"))}
    assert wanted <= run_cases <= keys
    assert not any(s.case for s in STAGES if s.optional)
    for part in (1, 2):
        times = [stage.seconds + gpu_check.GRACE for stage in STAGES if stage.part == part]
        assert sum(times) + gpu_check.LAST_SECONDS <= 60 * gpu_check.PART_MINUTES
    order = [stage.part for stage in STAGES if stage.part < 3]
    assert order == sorted(order)
    names = {Path(argument).name for argument in BY_NAME["kernel tests"].arguments}
    assert {"kernel_operators.py", "kernel_accuracy.py", "test_kernels_gpu.py"} <= names
    commands = []
    execute = lambda command, limit, *_: commands.append(command) or Outcome("ok", limit)  # noqa: E731
    monkeypatch.setattr(gpu_check, "execute", execute)
    gpu_check.run_stages([BY_NAME["training"]], writer, 540)
    assert commands[0][1:] == ["--budget-minutes", "3.80", "--out", str(writer.path.parent)]


def test_a_stage_gets_what_earlier_ones_left_and_takes_nothing_from_later_ones(writer, monkeypatch):
    clock, limits = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def execute(command, limit, *_):
        limits.append(limit)
        clock[0] += limit if command[1] == "overruns" else 10
        return Outcome("ok", limit)

    monkeypatch.setattr(gpu_check, "execute", execute)
    stages = [stage(name, name) for name in ("overruns", "quick", "next")] + [stage("more", "more", 3)]
    gpu_check.run_stages(stages, writer, 4 * 60 + 3 * gpu_check.GRACE + gpu_check.LAST_SECONDS)
    # A minute more than the first three need: the first one takes it, and the rest of the last one.
    assert limits == pytest.approx([120, 65, 120, 110])


def test_kernels_compiled_beforehand_are_taken_and_the_others_counted(writer, tmp_path):
    baked = tmp_path / "baked" / "KEY"
    baked.mkdir(parents=True)
    (baked / "a.cubin").write_bytes(b"code")
    (baked / "__grp__a.json").write_text('{"child_paths": {"a.cubin": "/elsewhere/KEY/a.cubin"}}')
    code = """
import json, os, pathlib
cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"])
((path,),) = [json.loads(p.read_text())["child_paths"].values() for p in cache.glob("*/__grp__*")]
assert pathlib.Path(path).read_bytes() == b"code"
(cache / "NEW").mkdir()
(cache / "NEW" / "b.cubin").touch()
"""
    gpu_check.run_stages([stage("compiles one", code)], writer, 600, baked.parent)
    (row,) = benchlib.read_rows(writer.path)
    assert (row["status"], row["compiled"]) == ("ok", 1)


@pytest.mark.parametrize("kernels", ["_sigreg_fwd_kernel", "nothing was profiled"])
def test_ncu_leaves_a_report_and_must_have_seen_a_kernel(tmp_path, monkeypatch, kernels):
    tool = tmp_path / "ncu"
    tool.write_text(f"#!/bin/sh\necho {kernels}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    code = gpu_check.main(["--ncu", "--out", str(tmp_path / "rows")])
    assert code == int(kernels != "_sigreg_fwd_kernel")
    assert (tmp_path / "rows" / "kernels.txt").read_text() == kernels + "\n"


def test_processes_share_all_tests_and_tell_what_fails(tmp_path, capfd):
    """With the options of the stage. Tests that are all skipped are a failure, too."""
    (tmp_path / "test_some.py").write_text(
        "import pathlib, pytest\n"
        "@pytest.mark.parametrize('i', range(9))\n"
        f"def test_it(i):\n    pathlib.Path({str(tmp_path)!r}, f'ran{{i}}').touch(exist_ok=False)\n"
        "    assert i != 7, 'seven is broken'\n"
    )
    (tmp_path / "test_skipped.py").write_text("import pytest\ndef test_it():\n    pytest.skip('no GPU')\n")
    script, tests, *arguments = BY_NAME["kernel tests"].arguments
    options = [argument for argument in arguments if not argument.endswith(".py")]
    assert (script, tests, options[0]) == (SCRIPT, "--tests", "-q")
    assert gpu_check.main(["--tests", str(tmp_path / "test_skipped.py"), *options]) == 1
    assert gpu_check.main(["--tests", str(tmp_path / "test_some.py"), *options]) == 1
    assert "seven is broken" in capfd.readouterr().out
    assert len(list(tmp_path.glob("ran*"))) == 9


@pytest.mark.slow
@pytest.mark.parametrize(("name", "needs"), [("loader tests", "nvidia.dali"), ("other GPU tests", "")])
def test_without_a_gpu_no_test_of_these_stages_passes(monkeypatch, capfd, name, needs):
    """So the stage of the loader fails where DALI is there, but cannot use the GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    stage = BY_NAME[name]
    assert stage.needs == needs
    assert gpu_check.main([*stage.arguments[1:]]) == 1
    out = capfd.readouterr().out
    assert re.search(r"\d+ skipped", out), out
    assert not re.search(r"\d+ (passed|failed|error)", out), out
