"""The report folder: complete, self-contained, explicit about missing figures, whole or absent."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from report_page import Page
from training import randn

from lejepa_fast.errors import RunError
from lejepa_fast.train.evaluation import collapse
from lejepa_fast.train.evaluation.protocol import EvalResult
from lejepa_fast.train.report import plots, report
from lejepa_fast.train.report.results_table import format_table, table_rows

FIGURES = {"loss.png", "knn.png", "views.png", "projections.png", "spectrum.png"}
CONFIG = {
    "objective": "lejepa",
    "seed": 4,
    "data": {"path": "/data/birds", "batch_size": 64},
    "model": {"name": "resnet10t"},
    "loss": {"lambd": 0.07, "form": "convex", "t_max": 3.0, "n_points": 17, "unbiased": False},
    "crops": {"global_crops": 2, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    "eval": {"draws": 3, "labels": None, "fine_tune": 0},
}


def result(z, knn, linear):
    known: dict[str, Any] = {"knn": knn, "linear": linear, "num_classes": 6, "majority": 23.5}
    unknown = {"no_labels_because": "80 of the 80 validation images in <flat> have no class."}
    return EvalResult(
        embedding_std=collapse.embedding_std(z),
        effective_rank=collapse.effective_rank(z),
        sigreg=collapse.sigreg_statistic(z),
        z_val=z,
        features_val=torch.zeros(len(z), 24),
        n_train=300,
        n_val=len(z),
        image_size=64,
        k=20,
        seconds=1.5,
        **(unknown if knn is None else known),
    )


def history():
    values = {"prediction": 0.1, "sigreg": 3.0, "embedding_std": 0.8, "images_per_second": 100.0}
    train = [{"kind": "train", "step": step, "loss": 2.0 / (1 + step), **values} for step in range(1, 13)]
    return [{"kind": "run", "step": 0, "device": "cpu"}, *train, {"kind": "eval", "step": 6, "knn": 60.0}]


RED, BLUE = (0.75, 0.1, 0.2), (0.1, 0.2, 0.9)


def painted(color, size):
    """Normalized images of one color."""
    return ((torch.tensor(color) - 0.5) / 0.25).view(1, 3, 1, 1).expand(2, 3, size, size)


def arguments(*, results=None, **changes):
    """Of `write_report`; `results` go with those of our encoders, or take their place."""
    ours = {
        "untrained": result(0.2 * randn(80, 12, seed=1) * torch.logspace(0, -3, 12), 54.0, 60.0),
        "trained": result(randn(80, 12), 66.25, 71.5),
    }
    return {
        "config": CONFIG,
        "data": {"train_images": 9000, "val_images": 1000},
        "evaluated_on": "/data/birds",
        "results": ours | (results or {}),
        "history": history(),
        "views": [painted(RED, 40), painted(RED, 40), painted(BLUE, 20)],
        "steps": 12,
        **changes,
    }


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes seconds; what is not about figures goes without."""
    monkeypatch.setattr(report, "_draw", lambda *_args: None)


def read_summary(page):
    return json.loads((page.parent / "summary.json").read_text(encoding="utf-8"))


# ---- the folder ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of a report of a labeled run; not to be changed."""
    return report.write_report(tmp_path_factory.mktemp("run"), **arguments())


