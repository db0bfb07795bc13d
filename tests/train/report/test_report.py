"""The report folder: complete, self-contained, honest about what it could not measure, whole or absent."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lejepa_fast.errors import RunError
from lejepa_fast.train.evaluation import collapse
from lejepa_fast.train.evaluation.evaluate import EvalResult
from lejepa_fast.train.report import plots, report
from lejepa_fast.train.report.report import format_table

FIGURES = {"loss.png", "knn.png", "views.png", "projections.png", "spectrum.png"}
CONFIG = {
    "seed": 4,
    "model": {"name": "resnet10t"},
    "loss": {"lambd": 0.07, "form": "convex", "t_max": 3.0, "n_points": 17},
    "crops": {"global_crops": 2, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


def result(z: Tensor, knn: float | None, linear: float | None) -> EvalResult:
    labelled = knn is not None
    return EvalResult(
        knn=knn,
        linear=linear,
        linear_rate=1e-3 if labelled else None,
        embedding_std=collapse.embedding_std(z),
        effective_rank=collapse.effective_rank(z),
        sigreg=collapse.sigreg_statistic(z),
        z_val=z,
        features_val=torch.zeros(len(z), 24),
        n_train=300,
        n_val=len(z),
        num_classes=6 if labelled else None,
        majority=23.5 if labelled else None,
        no_labels_because=None if labelled else "80 of the 80 validation images in <flat> have no class.",
        image_size=64,
        k=20,
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def history(rows: int = 12) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"kind": "run", "step": 0, "device": "cpu"}]
    for step in range(1, rows + 1):
        found.append(
            {
                "kind": "train",
                "step": step,
                "loss": 2.0 / step,
                "prediction": 1.0 / step,
                "sigreg": 40.0 / step,
                "embedding_std": 0.9,
                "images_per_second": 100.0,
            }
        )
    found.append({"kind": "eval", "step": rows // 2, "knn": 60.0})
    return found


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "config": CONFIG,
        "trained": result(randn(80, 12), 66.25, 71.5),
        "untrained": result(0.2 * randn(80, 12, seed=1) * torch.logspace(0, -3, 12), 54.0, 60.0),
        "history": history(),
        "views": [randn(4, 3, 32, 32), randn(4, 3, 32, 32, seed=1), randn(4, 3, 16, 16, seed=2)],
        "images_per_second": 100.0,
        "steps": 12,
        **changes,
    }


class Page(HTMLParser):
    """Every tag and attribute of a page, its text, and a check that tags are closed in order."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a report of a labelled run; not to be changed."""
    return report.write_report(tmp_path_factory.mktemp("run"), **arguments())


