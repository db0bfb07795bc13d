"""Sharded, recomputed, compiled, resumed on other numbers of ranks: the same training each time."""

from dataclasses import replace
from typing import Any

import parallel_worker as worker
import pytest
import torch
from torch import nn
from training import CPU, course_of, rows_of, run_ranks, same, train_only

import lejepa_fast
from lejepa_fast.errors import UsageError
from lejepa_fast.train import export
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.config import ModelConfig, ParallelConfig
from lejepa_fast.train.engine.trainer import facts_of
from lejepa_fast.train.evaluation.protocol import open_splits
from lejepa_fast.train.model import initialize
from lejepa_fast.train.model.initialize import named_tensors
from lejepa_fast.train.model.model import build_encoder, build_model
from lejepa_fast.train.parallel import parallelize
from lejepa_fast.train.parallel.blocks import find_blocks
from lejepa_fast.train.parallel.parallelize import choose_strategy
from lejepa_fast.train.runtime.world import first_difference

Ranks = list[dict[str, Any]]

# ---- two ranks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(image_folder, tmp_path_factory):
    """A run of one process on the whole batch."""
    folder = tmp_path_factory.mktemp("parallel")
    cfg = worker.run_config(str(image_folder), folder / "one")
    worker.train(cfg, CPU)
    return cfg


