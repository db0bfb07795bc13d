"""The README says what was measured, and what it shows works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import render_readme
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_what_the_rows_say():
    assert render_readme.render(README) == README, "run python bench/render_readme.py"


def test_tables_of_the_other_documents_are_what_the_rows_say():
    for document, tables in render_readme.DOCUMENTS.items():
        text = document.read_text(encoding="utf-8")
        assert render_readme.render(text, tables) == text, (
            f"{document.name}: run python bench/render_readme.py"
        )


def test_empty_tables_are_filled():
    empty = re.sub(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", r"\1\3", README, flags=re.DOTALL)
    assert empty != README
    assert render_readme.render(empty) == README


def test_a_changed_figure_is_noticed():
    table = render_readme.sigreg_table()
    figure = re.search(r"\d+ ms", table)
    assert figure is not None
    tampered = README.replace(figure.group(), "1 ms", 1)
    assert render_readme.render(tampered) != tampered


def gpu_row(variant, case, dtype, milliseconds, mebibytes, **changes):
    where = {
        "device": "NVIDIA H200",
        "driver": "580.1",
        "torch": "2.11",
        "triton": "3.6",
        "date": "2030-01-02",
    }
    figure = {"median_ms": milliseconds}
    row = {"variant": variant, "case": case, "dtype": dtype, "directions": "drawn", "correct": True}
    row |= dict(zip("VNKMJ", (8, 2048, 512, 1024, 17), strict=True))
    row |= {"forward_backward": figure, "wall": {"median_ms": 10 * milliseconds}}
    return row | {"peak_extra_mib": mebibytes, "command": "python bench/x.py", **where, **changes}


def test_rows_of_a_gpu_take_the_place_of_the_cpu_table(tmp_path, monkeypatch):
    eager, compiled, ours = "authors' formulation", "torch.compile of it", "our impl='triton'"
    lost = {"correct": False, "problem": "does not fit: needs about 99 GiB"}
    rows = [
        gpu_row(ours, "reference", "bfloat16", 9.0, 9.0, date="2029-01-01"),  # older
        gpu_row(eager, "reference", "bfloat16", 7.25, 7000.0),
        gpu_row(compiled, "reference", "bfloat16", 1.5, 20.0),
        gpu_row(ours, "reference", "bfloat16", 0.125, 70.0),
        gpu_row(compiled, "minimal", "float32", 0.2, 20.0, group=1),
        gpu_row(ours, "minimal", "float32", 0.05, 1.0, group=1),  # the clock had fallen
        gpu_row(ours, "reference", "bfloat16", 0.1, 60.0, directions="given"),
        gpu_row(eager, "giant", "bfloat16", 1.0, 1.0, **lost),
        gpu_row(ours, "giant", "bfloat16", 4.0, 1500.0),
        gpu_row(eager, "minimal", "float32", 0.1, 1.0, group=0),
        gpu_row(ours, "minimal", "float32", 0.02, 1.0, group=0),
        gpu_row(ours, "reference", "float32", 0.001, 1.0, rehearsal=True),
    ]
    before = [line for line in (render_readme.RESULTS / "sigreg.jsonl").read_text().splitlines() if line]
    (tmp_path / "sigreg.jsonl").write_text("\n".join([*before, *map(json.dumps, rows)]))
    monkeypatch.setattr(render_readme, "RESULTS", tmp_path)
    lines = render_readme.sigreg_table().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert "2 cores" not in "\n".join(lines)
    reference = next(c for c in cells if c[0].endswith("bf16"))
    assert reference[1:] == ["7.25 ms", "1.5 ms", "**0.125 ms**", "58.0x", "12.0x", "7000 MiB", "70 MiB"]
    giant = next(c for c in cells[3:] if "does not fit" in c)
    assert giant[1:] == ["does not fit", "-", "**4 ms**", "-", "-", "-", "1500 MiB"]
    (wall,) = (c for c in cells if "wall clock" in c[0])
    assert wall[1:6] == ["1 ms", "2 ms", "**0.2 ms**", "5.0x", "4.0x"]
    assert not any("float32" in c[0] and "wall" not in c[0] for c in cells), "a rehearsal is no figure"
    assert lines[-1].startswith("NVIDIA H200, driver 580.1, torch 2.11, triton 3.6, 2030-01-02")


def test_the_text_does_not_deny_figures_that_there_are():
    measured = any("wall" in row for row in render_readme.read_rows(render_readme.RESULTS / "sigreg.jsonl"))
    assert measured != ("none has been measured on a GPU" in " ".join(README.split()))


def test_linked_files_exist():
    for text in [README, *(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
            assert (ROOT / target).exists() or (ROOT / "docs" / target).exists(), target


def test_six_lines_of_use():
    """The first code block of the README, run with small stand-ins."""
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "LeJEPALoss" in c)
    encoder = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    projector = torch.nn.Linear(12, 6)
    views = [torch.randn(10, 3, size, size) for size in (8, 8, 4, 4)]  # global and local crops
    scope = {"torch": torch, "device": "cpu", "encoder": encoder, "projector": projector, "views": views}
    exec(code, scope | {"num_global": 2})
    assert projector.weight.grad is not None
    assert projector.weight.grad.norm() > 0


def test_migration_rows_are_valid_code():
    """Every expression of the tables constructs."""
    from lejepa_fast import LeJEPALoss, SIGReg, symmetric_knots

    pages = README + (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| `((?:LeJEPALoss|SIGReg)\(.*\))`(?:, times 4)? \|$", pages, re.MULTILINE)
    assert len(rows) >= 12
    scope = {"LeJEPALoss": LeJEPALoss, "SIGReg": SIGReg, "symmetric_knots": symmetric_knots}
    for row in rows:
        module = eval(row, scope | {"M": 64, "gather_distributed": True})
        assert isinstance(module, (LeJEPALoss, SIGReg)), row
