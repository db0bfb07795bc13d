"""The compiled tiles of the CPU: when they run and when not, threads, large phases.

Their accuracy is in test_sigreg.py, beside that of the plain path.
"""

import multiprocessing
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accuracy import arbitrary_knots, check_accuracy, evaluate, functional

import lejepa_fast
from lejepa_fast import sample_directions, standard_normal_knots
from lejepa_fast.dispatch import compiled_tiles

cpu_tiles = pytest.importorskip("lejepa_fast.cpu_tiles", reason="Numba is not installed")
KNOTS = standard_normal_knots()


@pytest.fixture
def numba(monkeypatch):
    """Sets what `import numba` finds."""

    def becomes(module):
        monkeypatch.setitem(sys.modules, "numba", module)
        monkeypatch.delitem(sys.modules, "lejepa_fast.cpu_tiles", raising=False)
        monkeypatch.delitem(vars(lejepa_fast), "cpu_tiles", raising=False)
        compiled_tiles.cache_clear()

    yield becomes
    compiled_tiles.cache_clear()


def problem(*shape, M=40):
    return torch.randn(shape), sample_directions(shape[-1], M, step=0)


def test_they_run_in_float32_and_for_equidistant_knots(monkeypatch):
    taken = []
    for name in ("ecf_sums", "ecf_sums_backward"):
        function = getattr(cpu_tiles, name)
        monkeypatch.setattr(
            cpu_tiles, name, lambda *a, name=name, function=function: (taken.append(name), function(*a))[1]
        )
    x, A = problem(20, 6)
    evaluate(x.double(), A.double(), KNOTS, impl="torch")
    evaluate(x, A, arbitrary_knots(), impl="torch")
    evaluate(x, A, standard_normal_knots(3.0, 1), impl="torch")
    assert taken == []
    evaluate(x, A, KNOTS, impl="torch")
    assert taken == ["ecf_sums", "ecf_sums_backward"]


def test_a_missing_numba_is_no_news_and_a_broken_one_is_told_once(numba, caplog, monkeypatch):
    x, A = problem(2, 20, 6)
    numba(None)
    assert compiled_tiles() is None
    check_accuracy(x, A, KNOTS, impl="torch", reduction=None)
    assert not caplog.records
    numba(types.ModuleType("numba"))
    for _ in range(2):
        evaluate(x, A, KNOTS, impl="torch")
    (record,) = caplog.records
    assert "cannot import name 'carray' from 'numba'" in record.getMessage()
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # interpreted, the loops take seconds
    compiled_tiles.cache_clear()
    assert compiled_tiles() is None


def test_results_do_not_depend_on_threads_or_run():
    """Nor on other Python threads that call at the same time."""
    x, A = problem(3, 900, 8, M=600)  # two tiles of two slabs each
    before = torch.get_num_threads()

    def result(threads=None):
        if threads:
            torch.set_num_threads(threads)
        return evaluate(x, A, KNOTS, impl="torch", reduction=None)

    try:
        first = result(1)
        others = [result(threads) for threads in (1, 2, 3)]
        with ThreadPoolExecutor(4) as pool:
            others += pool.map(lambda _: result(), range(12))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other.value, first.value) for other in others)
    assert all(torch.equal(other.grad, first.grad) for other in others)


def _in_child(queue, x, A):
    torch.set_num_threads(1)  # as a DataLoader does in its workers
    queue.put(functional(x, A, KNOTS, impl="torch").item())


def test_a_forked_process_computes_too():
    """The value: after a backward pass in its parent, PyTorch refuses one in a forked process."""
    x, A = problem(1000, 8, M=100)
    expected = functional(x, A, KNOTS, impl="torch").item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, x, A))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.kill()


def test_projections_beyond_float32_phases_are_bounded():
    """2^22 half turns and more have no phase left; a cosine is one nevertheless."""
    x = torch.tensor([[1e7, 1e12, 1e30, -1e30]]).mT.reshape(1, 4, 1)
    sums = torch.ops.lejepa_fast.ecf_sums(x, torch.ones(1, 1), KNOTS.t.float(), KNOTS.spacing)
    assert sums.abs().max() <= 4.001


@pytest.mark.parametrize("size", [1.0, 1e3, 1e4])
def test_phases_are_reduced_without_rounding(size):
    """Projections on one dimension are exact; by a fused multiply-add their phases are, however large."""
    x, _ = problem(1, 64, 1)
    sums = cpu_tiles.ecf_sums(size * x, torch.ones(1, 1), torch.tensor([0.0, 0.25]), 0.25)[0, :, 1, 0]
    phases = 0.25 * (size * x).double()
    truth = torch.stack([phases.cos().sum(), phases.sin().sum()])
    torch.testing.assert_close(sums.double(), truth, rtol=0, atol=64 * 2e-7)
