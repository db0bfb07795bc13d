"""From a model on the meta device to one that trains.

`parallelize` works in torchtitan's order (https://github.com/pytorch/torchtitan): activation checkpointing,
`torch.compile` and FSDP2's `fully_shard` of each block, then memory and weights (`initialize.py`), so that no
process holds more than its share of a model.

Recomputation and compilation replace a block's `forward` and wrap no module: the state dict has the same
names under every setting. The loss already accounts for the averaging of gradients over ranks, so nothing
here scales gradients.

On several GPUs BatchNorm becomes SyncBatchNorm, and blocks that contain it are not compiled. PyTorch has no
SyncBatchNorm for CPU tensors: under gloo every rank normalizes its own share of the batch.
"""

import contextlib
import functools
import inspect
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.utils.checkpoint as recomputation
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lejepa_fast.errors import UsageError, first_line
from lejepa_fast.train.config import Config, ParallelConfig
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.model.center import CenterFromAverage, without_noise
from lejepa_fast.train.model.drop_path import share_drop_path
from lejepa_fast.train.model.initialize import copy_values, initialize
from lejepa_fast.train.model.masked import MaskedModel
from lejepa_fast.train.model.model import LeJEPAModel, TrainedModule, build_model
from lejepa_fast.train.parallel.blocks import find_blocks

log = logging.getLogger("lejepa_fast.train")

Strategy = Literal["none", "ddp", "fsdp"]

# From here on `--parallel.strategy auto` takes FSDP2. DDP holds 16 bytes per parameter on every GPU (weights,
# gradients and two moments in float32), here 8 GB, and sums all gradients in float32.
FSDP_FROM_PARAMETERS = 500_000_000

COMPILE_BACKEND = "inductor"

# Buffers need no broadcast at each forward: running statistics are equal on all ranks (GPU), or rank 0's are
# saved (CPU). The option's name changed in torch 2.15.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
_BUFFER_OPTION = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


def choose_strategy(options: ParallelConfig, parameters: int, *, ranks: int | None) -> Strategy:
    """Resolve `parallel.strategy` for a model of this size; `ranks` is None without a process group.

    UsageError if the strategy needs another number of processes, or an option another strategy.
    """
    sharded = options.replicate > 1 or parameters >= FSDP_FROM_PARAMETERS
    auto: Strategy = "none" if ranks is None else "fsdp" if sharded else "ddp"
    chosen = auto if options.strategy == "auto" else options.strategy
    if chosen == "none" and ranks is not None and ranks > 1:
        raise UsageError(f"parallel.strategy: none trains {ranks} separate models; use ddp, fsdp or auto")
    if chosen != "none" and ranks is None:
        raise UsageError(
            f"parallel.strategy: {chosen} needs a process group; start with "
            "torchrun --nproc-per-node N train/pretrain.py, or use --parallel.strategy auto"
        )
    if options.replicate > 1 and chosen != "fsdp":
        raise UsageError(
            f"parallel.replicate: {options.replicate} needs FSDP, and this run uses {chosen}; use "
            "--parallel.strategy fsdp under torchrun, or leave it out"
        )
    return chosen


