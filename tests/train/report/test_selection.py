"""Reading run folders, which runs are compared, and C(alpha)."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from run_folders import write_run

from lejepa_fast.errors import UsageError
from lejepa_fast.train import select_runs
from lejepa_fast.train.config import from_dict
from lejepa_fast.train.report import run_plots
from lejepa_fast.train.report.runs import loss_at_the_end, read_run, series
from lejepa_fast.train.report.selection import LOSS, NEITHER, RANKME, correlate, score, select, spearman

ON = {"evaluation_data": "birds", "val_images": 80, "image_size": 48, "embedding_dim": 64}


def config_of(lambd=0.1, **changes):
    return from_dict({"loss": {"lambd": lambd}, "optim": {"lr": 1e-3, "weight_decay": 0.05}, **changes})


@pytest.fixture
def make(tmp_path):
    """Writes a finished run, run0, run1 ..., and reads it."""

    def write(lambd=0.1, loss=1.0, *, steps=20, changes=None, **summary):
        folder, summary = tmp_path / f"run{len(list(tmp_path.iterdir()))}", {"rankme": 9.0} | ON | summary
        write_run(folder, config_of(lambd, **(changes or {})), [loss] * 20, steps=steps, **summary)
        return read_run(folder)

    return write


def order(chosen):
    """Numbers of the runs, the best first."""
    return [int(Path(row["run"]).name.removeprefix("run")) for row in chosen["runs"]]


def column(chosen, key):
    return [row[key] for row in chosen["runs"]]


# ---- run folders ---------------------------------------------------------------------------------


def test_the_loss_at_the_end_is_a_mean_over_the_last_tenth_of_the_steps_and_five_rows_at_least():
    rows = [{"kind": "train", "step": step, "loss": float(step)} for step in range(10, 1001, 10)]
    assert loss_at_the_end(rows) == np.mean(range(910, 1001, 10))
    assert loss_at_the_end(rows[:20]) == np.mean(range(160, 201, 10))  # a tenth has 2 rows
    losses = ((3, 1.0), (2, 5.0), (3, 2.0), (4, None), (5, math.inf))  # of two rows of a step, the later
    gaps = [{"kind": "train", "step": step, "loss": loss} for step, loss in losses]
    steps, values = series([*gaps, {"kind": "eval", "step": 5, "loss": 9.0}], "train", "loss")
    assert (steps.tolist(), values.tolist()) == ([2, 3], [5.0, 2.0])
    assert loss_at_the_end(gaps) == 3.5


def test_a_folder_says_what_is_wrong_with_it(tmp_path):
    with pytest.raises(UsageError, match=rf"^{tmp_path}: expected a run folder"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match=r"empty: metrics\.jsonl: expected rows .* 'loss'"):
        read_run(write_run(tmp_path / "empty", config_of(), [None]))
    broken = write_run(tmp_path / "broken", config_of(), [1.0], knn_trained=50.0)
    for text, problem in (("{", r"cannot read report/summary\.json \(it is not JSON\)"), ("[1]", r".*\[1\]")):
        (broken / "report" / "summary.json").write_text(text)
        with pytest.raises(UsageError, match=rf"broken: {problem}"):
            read_run(broken)


def test_a_report_of_fewer_steps_is_not_that_of_the_run(tmp_path):
    folder = write_run(tmp_path / "run", config_of(), [1.0, 2.0], knn_trained=50.0)
    finished = read_run(folder)
    assert (finished.figure("knn_trained"), finished.state) == (50.0, "healthy")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "loss": 1.0, "prediction": 1.0, "sigreg": 1.0}\n')
    continued = read_run(folder)
    assert (continued.steps, continued.state) == (3, "unfinished")
    assert math.isnan(continued.figure("knn_trained"))


# ---- which rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": {"lr": 0.1, "weight_decay": 0.5}},
        {"loss": {"lambd": 0.5, "num_slices": 7, "impl": "torch"}},
        {"model": {"drop_path": 0.1}, "data": {"workers": 3}},
    ],
)
def test_losses_of_one_scale_are_compared(make, changes):
    chosen = select([make(), make(changes=changes)])
    assert (chosen["rule"], chosen["warning"], column(chosen, "group")) == (LOSS, None, [0, 0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"changes": {"loss": {"form": "additive"}}}, "loss.form"),
        ({"changes": {"loss": {"n_points": 9}}}, "loss.n_points"),
        ({"changes": {"loss": {"center_from": "average"}}}, "loss.center_from"),
        ({"changes": {"data": {"batch_size": 64}}}, "data.batch_size"),
        ({"changes": {"crops": {"local_crops": 2}}}, "crops.local_crops"),
        ({"steps": 40}, "steps"),
    ],
)
def test_other_losses_are_other_groups_and_rankme_compares_them(make, changes, named):
    """The worse by loss is the better by RankMe."""
    chosen = select([make(loss=1.0), make(loss=2.0, rankme=12.0, **changes)])
    assert (chosen["rule"], order(chosen), column(chosen, "group")) == (RANKME, [1, 0], [1, 0])
    assert named in str(chosen["warning"])


@pytest.mark.parametrize(
    "changes",
    [
        {"changes": {"model": {"name": "resnet18"}}},
        {"steps": 40, "val_images": 90},
        {"steps": 40, "rankme": None},
    ],
)
def test_where_rankme_does_not_compare_either_no_rule_does(make, changes):
    chosen = select([make(), make(**changes)])
    assert chosen["rule"] == NEITHER
    assert "RankMe does not compare" in str(chosen["warning"])


def test_the_loss_of_ijepa_is_no_verdict_and_objectives_do_not_compare(make):
    """The smaller loss is the worse run by RankMe; masked LeJEPA has a group of its own."""

    def of(objective, loss, rankme=9.0):
        changes = {"changes": {"objective": objective}, "linear_trained": 10 * rankme}
        return make(loss=loss, rankme=rankme, **changes)

    runs = [of("ijepa", 1.0), of("ijepa", 2.0, 12.0), of("ijepa", 3.0, 10.0)]
    chosen = select(runs)
    assert (chosen["rule"], order(chosen), column(chosen, "group")) == (RANKME, [1, 2, 0], [0, 0, 0])
    assert all(map(math.isnan, column(chosen, "score")))
    assert "no verdict" in str(chosen["warning"])
    assert chosen["correlations"] == {}
    mixed = select([runs[0], of("masked-lejepa", 1.0), of("masked-lejepa", 2.0), of("lejepa", 1.0)])
    assert (mixed["rule"], column(mixed, "group")) == (NEITHER, [0, 1, 1, 2])
    assert "differ in" in str(mixed["warning"])
    alone = select([of("masked-lejepa", 2.0), of("masked-lejepa", 1.0)])
    assert (alone["rule"], alone["warning"], column(alone, "loss")) == (LOSS, None, [1.0, 2.0])


def test_the_score_orders_runs_and_collapsed_ones_come_last(make):
    runs = [make(0.2, 1.0), make(0.1, 1.0), make(0.4, 1.1), make(0.0, 0.1), make(0.9, 0.1, state="collapsed")]
    chosen = select(runs)
    assert order(chosen) == [2, 0, 1, 4, 3]  # 1.1 / 0.4^0.4 = 1.59, 1.90, 2.51
    assert math.isnan(chosen["runs"][-1]["score"])  # lambda 0
    assert [row["places"]["score"] for row in chosen["runs"]] == [2, 3, 4, 1, None]
    assert order(select(runs, alpha=0))[:3] == [3, 0, 1]


# ---- C(alpha) ------------------------------------------------------------------------------------


def test_spearman_with_ties():
    """1 - 6 sum d^2 / n (n^2 - 1) without ties; ties share their mean rank."""
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(1 - 6 * 2 / 60)
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(3 / math.sqrt(10))
    assert spearman([3, 2, 1], [1, 2, 9]) == pytest.approx(-1)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_c_of_alpha_is_one_where_the_score_orders_the_runs_as_their_accuracy_does(make):
    """Accuracies that fall with loss / lambda^0.4, and losses that rise with lambda: alone they mislead."""
    runs = [
        make(lambd, loss := (1 + 0.1 * i) * lambd**0.6, linear_trained=90 - 10 * loss / lambd**0.4)
        for i, lambd in enumerate((0.01, 0.03, 0.1, 0.3, 0.9))
    ]
    assert all(score(run, 0.4) == pytest.approx(run.loss / run.lambd**0.4) for run in runs)
    assert correlate(runs, "linear")["c_at_alpha"] == pytest.approx(1)
    assert correlate(runs, "knn") == {}  # no accuracies
    assert correlate(runs[:2], "linear") == {}
    up = [make(lambd, lambd**0.2, linear_trained=50 + lambd) for lambd in (0.01, 0.1, 0.5)]
    found = correlate(up, "linear")
    assert (found["c"][0], found["c_at_alpha"]) == (pytest.approx(-1), pytest.approx(1))
    assert (found["best_alpha"], found["runs"], found["effective_rank"]) == (0.25, 3, None)
    assert math.isnan(found["rankme"])  # the same for all


# ---- the command ---------------------------------------------------------------------------------


def test_select_prints_the_ranking_and_writes_it_with_a_figure(make, tmp_path, capsys):
    runs = [
        make(lambd, lambd**0.2, linear_trained=50 + 9 * lambd, rankme=4 + lambd, effective_rank=3.0)
        for lambd in (0.01, 0.1, 0.5)
    ]
    folders, empty = [str(run.folder) for run in runs], tmp_path / "empty"
    empty.mkdir()
    again = [str(empty), folders[0]]  # a folder that is no run, and a run twice, are left out
    assert select_runs.main([*folders, *again, "--out", str(tmp_path / "out")]) == 0
    printed, warned = capsys.readouterr()
    assert warned.startswith(f"warning: left out: {empty}: expected a run folder")
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == folders[::-1]
    assert printed.splitlines()[1].split()[-6:] == ["3", "(1)", "4.5", "(1)", "healthy", "54.5"]
    assert f"trusted rule: {LOSS}, alpha 0.4; best: {folders[2]}" in printed.splitlines()
    assert "C(0) = -1.00, C(0.4) = 1.00, best C(0.25) = 1.00, effective rank nan, RankMe 1.00" in printed
    found = json.loads((tmp_path / "out" / "select.json").read_text())
    assert [run["run"] for run in found["runs"]] == folders[::-1]
    assert found["runs"][0]["score"] == pytest.approx(0.5**0.2 / 0.5**0.4)
    assert found["runs"][0]["knn"] is None
    with Image.open(tmp_path / "out" / "select.png") as image:
        assert np.asarray(image.convert("L")).std() > 1


def test_select_without_labels_and_with_runs_that_do_not_compare(make, tmp_path, capsys):
    folders = [str(make(knn_trained=50.0).folder), str(make(steps=40).folder)]
    assert select_runs.main([*folders, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed
    assert printed.count("warning: the runs differ in steps") == 1
    assert "trusted rule: RankMe; best: " in printed
    assert "correlation" not in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["select.json"]
    assert select_runs.main([str(make(0.0).folder), str(make(0.0, 0.5).folder)]) == 0
    assert "alpha 0.4; best: none, as no run has a score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs: expected 2 run folders or more, got 0"),
        (["{run}", "{run}"], "runs: expected 2 run folders or more, got 1"),
        (["{run}", "{run}", "--alpha", "nan"], "alpha: expected a number, got nan"),
    ],
)
def test_wrong_usage_is_one_line(make, capsys, arguments, message):
    run = str(make().folder)
    assert select_runs.main([each.format(run=run) for each in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


# ---- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("a",), [[2, 3]]),
        (("a", "b"), [[4, 5], [3.5, 5.5]]),
        (("a", "b", "c"), [[8, 9], [7.5, 9.5], [6.5, 10.5]]),
        (("seed",), [[1.5, 3.5]]),
    ],
)
def test_grids_of_any_number_of_options_are_drawn(make, tmp_path, keys, expected, monkeypatch):
    """Without labels the loss alone: for each option the means over the others and the seeds."""
    means, plot = [], Axes.plot

    def spy(ax, *points, **options):
        if options.get("label") == "mean":
            means.extend(points)
        return plot(ax, *points, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    values = [{key: (i >> n) % 2 for n, key in enumerate((*keys, "seed"))} for i in range(2 ** len(keys) * 2)]
    run = make()
    runs = [replace(run, loss=1.0 + i) for i in range(len(values))]
    run_plots.plot_grid(tmp_path / "grid.png", values, runs)
    run_plots.plot_loss_plane(tmp_path / "plane.png", runs)
    assert means == expected
    for name in ("grid.png", "plane.png"):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image.convert("L")).std() > 1