def test_report_is_complete_and_self_contained(written: Path) -> None:
    path = written
    assert (path.name, path.parent.name) == ("report.html", "report")
    assert {p.name for p in path.parent.iterdir()} == FIGURES | {"report.html", "summary.json"}
    assert [p.name for p in path.parents[1].iterdir()] == ["report"]  # no temporary folder stays
    for name in FIGURES:
        content = (path.parent / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n"), name
        with Image.open(path.parent / name) as image:
            assert np.asarray(image.convert("L")).std() > 1, f"{name} is blank"
    page = read_page(path)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        for name, value in attributes.items():
            if name in {"src", "href", "srcset", "data"}:
                assert (value or "").startswith("data:image/png;base64,"), (tag, name)
    raw = path.read_text(encoding="utf-8")
    assert "url(" not in raw
    assert "@import" not in raw
    assert "http" not in raw.replace("http-equiv", "")
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(FIGURES)
    for expected in ("66.2", "54.0", "+12.2", "71.5", "60.0", "+11.5", "Healthy", "0.07", "resnet10t"):
        assert expected in page.text, expected


def test_summary_has_the_promised_keys_and_types(written: Path) -> None:
    summary = json.loads((written.parent / "summary.json").read_text(encoding="utf-8"))
    assert summary["knn_untrained"] == 54.0
    assert summary["knn_trained"] == 66.25
    assert summary["knn_gain"] == pytest.approx(12.25)
    assert summary["linear_untrained"] == 60.0
    assert summary["linear_trained"] == 71.5
    assert summary["images_per_second"] == 100.0
    assert summary["steps"] == 12
    assert summary["seed"] == 4
    assert summary["config"] == CONFIG
    assert summary["collapsed"] is False
    assert summary["embedding_std"] == pytest.approx(collapse.embedding_std(randn(80, 12)))
    assert 1 < summary["effective_rank"] <= summary["effective_rank_limit"] == 12
    assert (summary["train_images"], summary["val_images"], summary["num_classes"]) == (300, 80, 6)
    assert summary["majority_class"] == 23.5
    assert summary["chance"] == pytest.approx(100 / 6)
    assert {"torch", "timm", "python", "lejepa_fast"} <= set(summary["versions"])
    assert summary["machine"]["cores"] >= 1


def test_unlabelled_report_says_why_and_keeps_the_rest(tmp_path: Path) -> None:
    changes = {"trained": result(randn(80, 12), None, None), "untrained": result(randn(80, 12), None, None)}
    path = report.write_report(tmp_path, **arguments(**changes))
    assert {p.name for p in path.parent.glob("*.png")} == FIGURES - {"knn.png"}
    page = read_page(path)
    assert "validation images in <flat> have no class." in page.text  # escaped in the source
    assert "No kNN and no linear probe" in page.text
    summary = json.loads((path.parent / "summary.json").read_text(encoding="utf-8"))
    for key in ("knn_untrained", "knn_trained", "linear_untrained", "linear_trained", "knn_gain", "chance"):
        assert summary[key] is None, key
    assert "no class" in summary["no_labels_because"]
    assert summary["embedding_std"] > 0.5


@pytest.mark.parametrize("z", [torch.full((80, 12), 0.3), 0.3 + 1e-4 * randn(80, 12)])
def test_collapse_is_shown(tmp_path: Path, z: Tensor) -> None:
    path = report.write_report(tmp_path, **arguments(trained=result(z, 20.0, None)))
    assert json.loads((path.parent / "summary.json").read_text(encoding="utf-8"))["collapsed"] is True
    page = read_page(path)
    assert "Collapsed" in page.text
    assert ("div", {"class": "verdict bad"}) in page.tags


def test_values_are_escaped(tmp_path: Path) -> None:
    hostile = '<script>alert("x")</script> & $title'
    config = {**CONFIG, "model": {"name": hostile}, "out": Path("/some/folder"), "note": hostile}
    path = report.write_report(tmp_path, **arguments(config=config))
    page = read_page(path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(hostile) >= 2  # the title and the heading, unchanged
    summary = json.loads((path.parent / "summary.json").read_text(encoding="utf-8"))
    assert summary["config"]["out"] == "/some/folder"


def test_gaps_and_non_finite_values_do_not_break_the_report(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": 1, "loss": None, "prediction": float("nan"), "sigreg": 3.0},
        {"kind": "train", "step": 2, "loss": 1.0, "prediction": 0.0, "sigreg": float("inf")},
        {"kind": "eval", "step": 2, "knn": None},
    ]
    config = {"nan": float("nan"), "loss": {"unbiased": True}}
    changes = {"history": rows, "config": config, "images_per_second": None, "views": []}
    path = report.write_report(tmp_path, **arguments(**changes))
    assert not (path.parent / "views.png").exists()
    summary = json.loads((path.parent / "summary.json").read_text(encoding="utf-8"))
    assert summary["images_per_second"] is None
    assert summary["config"]["nan"] is None
    assert summary["seed"] is None
    plots.plot_losses(tmp_path / "empty.png", [], sigreg_floor=1.0)
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_second_report_replaces_the_first_and_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "stale.txt").write_text("old", encoding="utf-8")
    (tmp_path / ".report-new").mkdir()
    (tmp_path / ".report-new" / "half.png").write_text("half", encoding="utf-8")
    path = report.write_report(tmp_path, **arguments(steps=99))
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert {p.name for p in path.parent.iterdir()} == FIGURES | {"report.html", "summary.json"}
    assert json.loads((path.parent / "summary.json").read_text(encoding="utf-8"))["steps"] == 99


@pytest.mark.parametrize("where", ["figure", "page", "rename"])
def test_full_disk_keeps_the_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("the earlier one", encoding="utf-8")
    full = OSError(28, "No space left on device")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise full

    if where == "figure":
        monkeypatch.setattr(plots, "plot_knn", fail)
    elif where == "page":
        monkeypatch.setattr(report, "_draw", lambda *_args: None)
        monkeypatch.setattr(report, "render", fail)
    else:
        monkeypatch.setattr(report, "_draw", lambda *_args: None)
        real, calls = report.os.replace, []

        def second_fails(source: Path, target: Path) -> None:
            calls.append(source)
            if len(calls) == 2:  # the old folder has stepped aside, the new one cannot come
                raise full
            real(source, target)

        monkeypatch.setattr(report.os, "replace", second_fails)
    with pytest.raises(RunError, match="No space left on device") as caught:
        report.write_report(tmp_path, **arguments(steps=99))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "report") in str(caught.value)
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["report.html"]
    assert (tmp_path / "report" / "report.html").read_text(encoding="utf-8") == "the earlier one"
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_missing_run_folder_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write the report"):
        report.write_report(tmp_path / "nowhere", **arguments())