def make_mesh(options: ParallelConfig, device_type: str) -> DeviceMesh | None:
    """Make the mesh of all ranks: ("shard",), or ("replicate", "shard") for HSDP; None without a group."""
    if not dist.is_initialized():
        return None
    size, groups = dist.get_world_size(), options.replicate
    shape, names = ((groups, size // groups), ("replicate", "shard")) if groups > 1 else ((size,), ("shard",))
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


def parallelize(
    model: TrainedModule, cfg: Config, mesh: DeviceMesh | None, device: torch.device, *, weights: bool = True
) -> nn.Module:
    """Make a model ready to train on `device`, in place.

    A model on the meta device gets memory and the weights of `cfg.seed`, the same for every number of ranks;
    with `weights=False`, enough to plan with, it stays there. `mesh` is that of `make_mesh`. Returns the
    module to call in the training step: `model` itself, or a DDP wrapper over it.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    strategy = choose_strategy(cfg.parallel, parameters, ranks=mesh.size() if mesh is not None else None)
    if mesh is not None:
        model = _with_global_batchnorm(model, device, mesh.size())
    parts = blocks_by_part(model)
    frozen = parts.get("target", [])
    compiling = compiles(cfg, device)
    trained = [block for name, blocks in parts.items() if name != "target" for block in blocks]
    recompute(trained, cfg.parallel.activation_checkpointing, compilable(trained) if compiling else [])
    if compiling:
        compile_blocks(trained, device, ragged=isinstance(model, MaskedModel))
        compile_blocks(frozen, device)
    if strategy == "fsdp":
        assert mesh is not None
        shard(model, parts, mesh, compute_dtype(cfg, device))
    if weights:
        initialize(model, cfg, device)
    if strategy != "ddp":
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    options: dict[str, Any] = {"gradient_as_bucket_view": True, _BUFFER_OPTION: False}
    return DistributedDataParallel(model, device_ids=device_ids, **options)


def center_model(
    model: TrainedModule, cfg: Config, mesh: DeviceMesh | None, device: torch.device, *, weights: bool = True
) -> LeJEPAModel | None:
    """A second model for the center of the views, with the values of `model`, which `parallelize` made ready:
    sharded and compiled alike, but without a gradient. None if the run takes the center from the first.

    `mesh`, `device` and `weights`: as of `parallelize`.
    """
    if cfg.loss.center_from == "views":
        return None
    sharded = isinstance(model, FSDPModule)
    second = build_model(cfg, meta=sharded or not weights)
    if mesh is not None:
        second = _with_global_batchnorm(second, device, mesh.size())
    assert isinstance(second, LeJEPAModel)  # see config.validate
    without_noise(second)
    parts = blocks_by_part(second)
    if compiles(cfg, device):
        compile_blocks(parts["encoder"], device)
    if sharded:
        assert mesh is not None
        shard(second, parts, mesh, compute_dtype(cfg, device), trained=False)
    if weights:
        copy_values(second, model, cfg, device)
    return second


def add_average(
    model: TrainedModule,
    called: nn.Module,
    second: LeJEPAModel | None,
    cfg: Config,
    mesh: DeviceMesh | None,
    total_steps: int,
) -> tuple[WeightAverage | None, nn.Module]:
    """Return the average of the weights of `model`, if the run keeps one, and the module to call in the
    training step: `called`, of `parallelize`, or with a `center_model` one that takes the center from it."""
    if cfg.average.kind == "none":
        return None, called
    average = WeightAverage(model, cfg.average, total_steps, into=second)
    if second is None:
        return average, called
    views = cfg.crops.global_crops if cfg.loss.center == "global" else cfg.crops.num_views
    joint = CenterFromAverage(called, second, average, views)
    if isinstance(model, FSDPModule):
        assert mesh is not None
        # One root for both models: FSDP2 ends a step of all its modules in the backward pass of the root.
        fully_shard(joint, mesh=mesh)
    return average, joint


def blocks_by_part(model: TrainedModule) -> dict[str, list[nn.Module]]:
    """The blocks of the encoder and, of masked prediction, of the predictor and the target encoder."""
    parts = {name: getattr(model, name, None) for name in ("encoder", "predictor", "target")}
    return {name: list(find_blocks(part).values()) for name, part in parts.items() if part is not None}


# ---- activation checkpointing ----------------------------------------------------------------------------

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.convolution.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def recompute(blocks: list[nn.Module], mode: str, compiled: list[nn.Module]) -> None:
    """Recompute each block's activations in the backward pass: all of them ("full") or the cheap ones."""
    if mode == "none":
        return
    # Dynamo warns that in-place operators break selective checkpointing; they are switched off below.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for block in blocks:
        options: dict[str, Any] = {"use_reentrant": False}  # no `context_fn`: Dynamo cannot trace an idle one
        if mode == "selective":
            options["context_fn"] = _selective_contexts
            for module in block.modules():
                if getattr(module, "inplace", False):
                    module.inplace = False  # type: ignore[assignment]
        norms = [module for module in block.modules() if _is_batchnorm(module)]
        # A block that will be compiled updates its running statistics in its forward graph, which runs once.
        if norms and block not in compiled:
            contexts = options.get("context_fn", recomputation.noop_context_fn)
            options["context_fn"] = functools.partial(_with_frozen_statistics, norms, contexts)
        block.forward = functools.partial(recomputation.checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _with_frozen_statistics(norms: list[nn.Module], contexts: Any) -> tuple[Any, Any]:
    """The contexts of forward and recomputation; the second one leaves running statistics unchanged."""

    @contextlib.contextmanager
    def frozen(inner: AbstractContextManager[Any]) -> Iterator[None]:
        kept = [(n, name, value) for n in norms if n.training for name, value in n.named_buffers()]
        try:
            # Other buffers, not none: the norm must save as many tensors for backward as the first time.
            for norm, name, buffer in kept:
                setattr(norm, name, torch.zeros_like(buffer))
            with inner:  # after the line above, because it counts operators
                yield
        finally:
            for norm, name, buffer in kept:
                setattr(norm, name, buffer)

    first, again = contexts()
    return first, frozen(again)


def _selective_contexts() -> tuple[Any, Any]:
    """Keep attention and every second matrix product or convolution: most of the time, half the memory."""
    counts = {False: 0, True: 0}  # in the forward pass, in the recomputation

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> recomputation.CheckpointPolicy:
        if op in _PRODUCTS:
            counts[context.is_recompute] += 1
        if op in _ATTENTION or (op in _PRODUCTS and counts[context.is_recompute] % 2):
            return recomputation.CheckpointPolicy.MUST_SAVE
        return recomputation.CheckpointPolicy.PREFER_RECOMPUTE

    return recomputation.create_selective_checkpoint_contexts(policy)


# ---- compilation -----------------------------------------------------------------------------------------


def compiles(cfg: Config, device: torch.device) -> bool:
    """Whether the blocks of this run are compiled."""
    return cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")


def compile_blocks(blocks: list[nn.Module], device: torch.device, *, ragged: bool = False) -> None:
    """Compile the forward of each block that can be; equal blocks share one graph per size of crops.

    A run has two sizes that occur at every step, so sizes are constants of the graphs; a shape that varies
    (the last batch of an evaluation) runs uncompiled (`eagerly`). With `ragged`, the number of tokens differs
    from step to step, and is a variable of the graphs.
    """
    config = torch._dynamo.config
    # Blocks that differ, for example in width, count as recompilations of one function, once per size.
    config.recompile_limit += 4 * len(blocks)
    config.accumulated_recompile_limit += 4 * len(blocks)
    config.optimize_ddp = False  # it would cut graphs at DDP's buckets, which are larger than a block
    found = compilable(blocks)
    if skipped := len(blocks) - len(found):
        reason = "PyTorch cannot compile SyncBatchNorm (pytorch/pytorch#161302)"
        log.info("%d of %d blocks are not compiled: %s", skipped, len(blocks), reason)
    for block in found:
        share_drop_path(block, device)
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=ragged, backend=compile_or_not)
        block.forward = compiled  # type: ignore[method-assign]


def compile_or_not(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """`COMPILE_BACKEND` for a graph of a block; where it fails, a warning, and the graph as it is."""
    try:
        return torch._dynamo.lookup_backend(COMPILE_BACKEND)(graph, inputs)
    except (torch.OutOfMemoryError, torch._dynamo.exc.RestartAnalysis):  # the latter: Dynamo tries again
        raise
    except Exception as error:  # compilers raise anything
        warn_once(f"torch.compile failed ({first_line(error)}): blocks run uncompiled, which is slower")
        return graph.forward


@functools.cache
def warn_once(message: str) -> None:
    log.warning("%s", message)


def compilable(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the blocks without SyncBatchNorm, whose collectives Dynamo cannot trace."""
    return [b for b in blocks if not any(isinstance(m, nn.SyncBatchNorm) for m in b.modules())]


def eagerly() -> Any:
    """Return a context in which compiled blocks run uncompiled: no graphs for sizes that occur once."""
    return torch.compiler.set_stance("force_eager")


# ---- sharding --------------------------------------------------------------------------------------------


def shard(
    model: TrainedModule,
    parts: dict[str, list[nn.Module]],
    mesh: DeviceMesh,
    dtype: torch.dtype | None,
    *,
    trained: bool = True,
) -> None:
    """Apply FSDP2 to each block of `blocks_by_part`, to the projector, and to the rest of the model.

    Parameters, moments and the reduction of gradients, once per step, are float32. Blocks are gathered in
    `dtype` (None: float32) for forward and backward of each size of crops. A model that is not `trained`
    keeps nothing gathered: only the end of the step would free it.
    """
    # The embeddings are views of one tensor, and nothing changes them in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    done: set[nn.Module] = set()
    blocks = [block for part in parts.values() for block in part]
    for unit in [*blocks, model.projector, model]:
        own = [module for module in unit.modules() if module not in done]
        done.update(own)
        # BatchNorm's parameters must have the dtype of its running statistics, float32.
        gathered = None if any(map(_is_batchnorm, own)) else dtype
        policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
        # Projector and rest end the forward pass and begin the backward pass: gathered once.
        once = trained and unit in (model.projector, model)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not once)
    # Gather the next block while this one computes. FSDP2 itself does so in the backward pass.
    for block, following in itertools.chain(*map(itertools.pairwise, parts.values())):
        assert isinstance(block, FSDPModule)
        block.set_modules_to_forward_prefetch([following])  # type: ignore[list-item]


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype | None:
    """Return bfloat16 if the run computes in it, else None; UsageError if the device does not support it."""
    if cfg.precision == "fp32" or (cfg.precision == "auto" and device.type == "cpu"):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        if cfg.precision == "bf16":
            raise UsageError("precision: this GPU has no bfloat16; use --precision fp32")
        return None
    return torch.bfloat16


def _with_global_batchnorm(model: TrainedModule, device: torch.device, ranks: int) -> TrainedModule:
    if ranks == 1 or not any(map(_is_batchnorm, model.modules())):
        return model
    if device.type == "cuda":
        return convert_sync_batchnorm(model)  # timm's keeps the activation that some of its norms contain
    if dist.get_rank() == 0:
        warn_once(
            "BatchNorm statistics are per rank: PyTorch has no SyncBatchNorm on CPU tensors, so the "
            "losses differ slightly from those of one process with the same global batch"
        )
    return model


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