@pytest.fixture(scope="module")
def ranks(one, image_folder):
    """Results of two ranks; one pair of processes serves all tests of this file."""
    folder = folder_of(one)
    run_ranks(worker.run, 2, str(folder), str(image_folder), ranks=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def folder_of(one):
    return one.out.parent


def check_same_course(one, name, *, first=1, rel=1e-05):
    """The run called `name` has the losses, probes and averaged weights of `one`, from step `first` on."""
    other = replace(one, out=folder_of(one) / name)
    expected = {row["step"]: row for row in rows_of(one) if row["step"] >= first}
    found = {row["step"]: row for row in rows_of(other)}
    assert list(found) == list(expected) == [row["step"] for row in rows_of(other)]  # one rank writes
    for step, row in expected.items():
        for part in ("loss", "prediction", "sigreg"):
            assert found[step][part] == pytest.approx(row[part], rel=rel), (step, part)
    # The norm before clipping, which scales the step: of all shards, not of one.
    assert found[first]["grad_norm"] == pytest.approx(expected[first]["grad_norm"], rel=10 * rel)
    assert expected[first]["grad_norm"] > one.optim.clip_grad_norm
    losses = [row["loss"] for row in expected.values()]
    assert max(losses) / min(losses) > 1.001  # they moved: the tolerance compares something
    probes = [{row["step"]: (row["knn"], row["linear"]) for row in rows_of(c, "eval")} for c in (other, one)]
    assert probes[0][8] == probes[1][8]
    assert None not in probes[0][8]

    mine, theirs, weights = (
        checkpoint.load_model(folder_of(one) / run / "checkpoints" / "step-00000012", section)
        for run, section in ((name, "average"), ("one", "average"), ("one", "model"))
    )
    assert mine.keys() == theirs.keys()
    moved = 0.0
    for key, value in theirs.items():
        # Against how far the average is from the weights: without a gradient, AdamW steps on rounding.
        away = float((weights[key] - value).norm())
        assert float((mine[key] - value).norm()) <= 1e-4 * float(value.norm()) + 0.05 * away, key
        moved += away
    assert moved > 1e-3


@pytest.mark.parametrize(("name", "first"), [("ddp", 1), ("fsdp", 1), ("one to fsdp", 7)])
def test_two_ranks_equal_one_process(name, first, one, ranks):
    """From the start, or from the middle of a run of one process."""
    check_same_course(one, name, first=first)
    for results in ranks:
        assert results[name]["sigreg step"] == worker.STEPS
        assert (results[name]["sharded"] > 0) == (name != "ddp")


@pytest.mark.slow
def test_two_groups_of_two_ranks_equal_one_process(one, image_folder):
    """HSDP: each group holds the model once, half of it on each of its ranks."""
    folder = folder_of(one)
    run_ranks(worker.run_groups, 4, str(folder), str(image_folder), ranks=4)
    check_same_course(one, "groups")
    held = [torch.load(folder / f"rank{rank}-groups.pt", weights_only=True) for rank in range(4)]
    for name, (shape, first) in held[0].items():
        second = held[1][name][1]
        assert first.numel() + second.numel() == torch.Size(shape).numel(), name
        assert torch.equal(held[2][name][1], first), name  # the other group's, bit for bit
        assert torch.equal(held[3][name][1], second), name


def test_recomputed_and_compiled_it_is_the_same(one, ranks):
    check_same_course(one, "compiled", rel=1e-4)
    for results in ranks:
        graphs = results["compiled"]["graphs"]
        assert graphs[2] > 0
        assert graphs[2:] == [graphs[2]] * (worker.STEPS - 2)  # nothing is compiled after step 3


def test_a_run_goes_on_on_fewer_ranks(one, ranks):
    """A sharded one; test_faults.py has one under DDP."""
    out = folder_of(one) / "fsdp to one"
    cfg = replace(one, out=out, resume=str(folder_of(one) / "fsdp" / "checkpoints" / "step-00000006"))
    worker.train(cfg, CPU)
    check_same_course(one, out.name, first=7)


def test_a_sharded_run_is_evaluated_and_exported_whole(one, ranks):
    run = folder_of(one) / "fsdp"
    assert (run / "report" / "report.html").exists()
    assert [row["step"] for row in rows_of(replace(one, out=run), "eval")] == [8, 12]
    out = run / "again.safetensors"  # of the average
    assert export.main(["--checkpoint", str(run), "--out", str(out)]) == 0
    assert out.read_bytes() == (run / "encoder.safetensors").read_bytes()


def test_copies_that_differ_are_saved_from_rank_0(one, ranks):
    """As running statistics do on the CPU: a mixture would be of no rank."""
    saved = checkpoint.load_model(folder_of(one) / "copies" / "step-00000001")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {str(i): [0.0] * 3 for i in range(4)}


def test_an_error_ends_all_ranks_and_rank_0_tells_it(ranks):
    """Rank 0 alone cannot hold the whole model; all ranks refuse another model's checkpoint."""
    assert "out of memory; what helps: " in ranks[0]["no room"]
    assert ranks[1]["no room"] == "rank 0 failed with OutOfMemoryError; see its message"
    for results in ranks:
        message, left_to_rank_0 = results["refused"]
        assert "is of model test_vit (kwargs" in message
        assert left_to_rank_0


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("other options", "--optim.lr is 0.0002 on rank 0 and 0.1 on rank 1"),
        ("other images", "number of training images is 32 on rank 0 and 31 on rank 1"),
        ("other kernels", "implementation of SIGReg in use is 'triton' on rank 0 and 'torch' on rank 1"),
        ("other loader", "backend of the data in use is 'dali' on rank 0 and 'cpu' on rank 1"),
    ],
)
def test_ranks_that_disagree_end_before_the_first_step(name, difference, one, ranks):
    """All with the same error, which rank 0 tells; else they would train other models, or hang."""
    for results in ranks:
        message, left_to_rank_0 = results[name]
        assert message.startswith(f"ranks differ: {difference}; start all ranks with the same options")
        assert left_to_rank_0
    assert not (folder_of(one) / name).exists()


def test_nans_on_one_rank_change_no_shard_and_their_images_are_written_down(one, ranks):
    for results in ranks:
        assert results["nan"]["changed"] == [1, 3, 4]
        assert results["nan"]["skipped"] == 4
        assert "not finite in 3 steps in a row (last: rank 1, step 7, loss nan)" in results["nan"]["error"]
        assert results["nan"]["left to rank 0"]
    rows = rows_of(replace(one, out=folder_of(one) / "nan"), "skipped")
    assert [(row["step"], row["rank"], row["loss"]) for row in rows] == [(s, 1, None) for s in (2, 5, 6, 7)]
    taken = ranks[1]["nan"]["images"]
    assert [row["ids"] for row in rows] == [taken[step - 1] for step in (2, 5, 6, 7)]
    source = open_splits(one.data)[0]
    assert rows[0]["images"] == [source.describe(index) for index in taken[1]]


