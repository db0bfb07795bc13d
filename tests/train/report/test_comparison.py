"""Runs side by side: what the page and compare.json say, and which folders are refused."""

import json

import numpy as np
import pytest
from PIL import Image
from report_page import Page
from run_folders import write_run

from lejepa_fast.train import evaluate as command
from lejepa_fast.train.config import from_dict
from lejepa_fast.train.report.comparison import write_comparison
from lejepa_fast.train.report.plots import RUNS, plot_curves

SUMMARY = {
    "knn_trained": 68.1,
    "knn_untrained": 54.0,
    "few_shot": {"1": {"knn": [33.0, 2.0]}},
    "few_shot_untrained": {"1": {"knn": [22.0, 2.0]}},
    "effective_rank": 40.0,
    "effective_rank_untrained": 20.0,
    "embedding_std": 0.9,
    "sigreg_val": 1.5,
    "images_per_second": 1234.5,
    "image_size": 48,
    "val_images": 505,
    "knn_k": 20,
    "evaluation_data": "/data/birds",
    "verdict": "Healthy: the embeddings vary in most directions.",
    "machine": {"processor": "A processor"},
    "created": "2026-11-30 06:00 UTC",
}


@pytest.fixture
def run(tmp_path, white_figures):
    """Writes the files of a finished run; objective, lambda and the summary can be changed."""

    def write(name, lambd=0.05, objective="lejepa", **changes):
        values = {"objective": objective, "loss": {"lambd": lambd}, "optim": {"weight_decay": 0.05}}
        losses = [1 / step for step in range(1, 41)]
        folder = write_run(tmp_path / name, from_dict(values), losses, **(SUMMARY | changes))
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | {"model_args": {"a": lambd}}))  # for timm
        return folder

    return write


def text_of(page):
    return " ".join(Page(page).text.split())


