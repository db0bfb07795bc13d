"""Each experiment of the theory runs in small, agrees with its statement, and could disagree."""

import benchlib
import numpy as np
import pytest
import theory_bench
from PIL import Image
from theory_bench import EXPERIMENTS


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of a rehearsal of all experiments."""
    out = tmp_path_factory.mktemp("theory")
    assert theory_bench.main(["--rehearse", "--out", str(out)]) == 0
    written = benchlib.read_rows(out / "theory.jsonl")
    for name in EXPERIMENTS:
        with Image.open(out / f"theory_{name}_rehearsal.png") as figure:
            assert np.asarray(figure.convert("L")).std() > 10
    return {name: [row for row in written if row["experiment"] == name] for name in EXPERIMENTS}


def test_every_row_states_what_it_shows_and_agrees(rows):
    for name, mine in rows.items():
        for row in mine:
            assert row["rehearsal"], name
            assert row["holds"], name
            assert len(row["statement"]) > 100, name


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("dimension", lambda rows: rows[0].update(after=9.0)),
        ("quadrature", lambda rows: rows[8].update(rule_error=0.02)),
        ("linear", lambda rows: rows[0].update(bias=9.0)),
        ("linear", lambda rows: rows[0].update(variance=9.0)),
        ("neighbors", lambda rows: rows[0].update(bias=9.0)),
        ("gradients", lambda rows: rows[2].update(epps_pulley_gradient=99.0)),
        ("gradients", lambda rows: rows[-1].update(epps_pulley_of_atoms=0.1)),
    ],
)
def test_other_figures_would_not_hold(rows, name, spoil):
    mine = [dict(row) for row in rows[name]]
    assert EXPERIMENTS[name][1](mine)
    spoil(mine)
    assert not EXPERIMENTS[name][1](mine)


def test_figures_equal_closed_forms(rows):
    for row in rows["linear"]:
        assert row["variance"] == pytest.approx(row["expected_variance"], rel=0.5)  # of 20 draws
    for row in rows["neighbors"]:
        # The leading term for a small radius; of Gaussians with variance v, exactly J = sum of 1 / v.
        assert 0.5 * row["predicted"] < row["bias"] < 1.05 * row["predicted"]
    fisher = {row["density"]: row["fisher"] for row in rows["neighbors"]}
    assert fisher["isotropic Gaussian"] == 2
    assert fisher["Gaussian, variances 3:1"] == pytest.approx(1 / 1.5 + 1 / 0.5)


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit):
        theory_bench.main(["alchemy"])
    assert "names: expected dimension, quadrature" in capsys.readouterr().err