def test_a_finite_spike_on_one_rank_changes_nothing_on_any(one, ranks):
    """Bit for bit, here under DDP; the norm of the gradient is that of all ranks, so the images of all are
    written down."""
    for results in ranks:
        assert results["spike"]["changed"] == [1, 3]
        assert (results["spike"]["skipped"], results["spike"]["error"]) == (1, "")
    rows = rows_of(replace(one, out=folder_of(one) / "spike"), "skipped")
    assert [(row["step"], row["rank"]) for row in rows] == [(2, 0), (2, 1)]
    assert 0 < 1e4 * rows[0]["loss"] < rows[1]["loss"] < float("inf")
    assert [row["ids"] for row in rows] == [results["spike"]["images"][1] for results in ranks]


@pytest.mark.parametrize("name", worker.FAMILIES)
def test_every_family_shards(name, ranks):
    """Bit for bit timm's weights of the seed, buffers outside the state dict included, also on one device,
    and copied to the second model for the center of the views; the same loss and averaged gradient under
    FSDP2 as under DDP."""
    cfg = worker.family_config(name)
    expected = dict(named_tensors(build_model(cfg)))
    model = build_model(cfg, meta=True)
    assert all(tensor.is_meta for tensor in model.parameters())
    parallelize.parallelize(model, cfg, None, CPU.device)
    assert same(dict(named_tensors(model)), expected)
    for results in ranks:
        ddp, fsdp = results[name]["ddp"], results[name]["fsdp"]
        for found in (ddp, fsdp):
            assert same(found["weights"], expected)
            assert same(found["copied"], expected)
        torch.testing.assert_close(fsdp["loss"], ddp["loss"], rtol=1e-5, atol=0)
        assert fsdp["grads"].keys() == ddp["grads"].keys()
        norm = torch.stack([g.norm() for g in ddp["grads"].values()]).norm()
        for key, grad in ddp["grads"].items():
            assert (fsdp["grads"][key] - grad).norm() <= 1e-4 * norm, key


# ---- one process -------------------------------------------------------------------------------------


def test_the_first_difference_between_ranks_is_named_in_a_short_line(tiny, monkeypatch):
    same, version = facts_of(tiny(out="a")), lejepa_fast.__version__
    assert same["version of torch"] == torch.__version__
    for changes, difference in (
        ({"data": {"batch_size": 6}}, "--data.batch-size is 8 on rank 0, 2 and 6 on rank 1"),
        ({"log_every": 5, "checkpoint_every": 7}, "--log-every is 1 on rank 0, 2 and 5 on rank 1"),
        ({"data": {"path": "/copy", "workers": 3, "prefetch": 1}}, None),  # as machines may
        (
            {"out": "b"},
            "--out (give --out; its default depends on --data.path) is 'a' on rank 0, 2 and 'b' on rank 1",
        ),
    ):
        other = facts_of(tiny(**{"out": "a", **changes}))
        assert first_difference([same, other, same]) == difference
    monkeypatch.setattr("lejepa_fast.__version__", "9.9")
    other = facts_of(tiny(out="a", seed=5))
    assert (
        first_difference([same, other])
        == f"version of lejepa_fast is {version!r} on rank 0 and '9.9' on rank 1"
    )
    assert first_difference([{"seed": rank % 9} for rank in range(99)]) == (
        "seed is 0 on rank 0, 9, 18, 27, 36, 45, ... and 1 on rank 1, 10, 19, 28, 37, 46, ... "
        "and 2 on rank 2, 11, 20, 29, 38, 47, ..."
    )


def tied(cfg, *, meta=False):
    model = build_model(cfg, meta=meta)
    model.encoder.norm.weight = model.encoder.norm.bias
    return model