def test_two_runs_stand_side_by_side(run, tmp_path, capsys):
    folders = [run("first"), run("<second>", 0.1, knn_trained=70.0, state="collapsed")]
    assert command.main(["--compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    page = tmp_path / "out" / "comparison" / "compare.html"
    assert str(page) in capsys.readouterr().out
    assert {each.name for each in page.parent.iterdir()} == {"compare.html", "compare.json", "curves.png"}
    text = text_of(page)
    for expected in (
        "kNN accuracy (%) 68.1 ± 2.1 70.0 ± 2.0 untrained 54.0 ± 2.2 54.0 ± 2.2 gain +14.1 +16.0",
        "1 label per class: kNN 33.0 ± 2.0 33.0 ± 2.0 untrained 22.0 ± 2.0 22.0 ± 2.0",
        "Effective rank 40 40 untrained 20 20",
        "Training speed (images/s) 1,234 1,234",
        "State healthy collapsed",
        "loss.lambd 0.05 0.1",
        "<second> Healthy: the embeddings vary in most directions.",
    ):
        assert expected in text, expected
    assert "Linear probe" not in text  # it was measured nowhere
    assert "not comparable" not in text
    for tag, attributes in Page(page).tags:
        assert tag not in {"script", "link"}
        assert (attributes.get("src") or "data:").startswith("data:")
    found = json.loads((page.parent / "compare.json").read_text())
    assert found["differing_settings"] == {"loss.lambd": {"first": 0.05, "<second>": 0.1}}
    assert found["not_comparable_because"] is None
    assert found["runs"]["<second>"].items() >= {"knn_trained": 70.0, "folder": str(folders[1])}.items()


def test_sigreg_of_ijepa_is_left_out(run, tmp_path):
    folders = [run("a", sigreg_val=1.25), run("b", objective="ijepa", sigreg_val=5.5)]
    assert "SIGReg of the validation images 1.25 - " in text_of(write_comparison(folders, tmp_path))


def test_runs_of_other_images_or_sizes_are_not_comparable(run, tmp_path):
    folders = [run("a"), run("b", image_size=64), run("c", evaluation_data="/data/fish")]
    page = write_comparison(folders, tmp_path)
    expected = (
        "The figures are not comparable: the runs were evaluated with different images (a: /data/birds; "
        "b: /data/birds; c: /data/fish) and image sizes in pixels (a: 48; b: 64; c: 48)."
    )
    assert expected in text_of(page)
    assert json.loads((page.parent / "compare.json").read_text())["not_comparable_because"] == expected
    assert "None: the runs repeat one another." in text_of(page)


def test_other_labels_counts_and_classes_are_not_comparable(run, tmp_path):
    """Epochs of fine-tuning and draws matter where both runs have the figures; paths, not their texts."""
    settings = {"labels": "a.csv", "few_shot": "1", "draws": 3, "fine_tune": 0, "linear_blocks": 2}
    settings["temperature"] = 0.07
    more = settings | {"few_shot": "", "draws": 7, "fine_tune": 5}
    where = {"evaluation_data": f"{tmp_path}/x"}
    folders = [
        run("a", evaluation=settings, num_classes=3, evaluation_data=f"{tmp_path}/x/"),
        run("b", evaluation=more, num_classes=3, **where),
        run("old", **where),  # records neither
    ]
    page = write_comparison(folders, tmp_path)
    assert json.loads((page.parent / "compare.json").read_text())["not_comparable_because"] is None
    other = settings | {"labels": None, "draws": 7, "linear_blocks": 4, "temperature": 1}
    folders[1] = run("c", evaluation=other, num_classes=None, probe_images=9, **where)
    page = write_comparison(folders[:2], tmp_path)
    found = json.loads((page.parent / "compare.json").read_text())["not_comparable_because"]
    for expected in (
        "labels (a: a.csv; c: none)",
        "numbers of classes (a: 3; c: none)",
        "draws of few labels (a: 3; c: 7)",
        "blocks for the linear probe (a: 2; c: 4)",
        "temperatures of kNN (a: 0.07; c: 1)",
    ):
        assert expected in found
    assert "images (" not in found
    assert "for the probes" not in found  # one run does not record them


def test_numbers_have_their_scores(run, tmp_path):
    def scores(r2):
        return {"linear": {"r2": r2, "mae": 2.5}, "mean": {"r2": -0.01, "mae": 4.0}}

    numbers = {
        **dict.fromkeys(("knn_trained", "knn_untrained"), None),
        "regression": scores(0.5),
        "regression_untrained": scores(0.2),
        "fine_tuned_trained": 0.532,
        "fine_tuned_untrained": 0.25,
        "few_shot": {"10": {"nadaraya_watson": [0.512, 0.1]}, "all": {"fine_tuned": [0.6, 0.0]}},
        "few_shot_untrained": {"10": {"nadaraya_watson": [0.4, 0.1]}},
    }
    text = text_of(write_comparison([run("a", **numbers), run("b", **numbers)], tmp_path))
    for expected in (
        "linear probe (R2) 0.500 0.500 untrained 0.200 0.200 gain +0.300 +0.300",
        "linear probe (MAE) 2.5 2.5 untrained 2.5 2.5 Always",
        "Always the mean (R2) -0.010 -0.010 Always the mean (MAE) 4 4 Fine-tuning (R2) 0.532 0.532",
        "10 labels: Nadaraya-Watson 0.512 ± 0.100 0.512 ± 0.100 untrained 0.400 ± 0.100 0.400 ± 0.100 all",
        "all labels: fine-tuning 0.600 0.600",
    ):
        assert expected in text, expected
    assert "(%)" not in text


def test_an_older_summary_is_shown_and_folders_of_one_name_are_told_apart(run, tmp_path):
    folders = [run("new/run"), run("old/run")]
    left_out = ("verdict", "machine", "created", "few_shot", "few_shot_untrained")
    old = {"steps": 40, "state": "healthy"} | {k: v for k, v in SUMMARY.items() if k not in left_out}
    (folders[1] / "report" / "summary.json").write_text(json.dumps(old))
    page = write_comparison(folders, tmp_path)
    assert f"{folders[1]} healthy unknown processor, undated" in text_of(page)
    assert list(json.loads((page.parent / "compare.json").read_text())["runs"]) == [*map(str, folders)]


def test_what_is_no_finished_run_is_named_and_the_earlier_page_stays(run, tmp_path, capsys):
    good, unfinished, broken = run("good"), run("unfinished"), run("broken")
    (unfinished / "report" / "summary.json").unlink()
    (broken / "config.json").write_text("[1")
    page = write_comparison([good, run("other")], tmp_path)
    before = page.read_bytes()
    for folders, message in (
        ([good], "--compare: expected two or more different run folders"),
        ([good, good], "--compare: expected two or more different run folders"),
        ([good, broken], f"{broken}: cannot read config.json (it is not JSON)"),
        ([good, unfinished], "has not finished: expected report/summary.json of step 40, its last"),
        ([good, "--checkpoint", good], "--compare takes finished runs alone"),
    ):
        assert command.main(["--compare", *map(str, folders), "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image_size": 1.5}, "image_size: expected a valid integer, got 1.5"),
        ({"few_shot": {"1": {"knn": []}}}, "few_shot: expected more values, got []"),
    ],
)
def test_a_summary_of_other_types_is_one_line(run, tmp_path, capsys, changes, problem):
    folders = [run("good"), run("odd", **changes)]
    assert command.main(["--compare", *map(str, folders), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {folders[1]}: report/summary.json: {problem}\n"


def test_a_run_without_curves_is_drawn_beside_the_others(tmp_path):
    """More runs than colors; none has SIGReg."""
    rows = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 80)]
    plot_curves(tmp_path / "curves.png", {"empty": [], **{f"run {i}": rows for i in range(11)}}, RUNS)
    with Image.open(tmp_path / "curves.png") as image:
        assert np.asarray(image.convert("L")).std() > 1