def test_report_is_complete_and_self_contained(written):
    assert (written.name, written.parent.name) == ("report.html", "report")
    assert {p.name for p in written.parent.iterdir()} == FIGURES | {"report.html", "summary.json"}
    assert [p.name for p in written.parents[1].iterdir()] == ["report"]  # no temporary folder stays
    for name in FIGURES:
        with Image.open(written.parent / name) as image:
            assert image.format == "PNG"
            assert np.asarray(image.convert("L")).std() > 1, f"{name} is blank"
    with Image.open(written.parent / "views.png") as image:  # in their colors, at relative sizes, in order
        pixels = np.asarray(image.convert("RGB")) / 255
    red, blue = (np.abs(pixels - color).max(axis=2) < 0.02 for color in (RED, BLUE))
    assert red.sum() / blue.sum() == pytest.approx(8.0, rel=0.15)
    assert np.nonzero(red)[1].max() < np.nonzero(blue)[1].min()
    page = Page(written)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        for name in {"src", "href", "srcset", "data"} & set(attributes):
            assert (attributes[name] or "").startswith("data:image/png;base64,"), (tag, name)
    raw = written.read_text(encoding="utf-8")
    assert not [word for word in ("url(", "@import", "http") if word in raw]
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(FIGURES)
    cells = " ".join(page.text.split())
    for expected in (
        "54.0 ± 5.4 66.2 ± 5.2 +12.2",  # 5.2 and 5.4 are the standard errors of 80 images
        "60.0 ± 5.4 71.5 ± 5.0 +11.5",
        "resnet10t",
        "Healthy",
        "(1 - 0.07) · prediction + 0.07 · SIGReg",
        "guessing gives 16.7 %",
        "steps on /data/birds: 9,000 images, 1,000 held out. Evaluated on /data/birds: 80 validation images, "
        "6 classes, probes fitted on 300 others",
        "What the encoder is trained on: a row",
        "64 images in this figure, 80 in the table",
        "Healthy: 6 or more",
        "Collapsed: fewer than 1.2,",
    ):
        assert expected in cells, expected
    assert "Why the effective rank" not in cells  # it is above that of the untrained encoder


def test_summary_has_the_promised_keys_and_types(written):
    summary = read_summary(written)
    expected: dict[str, Any] = {"knn_untrained": 54.0, "knn_trained": 66.25, "knn_gain": 12.25}
    expected |= {"linear_untrained": 60.0, "linear_trained": 71.5, "linear_gain": 11.5}
    expected |= {"majority_class": 23.5, "chance": pytest.approx(100 / 6), "no_labels_because": None}
    expected |= {"images_per_second": 100.0, "steps": 12, "seed": 4, "config": CONFIG}
    expected |= {"pretraining_data": "/data/birds", "pretraining_images": 9000, "pretraining_held_out": 1000}
    expected |= {"evaluation_data": "/data/birds", "evaluation": CONFIG["eval"], "num_classes": 6}
    expected |= {"probe_images": 300, "val_images": 80, "effective_rank_limit": 12}
    expected |= {
        "rank_low_below": 6.0,
        "rank_collapsed_below": 1.2,
        "std_collapsed_below": 0.1,
        "collapsed": False,
        "state": "healthy",
    }
    expected["evaluation_seconds"] = 3.0  # of both encoders
    expected["embedding_std"] = pytest.approx(collapse.embedding_std(randn(80, 12)))
    expected["rankme"] = pytest.approx(collapse.rankme(randn(80, 12)))
    assert {key: summary[key] for key in expected} == expected
    assert 1 < summary["effective_rank"] <= 12
    assert summary["verdict"].startswith("Healthy")
    assert {"torch", "timm", "python", "lejepa_fast"} <= set(summary["versions"])
    assert summary["machine"]["cores"] >= 1
    assert summary["machine"]["torch_threads"] == torch.get_num_threads()


def test_without_labels_and_collapsed_the_report_says_so_and_keeps_the_rest(tmp_path):
    """With gaps and values that are not finite in the rows; both encoders give needles, one of width 0."""
    rows = [
        {"kind": "train", "step": 1, "loss": None, "prediction": float("nan"), "sigreg": 3.0},
        {"kind": "train", "step": 2, "loss": 1.0, "prediction": 0.0, "sigreg": float("inf")},
    ]
    constant, nearly = torch.full((80, 12), 0.3), 0.3 + 1e-4 * randn(80, 12)
    results = {"trained": result(constant, None, None), "untrained": result(nearly, None, None)}
    changes = {"results": results, "history": rows, "config": {**CONFIG, "nan": float("nan")}}
    path = report.write_report(tmp_path, **arguments(**changes))
    assert {p.name for p in path.parent.glob("*.png")} == FIGURES - {"knn.png"}
    page = Page(path)
    assert "validation images in <flat> have no class." in page.text  # escaped in the source
    assert "No kNN and no linear probe" in page.text
    assert "Collapsed" in page.text
    assert ("div", {"class": "verdict collapsed"}) in page.tags
    summary = read_summary(path)
    for key in ("knn_untrained", "knn_trained", "linear_untrained", "linear_trained", "knn_gain", "chance"):
        assert summary[key] is None, key
    assert "no class" in summary["no_labels_because"]
    found = summary["collapsed"], summary["images_per_second"], summary["config"]["nan"]
    assert found == (True, None, None)


