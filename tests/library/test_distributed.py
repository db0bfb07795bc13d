"""SIGReg over real gloo processes: W ranks are one process on the concatenated batch."""

import multiprocessing

import distributed_worker as worker
import pytest
import torch
import torch.multiprocessing as mp

from lejepa_fast import SIGReg

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# What is slow to import: one process does it for all.
PRELOADED = ["lejepa_fast.regularizer", "torch.distributed._functional_collectives", "torch.distributed.fsdp"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results by number of ranks, for each rank; four processes, which start once, serve all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(worker.run, (str(folder),), nprocs=max(worker.EQUAL), start_method="forkserver")
    return {
        ranks: [torch.load(folder / f"{ranks}-{rank}.pt", weights_only=False) for rank in range(ranks)]
        for ranks in worker.EQUAL
    }


@pytest.fixture(params=list(worker.EQUAL), ids=lambda w: f"{w}-ranks")
def ranks(request, results):
    """Results of every rank."""
    return results[request.param]


def single_process(loss_fn, dtype):
    return worker.value_and_gradient(worker.encoder(dtype), worker.batch(dtype), loss_fn)


def assert_same(got, expected, tolerance):
    for part in ("value", "grad"):
        scale = expected[part].abs().max().item()
        torch.testing.assert_close(got[part], expected[part], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("impl", "dtype", "unbiased"), worker.CASES)
def test_value_and_averaged_gradient_are_those_of_the_whole_batch(ranks, impl, dtype, unbiased):
    """Of unequal shares."""
    same = "reference" if impl == "triton" else impl
    expected = single_process(lambda z: worker.functional_loss(z, same, unbiased), dtype)
    for result in ranks:
        assert_same(result[impl, dtype, unbiased], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_lejepa_loss_is_that_of_the_whole_batch(ranks, impl):
    """Modules made before the process group; both parts of the loss; the step advances on every rank."""
    loss_fn = worker.lejepa_loss(impl=impl)
    for use in range(2):
        expected = single_process(loss_fn, torch.float64)
        for result in ranks:
            got = result["lejepa", impl][use]
            torch.testing.assert_close(got["value"], expected["value"], rtol=1e-6, atol=0)  # float32 scalar
            torch.testing.assert_close(got["grad"], expected["grad"], rtol=1e-6, atol=1e-9)


def test_ranks_may_weigh_their_losses_differently(ranks):
    """The gradient is that of the mean of the ranks' losses."""
    mean_weight = (1 + len(ranks)) / 2
    expected = single_process(lambda z: worker.functional_loss(z, "torch", False), torch.float64)
    for result in ranks:
        torch.testing.assert_close(
            result["scaled"]["grad"], mean_weight * expected["grad"], rtol=1e-9, atol=1e-12
        )


def test_the_statistic_is_not_the_mean_of_local_statistics(ranks):
    """Guards the tests above: with these data the two differ."""
    local = torch.stack([result["local"] for result in ranks])
    whole = worker.functional_loss(worker.batch(torch.float64), "torch", False)
    assert (abs(local.mean() - whole) > 0.05 * whole) == (len(ranks) > 1)
    for rank, value in enumerate(local):
        x = worker.shard(worker.batch(torch.float64), worker.EQUAL[len(ranks)], rank)
        torch.testing.assert_close(value, worker.functional_loss(x, "torch", False))


def test_nan_on_one_rank_reaches_all(ranks):
    assert all(result["poisoned"].isnan() for result in ranks)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_no_sample_on_any_rank_is_nan_not_a_number(results, impl):
    """Nobody could raise without waiting for the count; the gradient of no samples is empty."""
    for result in results[2]:
        assert result["nothing", impl]["value"].isnan()
        assert result["nothing", impl]["grad"].shape == (worker.VIEWS, 0, worker.DIM)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiled_and_sharded_models_get_the_gradient_of_the_whole_batch(results, impl):
    """Compiled to one graph, collectives between the operators included."""
    loss_fn = worker.lejepa_loss(impl="torch" if impl == "torch" else "reference")
    dtype = torch.float64 if impl == "torch" else torch.float32
    for call in range(len(results[2][0][f"compiled {impl}"])):
        expected = single_process(loss_fn, dtype)
        for result in results[2]:
            assert_same(result[f"compiled {impl}"][call], expected, 1e-5)
    expected = single_process(lambda z: worker.functional_loss(z, "reference", False), torch.float32)
    for result in results[2]:
        assert_same(result[f"fsdp {impl}"], expected, 1e-5)


def test_all_ranks_try_the_kernels_at_the_same_call(results):
    x, module = worker.batch(torch.float32), SIGReg(num_slices=worker.SLICES, impl="torch")
    for number, size in enumerate((8, 5)):
        expected = module(x[:, :size])
        for result in results[2]:
            torch.testing.assert_close(result["trial"][number]["value"], expected)


def test_counts_that_neither_bf16_nor_16_bits_can_hold(results):
    x = worker.many_samples().requires_grad_()
    expected = worker.functional_loss(x, "torch", True)
    expected.backward()
    for result, own in zip(results[2], x.grad.split(worker.MANY), strict=True):
        torch.testing.assert_close(result["many"]["value"], expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(result["many"]["grad"], 2 * own, rtol=1e-2, atol=1e-8)  # bf16


def test_process_group_of_some_ranks(results):
    shards = [worker.shard(worker.batch(torch.float64), worker.EQUAL[4], r) for r in range(4)]
    for rank, result in enumerate(results[4]):
        first = rank - rank % 2
        pair = torch.cat(shards[first : first + 2], dim=1).requires_grad_()
        expected = worker.functional_loss(pair, "torch", False)
        expected.backward()
        torch.testing.assert_close(result["subgroup"]["value"], expected.detach())
        # The gradient of the sum of the two ranks' losses: what averaging over the pair turns into the mean.
        own = pair.grad.chunk(2, dim=1)[rank % 2]
        torch.testing.assert_close(result["subgroup"]["grad"], 2 * own)
        assert result["foreign group"].startswith("process_group: expected a group that this rank belongs")
        value, value_of_copy, same_group = result["copy"]
        assert torch.equal(value, value_of_copy)
        assert same_group
    assert torch.equal(*results[4][0]["alone"])