def test_plots_leave_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plots.plot_spectrum(tmp_path / "spectrum.png", randn(40, 8), randn(40, 8))
    assert dict(matplotlib.rcParams) == before
    # In a process of its own: another test may have imported pyplot.
    code = "import sys, lejepa_fast.train.report.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_figures_look_the_same_whatever_style_the_caller_has(tmp_path: Path) -> None:
    args = {"steps": 10, "trained": 60.0, "untrained": 50.0, "majority": 20.0}
    plots.plot_knn(tmp_path / "plain.png", history(), **args)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "savefig.dpi": 20}):
        plots.plot_knn(tmp_path / "styled.png", history(), **args)
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


def test_views_are_shown_denormalised_and_in_place(tmp_path: Path) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)

    def flat(colour: tuple[float, float, float], size: int) -> Tensor:
        normalised = [(c - m) / s for c, m, s in zip(colour, mean, std, strict=True)]
        return torch.tensor(normalised).view(1, 3, 1, 1).expand(1, 3, size, size)

    red, blue = (0.8, 0.1, 0.2), (0.1, 0.2, 0.9)
    views = [flat(red, 40), flat(blue, 20)]
    plots.plot_views(tmp_path / "views.png", views, num_global=1, mean=mean, std=std)
    with Image.open(tmp_path / "views.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(float) / 255
    areas = [(np.abs(pixels - np.array(colour)).max(axis=2) < 0.02) for colour in (red, blue)]
    assert areas[0].sum() / areas[1].sum() == pytest.approx(4.0, rel=0.15)  # true relative sizes
    assert np.nonzero(areas[0])[1].max() < np.nonzero(areas[1])[1].min()  # the global view is on the left


def test_series_takes_the_later_of_two_rows_of_a_step_and_sorts() -> None:
    rows = [
        {"kind": "train", "step": 3, "loss": 1.0},
        {"kind": "train", "step": 2, "loss": 5.0},
        {"kind": "train", "step": 3, "loss": 2.0},
        {"kind": "train", "step": 4, "loss": None},
        {"kind": "eval", "step": 5, "loss": 9.0},
        {"kind": "train", "step": 6},
    ]
    steps, values = plots.series(rows, "train", "loss")
    assert steps.tolist() == [2, 3]
    assert values.tolist() == [5.0, 2.0]


def test_terminal_table_shows_both_encoders_and_the_verdict() -> None:
    found = arguments()
    table = format_table(found["trained"], found["untrained"])
    line = next(line for line in table.splitlines() if line.startswith("kNN"))
    assert line.split()[-3:] == ["54.0", "66.2", "+12.2"]
    assert "Healthy" in table
    without = dataclasses.replace(found["trained"], knn=None, linear=None, num_classes=None, majority=None)
    line = next(line for line in format_table(without, found["untrained"]).splitlines() if "kNN" in line)
    assert line.split()[-3:] == ["-", "-", "-"]