@pytest.mark.usefixtures("no_figures")
def test_low_rank_other_data_and_hostile_names_are_said(tmp_path, monkeypatch):
    """A cliff after 3 of 12 directions, and full rank untrained; evaluated on other images."""
    monkeypatch.setattr(report, "_draw", lambda folder, *_: (folder / "views.png").write_bytes(b"figure"))
    hostile = '<script>alert("x")</script> & {{ title }}'
    changes = {"config": {**CONFIG, "model": {"name": hostile}, "out": Path("/some/folder")}}
    few = randn(80, 12) * (torch.arange(12) < 3)
    results = {"trained": result(few, 66.25, 71.5), "untrained": result(randn(80, 12, seed=1), 54.0, 60.0)}
    path = report.write_report(tmp_path, **arguments(results=results, **changes, evaluated_on="/data/fish"))
    page, summary = Page(path), read_summary(path)
    text = " ".join(page.text.split())
    assert ("div", {"class": "verdict low rank"}) in page.tags
    assert (summary["state"], summary["collapsed"]) == ("low rank", False)
    for expected in (
        "Low rank: no collapse, but few directions",
        "low rank below 6)",
        "Why the effective rank is below that of the untrained encoder",
        "steps on /data/birds: 9,000 images, 1,000 held out. Evaluated on /data/fish: 80 validation images",
        "shown on images of /data/fish (the encoder was trained on /data/birds)",
        "measured on training images of /data/fish",
        "SIGReg of 80 validation images",
    ):
        assert expected in text, expected
    assert "What the encoder is trained on" not in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(hostile) >= 2  # the title and the heading, unchanged
    assert summary["config"]["out"] == "/some/folder"


def backbone(knn, linear, weights, parameters):
    found = result(randn(80, 24), knn, linear)
    return replace(found, seconds=20.25, weights=weights, parameters=parameters)


BACKBONES = {
    "vit_small_patch14_dinov2.lvd142m": backbone(80.0, 85.5, "hub", 22_056_576),
    "<b>": backbone(70.0, None, "/weights/b.safetensors", 12_345_678),
}
OF_BACKBONES = {"image_size": 64, "feature_dim": 24}


@pytest.mark.usefixtures("no_figures")
def test_backbones_stand_beside_both_encoders(tmp_path):
    random = replace(BACKBONES["<b>"], weights="untrained")
    path = report.write_report(tmp_path, **arguments(results=BACKBONES | {"resnet:untrained": random}))
    summary, text = read_summary(path), " ".join(Page(path).text.split())
    found = summary["backbones"]
    assert summary["evaluation_seconds"] == 63.8  # 3 x 20.25 and both of ours
    others = {"knn": 70.0, "linear": None, "parameters": 12_345_678, "weights": "/weights/b.safetensors"}
    assert found["<b>"].items() >= (OF_BACKBONES | others).items()
    for expected in (
        "untrained trained difference vit_small_patch14_dinov2.lvd142m 64 px, 22.1 M parameters <b> 64 px",
        "54.0 ± 5.4 66.2 ± 5.2 +12.2 80.0 ± 4.5 70.0 ± 5.0 70.0 ± 5.0 Linear",
        "60.0 ± 5.4 71.5 ± 5.0 +11.5 85.5 ± 4.0 - - Embedding",
        "resnet:untrained: random weights, 64 px",
        "weights of /weights/b.safetensors, 64 px, 24 features",
        "dinov2.lvd142m: weights of the Hugging Face hub, 64 px",
    ):
        assert expected in text, expected
    assert re.search(r"Effective rank of 12 [\d.]+ [\d.]+ [+][\d.]+ - - - SIGReg", text)  # of embeddings