def test_shared_parameters_are_refused_or_copied_under_each_name(tiny, monkeypatch):
    with pytest.raises(UsageError, match=r"share a parameter.*--parallel\.strategy ddp"):
        initialize.initialize(tied(tiny(), meta=True), tiny(), CPU.device)
    model = tied(tiny())
    nn.init.normal_(model.encoder.norm.bias)
    monkeypatch.setattr(initialize, "build_model", tied)
    whole = initialize.whole_model(model, tiny(), CPU, {})
    assert whole is not None
    assert same(whole.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0"])
def test_on_gpus_batchnorm_is_global_and_otherwise_the_same(name):
    """As far as a CPU can tell: every BatchNorm synchronizes, and in evaluation mode nothing has changed, the
    activations included that timm's hold."""
    model = build_model(worker.family_config(name)).eval()
    images = torch.randn(2, 3, 64, 64)
    for norm in filter(parallelize._is_batchnorm, model.modules()):
        nn.init.normal_(norm.running_mean)
        nn.init.normal_(norm.bias)
    _, before = model([images, images])
    synchronized = parallelize._with_global_batchnorm(model, torch.device("cuda"), 2)
    norms = list(filter(parallelize._is_batchnorm, synchronized.modules()))
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert any(norm in norms for norm in synchronized.projector.modules())
    _, after = synchronized([images, images])
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("name", "ranks", "compiled"),
    [("resnet50", 1, 4), ("resnet50", 2, 0), ("vit_small_patch16_224", 2, 2)],
)
def test_what_synchronizes_inside_is_not_compiled(name, ranks, compiled, monkeypatch):
    """The projector's BatchNorm is in no block. Here SyncBatchNorm cannot be traced, as between two GPUs."""
    normalize = nn.SyncBatchNorm.forward

    def untraceable(norm, x):
        torch._dynamo.graph_break()
        return normalize(norm, x)

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", untraceable)
    monkeypatch.setattr(parallelize, "COMPILE_BACKEND", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cfg = replace(worker.family_config(name), compile="on")
    model = parallelize._with_global_batchnorm(build_model(cfg), torch.device("cuda"), ranks)
    blocks = list(find_blocks(model.encoder).values())
    parallelize.compile_blocks(blocks, CPU.device)
    model([torch.randn(2, 3, 64, 64)] * 2)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == (compiled > 0)
    assert len(parallelize.compilable(blocks)) == compiled


@pytest.mark.parametrize(
    ("name", "count", "kind", "covered"),
    [
        ("vit_small_patch16_224", 12, "Block", 0.98),
        ("resnet50", 16, "Bottleneck", 0.99),
        ("convnextv2_nano", 14, "ConvNeXtBlock", 0.9),
        ("swin_tiny_patch4_window7_224", 12, "SwinTransformerBlock", 0.9),
        ("maxvit_tiny_rw_224", 11, "MaxxVitBlock", 0.99),
        ("efficientnet_b0", 16, "InvertedResidual", 0.85),
        ("regnety_004", None, None, 0.9),
        ("densenet121", None, None, 0.8),
        ("levit_128s", None, None, 0.8),
    ],
)
def test_blocks_are_found(name, count, kind, covered):
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(name))
    blocks = find_blocks(encoder)
    modules = dict(encoder.named_modules())
    assert all(modules[block] is module for block, module in blocks.items())
    sizes = [sum(p.numel() for p in module.parameters()) for module in blocks.values()]
    whole = sum(p.numel() for p in encoder.parameters())
    assert covered * whole <= sum(sizes) <= whole  # more: they would overlap
    assert max(sizes) <= 0.35 * whole
    if count is not None:
        assert len(blocks) == count
        assert sum(type(module).__name__ == kind for module in blocks.values()) >= count - 1


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("test_vit", "none"), ("test_vit", "full"), ("test_resnet", "none")],
)
def test_two_sizes_of_crops_compile_once(name, recompute, tiny, monkeypatch):
    """Drop path differs from block to block. Evaluation in between, on other sizes, compiles nothing. Two
    ranks have selective recomputation."""
    monkeypatch.setattr(parallelize, "COMPILE_BACKEND", "aot_eager")
    torch._dynamo.reset()
    cfg = tiny(
        model={"name": name, "drop_path": 0.2},
        parallel={"activation_checkpointing": recompute},
        compile="on",
        max_steps=6,
        eval={"every": 1, "batch_size": 7, "linear_steps": 0},
    )
    torch._dynamo.utils.counters.clear()
    graphs = worker.train(cfg, CPU)["graphs"]
    # One for each size: of the first transformer block, which has no drop path, and of all the others; of
    # each residual block, since every one has another width.
    assert graphs[0] == {"test_vit": 4, "test_resnet": 8}[name]
    assert graphs == [graphs[0]] * 6
    assert len(rows_of(cfg, "eval")) == 1  # after step 4


