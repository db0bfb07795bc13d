"""The README says what was measured, and what it shows works."""

from __future__ import annotations

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
