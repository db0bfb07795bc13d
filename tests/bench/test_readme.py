"""The documents show what was measured, and what the README shows works."""

import json
import re

import pytest
import render_readme
import torch
from benchlib import RESULTS, ROOT, read_rows
from loader_bench import OURS, STABLE
from sigreg_variants import BASELINE, COMPILED, LIGHTLY, STREAMING, TRITON

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", render_readme.DOCUMENTS)
def test_tables_are_what_the_rows_say(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    tables = render_readme.DOCUMENTS[document]
    assert render_readme.render(text, tables) == text, "run python bench/render_readme.py"
    with pytest.raises(ValueError, match=f"expected one <!-- {next(iter(tables))} -->"):
        render_readme.render("no place", tables)


def row(variant, case, dtype, milliseconds, **changes):
    base = {"device": "NVIDIA H200", "driver": "580.1", "threads": 16, "torch": "2.11", "triton": "3.6"}
    base |= {"variant": variant, "case": case, "dtype": dtype, "correct": True, "group": 0}
    base |= {"V": 8, "N": 2048, "K": 512, "M": 1024, "J": 17, "peak_extra_mib": milliseconds}
    base |= {"forward_backward": {"median_ms": milliseconds}, "wall": {"median_ms": 10 * milliseconds}}
    return base | {"date": "2030-01-02T00:00", "command": "python bench/x.py"} | changes


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """Makes cells of the first table, and its last line, of rows."""

    def table(rows, loader=()):
        for name, written in (("sigreg", rows), ("loader", loader)):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)))
        monkeypatch.setattr(render_readme, "RESULTS", tmp_path)
        lines = render_readme.comparison().splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-2]], lines[-1]

    return table


CPU = {"driver": None, "device": "AMD EPYC"}
PEERS = [
    row(STREAMING, "peers", "float32", 70.0, **CPU),
    row(LIGHTLY, "peers", "float32", 500.0, version="1.5", **CPU, date="2029-01-01"),  # older
    row(LIGHTLY, "peers", "float32", 350.0, version="1.6.0", **CPU),
    row(BASELINE, "cpu", "float32", 1.0, **CPU),
]


def test_the_first_table_compares_with_packages(compared):
    about = row("", "", "", 0, **CPU) | {"device": "Intel", "command": "python bench/y.py"}
    about |= {"kind": "peers", "views": "2 x 224"}
    loader = [
        {**about, "contender": STABLE, "images_per_s": 60.0, "version": "0.1.8"},
        {**about, "contender": OURS, "images_per_s": 900.0},
    ]
    cells, origin = compared(PEERS, loader)
    loss = "loss of 8 x 2048 embeddings of size 512, 1024 directions, float32"
    speeds = ["stable-pretraining 0.1.8: 60 images/s", "**900 images/s**", "15.0x", ""]
    assert cells == [
        [loss, "lightly 1.6.0: 350 ms", "**70 ms**", "5.0x", "350 against 70 MiB"],
        ["loading JPEGs, 2 x 224 crops, one worker", *speeds],
    ]
    where = "16 threads, torch 2.11, triton 3.6, 2030-01-02"
    assert origin == f"AMD EPYC, {where}: `python bench/x.py`; Intel, {where}: `python bench/y.py`"


def test_rows_of_a_gpu_take_the_place_of_those_of_a_cpu(compared):
    rows = [
        row(BASELINE, "reference", "bfloat16", 7.25),
        row(TRITON, "reference", "bfloat16", 0.125),
        row(COMPILED, "reference", "bfloat16", 1.5, group=1),
        row(TRITON, "reference", "bfloat16", 0.25, group=1),  # the clock had fallen
        row(BASELINE, "minimal", "float32", 0.1),
        row(TRITON, "minimal", "float32", 0.02),
        row(BASELINE, "giant", "bfloat16", 1.0, correct=False),
        row(TRITON, "giant", "bfloat16", 0.001, rehearsal=True),
    ]
    cells, origin = compared([*PEERS, *rows])
    assert [line[1:4] for line in cells] == [
        [f"{BASELINE}: 7.25 ms", "**0.125 ms**", "58.0x"],
        [f"{COMPILED}: 1.5 ms", "**0.25 ms**", "6.0x"],
        [f"{BASELINE}: 1 ms", "**0.2 ms**", "5.0x"],
    ]
    assert origin.startswith("NVIDIA H200")


def test_the_command_of_rows_in_parts_is_that_of_all():
    rows = [{"command": f"python bench/x.py --seeds 0 1 --sets a=x{more}"} for more in (" b=y", "")]
    assert render_readme.whole(rows)["command"] == "python bench/x.py --sets a=x b=y"


def test_the_text_does_not_deny_figures_that_there_are():
    measured = any(row["driver"] for row in read_rows(RESULTS / "sigreg.jsonl"))
    assert measured != ("none has been measured on a GPU" in " ".join(README.split()))


def heading_anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as Markdown viewers make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name
)
def test_named_files_and_linked_headings_exist(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in heading_anchors(linked.read_text(encoding="utf-8")), (
            f"{target}#{anchor}"
        )
    if page.name != "CHANGELOG.md":  # which also names what is gone
        rooms = "lejepa_fast|kernels|train|bench|tests|docs|examples"
        for path in re.findall(rf"[`( ]((?:{rooms})/[\w/.-]+\.(?:py|md|jsonl?|png|svg|yaml))\b", text):
            assert (ROOT / path).exists(), path


def test_six_lines_of_use():
    """The first Python block of the README, run with small stand-ins."""
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
    for expression in rows:
        module = eval(expression, scope | {"M": 64, "gather_distributed": True})
        assert isinstance(module, (LeJEPALoss, SIGReg)), expression