def test_a_compiler_that_fails_is_told_once_and_done_without(tiny, monkeypatch, caplog):
    def failing(graph, inputs):
        raise RuntimeError("ptxas was not found\nand more")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: failing)
    parallelize.warn_once.cache_clear()
    torch._dynamo.reset()
    runs = [tiny(compile=mode, max_steps=2, out=tiny().out / mode) for mode in ("off", "on")]
    for cfg in runs:
        train_only(cfg)
    assert course_of(runs[0]) == course_of(runs[1])
    (warning,) = (text for text in caplog.messages if text.startswith("torch.compile"))
    assert warning == ("torch.compile failed (ptxas was not found): blocks run uncompiled, which is slower")


def test_dynamo_may_start_over(monkeypatch):
    """Inductor asks for it where a block has a float that it must take as a constant."""

    def again(graph, inputs):
        raise torch._dynamo.exc.TensorifyScalarRestartAnalysis

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: again)
    with pytest.raises(torch._dynamo.exc.RestartAnalysis):
        parallelize.compile_or_not(torch.fx.GraphModule({}, torch.fx.Graph()), [])


@pytest.mark.parametrize("name", worker.FAMILIES)
def test_recomputation_changes_no_gradient_or_statistic_and_keeps_less(name):
    grads, buffers, kept = {}, {}, {}
    for mode in ("none", "selective", "full"):
        cfg = worker.family_config(name, activation_checkpointing=mode)
        model = build_model(cfg)
        parallelize.parallelize(model, cfg, None, CPU.device)
        torch.manual_seed(0)
        views = [torch.randn(2, 3, 64, 64)] * 2
        sizes: dict[int, int] = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, z = model(views)
        z.square().mean().backward()
        kept[mode] = sum(sizes.values())
        grads[mode] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        buffers[mode] = dict(model.named_buffers())
    assert kept["full"] < kept["none"]
    for mode in ("selective", "full"):
        for key, grad in grads["none"].items():
            torch.testing.assert_close(grads[mode][key], grad, rtol=1e-4, atol=1e-5)
        for key, buffer in buffers["none"].items():
            assert torch.equal(buffers[mode][key], buffer), key


def test_auto_takes_what_fits():
    auto = ParallelConfig()
    assert choose_strategy(auto, 2_000_000_000, ranks=None) == "none"
    assert choose_strategy(auto, 300_000_000, ranks=2) == "ddp"
    assert choose_strategy(auto, 600_000_000, ranks=2) == "fsdp"
    assert choose_strategy(ParallelConfig(replicate=2), 1000, ranks=2) == "fsdp"


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"strategy": "fsdp"}, None, r"parallel\.strategy: fsdp needs a process group.*torchrun"),
        ({"strategy": "ddp", "replicate": 2}, 2, r"parallel\.replicate: 2 needs FSDP"),
        ({"replicate": 2}, None, r"parallel\.replicate: 2 needs FSDP, and this run uses none"),
    ],
)
def test_what_cannot_be_had_is_named(options, ranks, message):
    with pytest.raises(UsageError, match=message):
        choose_strategy(ParallelConfig(**options), 1000, ranks=ranks)