def test_backbones_alone_have_a_page_without_figures(tmp_path):
    options = {"evaluated_on": "/data/birds", "seed": 4, "results": BACKBONES}
    evaluation = {**CONFIG["eval"], "labels": "/data/birds.csv", "fine_tune": 7}
    path = report.write_backbones_report(tmp_path, evaluation=evaluation, **options)
    assert sorted(each.name for each in path.parent.iterdir()) == ["report.html", "summary.json"]
    summary, text = read_summary(path), " ".join(Page(path).text.split())
    expected = {"evaluation_data": "/data/birds", "seed": 4, "val_images": 80, "num_classes": 6, "knn_k": 20}
    assert summary.items() >= expected.items()
    assert summary["backbones"]["<b>"]["knn"] == 70.0
    assert "kNN accuracy, k = 20 (%) 80.0 ± 4.5 70.0 ± 5.0 Linear probe accuracy (%) 85.5 ± 4.0 -" in text
    assert "Embedding std" not in text
    assert "Labels/data/birds.csv Fine-tuning7 epochs" in text
    assert (summary["evaluation"], "trained" in summary) == (evaluation, False)


@pytest.mark.usefixtures("no_figures")
def test_second_report_replaces_the_first_and_what_a_killed_run_left(tmp_path):
    for folder, name in (("report", "stale.txt"), (".report-new", "half.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("old", encoding="utf-8")
    path = report.write_report(tmp_path, **arguments(steps=99))
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert {p.name for p in path.parent.iterdir()} == {"report.html", "summary.json"}
    assert read_summary(path)["steps"] == 99


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("refused", ["knn.png", "summary.json", "report.html", ".report-new"])
def test_full_disk_keeps_the_earlier_report(tmp_path, monkeypatch, refused):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("the earlier one", encoding="utf-8")

    def refusing(method):
        def call(path, *rest, **options):
            if path.name == refused:
                raise OSError(28, "No space left on device")
            return method(path, *rest, **options)

        return call

    for name in ("write_text", "rename"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    monkeypatch.setattr(report, "_draw", lambda folder, *_args: (folder / "knn.png").write_text("a figure"))
    with pytest.raises(RunError, match="No space left on device") as caught:
        report.write_report(tmp_path, **arguments(steps=99))
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'report'}: ")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["report.html"]
    assert (tmp_path / "report" / "report.html").read_text(encoding="utf-8") == "the earlier one"


# ---- figures -------------------------------------------------------------------------------------


def test_figures_and_the_callers_style_do_not_touch_each_other(tmp_path, monkeypatch):
    curves = {"": history()}, [plots.Panel("kNN", "knn", "eval", ((50.0, "untrained"),))]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
        importlib.reload(plots).plot_curves(tmp_path / "plain.png", *curves)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "savefig.dpi": 20}):
        before = dict(matplotlib.rcParams)
        plots.plot_curves(tmp_path / "styled.png", *curves)
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


# ---- terminal ------------------------------------------------------------------------------------


def test_terminal_table_shows_encoders_and_backbones_and_the_verdict():
    ours = arguments()["results"]
    lines = format_table(ours | BACKBONES).splitlines()
    assert lines[0].split() == ["untrained", "trained", "difference", *BACKBONES]
    assert lines[1].split()[-5:] == ["54.0", "66.2", "+12.2", "80.0", "70.0"]
    assert len(lines[0]) == len(lines[1])
    assert lines[-1].startswith("Healthy")
    lines = [line.split() for line in format_table(BACKBONES).splitlines()]
    assert (lines[0], lines[1][-2:], lines[2][-2:]) == ([*BACKBONES], ["80.0", "70.0"], ["85.5", "-"])
    assert " ".join(lines[3]) == "guessing: 16.7 %, always the largest class: 23.5 %"
    table = format_table(ours | {"trained": result(randn(80, 12), None, None)})
    assert table.splitlines()[1].split()[-3:] == ["54.0", "-", "-"]
    assert "have no class" in table


def test_embeddings_of_i_jepa_have_no_gaussian_as_their_target():
    """Nor does a share of the dimensions make a collapse."""
    lejepa = replace(result(randn(300, 128), 60.0, 70.0), effective_rank=2.3)
    ijepa = replace(lejepa, gaussian=False)
    assert (lejepa.verdict.state, ijepa.verdict.state) == ("collapsed", "low rank")
    labels = [row.label for row in table_rows({"untrained": ijepa, "trained": ijepa})[0]]
    assert labels[-2:] == ["Embedding std", "Effective rank of 128"]
    labels = [row.label for row in table_rows({"untrained": lejepa, "trained": lejepa})[0]]
    shown = ["Embedding std (target 1)", "Effective rank of 128", "SIGReg of 300 validation images"]
    assert labels[-3:] == shown
