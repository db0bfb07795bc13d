"""SIGReg over real gloo processes: W ranks are one process on the concatenated batch."""

import distributed_worker as worker
import pytest
import torch
import torch.multiprocessing as mp

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
two_ranks_only = "two ranks only, to save time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of every number of ranks and rank; four processes, which start once, serve all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")  # impl="triton" on CPU tensors, in these processes only
        mp.spawn(worker.run, args=(str(folder),), nprocs=max(worker.EQUAL))
    return folder


@pytest.fixture(scope="module", params=list(worker.EQUAL), ids=lambda w: f"{w}-ranks")
def ranks(request, folder):
    """Results of every rank."""
    return [torch.load(folder / f"{request.param}-{r}.pt", weights_only=False) for r in range(request.param)]


def single_process(loss_fn, dtype):
    return worker.value_and_gradient(worker.encoder(dtype), worker.batch(dtype), loss_fn)


def assert_same(got, expected, tolerance):
    for part in ("value", "grad"):
        scale = expected[part].abs().max().item()
        torch.testing.assert_close(got[part], expected[part], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize(("impl", "dtype", "unbiased"), worker.CASES)
def test_value_and_averaged_gradient_are_those_of_the_whole_batch(ranks, sizes, impl, dtype, unbiased):
    expected = single_process(
        lambda z: worker.functional_loss(z, "reference" if impl == "triton" else impl, unbiased), dtype
    )
    for results in ranks:
        assert_same(results[sizes, impl, dtype, unbiased], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_lejepa_loss_is_that_of_the_whole_batch(ranks, sizes, impl):
    """Modules made before the process group; both parts of the loss; the step advances on every rank.

    The second use of a module draws the directions of step 1.
    """
    loss_fn = worker.lejepa_loss(impl=impl)
    expected = [single_process(loss_fn, torch.float64) for _ in range(2)][sizes == "unequal"]
    for results in ranks:
        got = results[sizes, "lejepa", impl]
        torch.testing.assert_close(got["value"], expected["value"], rtol=1e-6, atol=0)  # float32 scalar
        torch.testing.assert_close(got["grad"], expected["grad"], rtol=1e-6, atol=1e-9)


def test_ranks_may_weigh_their_losses_differently(ranks):
    """The gradient is that of the mean of the ranks' losses."""
    mean_weight = (1 + len(ranks)) / 2
    expected = single_process(lambda z: worker.functional_loss(z, "torch", False), torch.float64)
    for results in ranks:
        torch.testing.assert_close(
            results["scaled"]["grad"], mean_weight * expected["grad"], rtol=1e-9, atol=1e-12
        )


def test_the_statistic_is_not_the_mean_of_local_statistics(ranks):
    """Guards the tests above: with these data the two differ."""
    if len(ranks) == 1:
        pytest.skip("one rank has only its local statistic")
    local = torch.stack([results["local"] for results in ranks])
    whole = worker.functional_loss(worker.batch(torch.float64), "torch", False)
    assert abs(local.mean() - whole) > 0.05 * whole
    for rank, value in enumerate(local):
        x = worker.shard(worker.batch(torch.float64), worker.EQUAL[len(ranks)], rank)
        torch.testing.assert_close(value, worker.functional_loss(x, "torch", False))


def test_nan_on_one_rank_reaches_all(ranks):
    assert all(results["poisoned"].isnan() for results in ranks)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_no_sample_on_any_rank_is_nan_not_a_number(ranks, impl):
    """Nobody could raise without waiting for the count; the gradient of no samples is empty."""
    if len(ranks) == 1:
        pytest.skip("one rank refuses an empty batch by name")
    for results in ranks:
        assert results["nothing", impl]["value"].isnan()
        assert results["nothing", impl]["grad"].shape == (worker.VIEWS, 0, worker.DIM)


@pytest.mark.parametrize("case", ["compiled", "compiled kernels", "fsdp torch", "fsdp triton"])
def test_compiled_and_sharded_models_get_the_gradient_of_the_whole_batch(ranks, case):
    """Compiled to one graph, collectives between the operators included."""
    if len(ranks) != 2:
        pytest.skip(two_ranks_only)
    dtype = torch.float64 if case == "compiled" else torch.float32
    compiled = worker.lejepa_loss(impl="torch" if case == "compiled" else "reference")
    sharded = lambda z: worker.functional_loss(z, "reference", False)  # noqa: E731
    expected = single_process(compiled if case.startswith("compiled") else sharded, dtype)
    for results in ranks:
        assert_same(results[case], expected, 1e-5)


def test_counts_that_neither_bf16_nor_16_bits_can_hold(ranks):
    if len(ranks) != 2:
        pytest.skip(two_ranks_only)
    x = worker.many_samples().requires_grad_()
    expected = worker.functional_loss(x, "torch", True)
    expected.backward()
    for results, own in zip(ranks, x.grad.split(worker.MANY), strict=True):
        torch.testing.assert_close(results["many"]["value"], expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(results["many"]["grad"], 2 * own, rtol=1e-2, atol=1e-8)  # bf16


def test_process_group_of_some_ranks(ranks):
    if len(ranks) != 4:
        pytest.skip("needs four ranks for two groups")
    shards = [worker.shard(worker.batch(torch.float64), worker.EQUAL[4], r) for r in range(4)]
    for rank, results in enumerate(ranks):
        first = rank - rank % 2
        pair = torch.cat(shards[first : first + 2], dim=1).requires_grad_()
        expected = worker.functional_loss(pair, "torch", False)
        expected.backward()
        torch.testing.assert_close(results["subgroup"]["value"], expected.detach())
        # The gradient of the sum of the two ranks' losses: what averaging over the pair turns into the mean.
        own = pair.grad.chunk(2, dim=1)[rank % 2]
        torch.testing.assert_close(results["subgroup"]["grad"], 2 * own)
        assert results["foreign group"].startswith("process_group: expected a group that this rank belongs")
        value, value_of_copy, same_group = results["copy"]
        assert torch.equal(value, value_of_copy)
        assert same_group
    assert torch.equal(*ranks[0]["alone"])
