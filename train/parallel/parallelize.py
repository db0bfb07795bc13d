"""From a model on the meta device to one that trains: recomputation, compilation, sharding, weights.

`parallelize` works in torchtitan's order (https://github.com/pytorch/torchtitan): activation checkpointing of
each block, `torch.compile` of each block around it, FSDP2's `fully_shard` of each block around that, and only
then memory and weights (`initialize.py`), so that no process ever holds more than its share of a model.

Blocks (`blocks.py`) keep their names: recomputation and compilation replace a block's `forward` and wrap no
module, so a state dict is the same under every setting.

The loss is already exact under the averaging of gradients over ranks (see `lejepa_fast.sigreg`), so nothing
here scales gradients. Batch normalisation: on several GPUs its statistics are made global (SyncBatchNorm),
and blocks that hold it are not compiled; PyTorch has no SyncBatchNorm for CPU tensors, so under gloo every
rank normalises by its own share of the batch. `parallelize` says either once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config, ParallelConfig
from lejepa_fast.train.model.drop_path import share_drop_path
from lejepa_fast.train.model.initialize import initialize
from lejepa_fast.train.model.model import LeJEPAModel
from lejepa_fast.train.parallel.blocks import find_blocks

log = logging.getLogger("lejepa_fast.train")

Strategy = Literal["none", "ddp", "fsdp"]

# `--parallel.strategy auto` takes FSDP2 from here on. DDP keeps 16 bytes a parameter on every GPU (weights,
# gradients and two moments in float32), here 8 GB, and sums all gradients in float32.
FSDP_FROM_PARAMETERS = 500_000_000

COMPILE_BACKEND = "inductor"

# Running statistics are equal on all ranks (GPU), or rank 0's are the ones saved (CPU): broadcasting the
# buffers at each forward would be one more collective for nothing. The option's name changed in torch 2.15.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
_BUFFER_OPTION: str = (
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"
)


def choose_strategy(options: ParallelConfig, parameters: int, *, ranks: int | None) -> Strategy:
    """What `parallel.strategy` means for a model of this many parameters; UsageError if it cannot be had.

    `ranks`: processes of the group; None without one.
    """
    if options.strategy == "auto":
        if ranks is None:
            chosen: Strategy = "none"
        elif options.replicate > 1 or parameters >= FSDP_FROM_PARAMETERS:
            chosen = "fsdp"
        else:
            chosen = "ddp"
    else:
        chosen = options.strategy
    if chosen == "none" and ranks is not None and ranks > 1:
        raise UsageError(f"parallel.strategy: none trains {ranks} separate models; use ddp, fsdp or auto")
    if ranks is None and chosen != "none":
        raise UsageError(
            f"parallel.strategy: {chosen} needs processes that know each other; start with "
            "torchrun --nproc-per-node N train/pretrain.py, or use --parallel.strategy auto"
        )
    if options.replicate > 1 and chosen != "fsdp":
        raise UsageError(
            f"parallel.replicate: {options.replicate} groups are for FSDP, and this run uses {chosen}; use "
            "--parallel.strategy fsdp under torchrun, or leave it out"
        )
    if options.keep_gathered and chosen != "fsdp":
        raise UsageError(
            f"parallel.keep_gathered: nothing is gathered without FSDP, and this run uses {chosen}; use "
            "--parallel.strategy fsdp under torchrun, or leave it out"
        )
    return chosen


def make_mesh(options: ParallelConfig, device_type: str) -> DeviceMesh | None:
    """The mesh of all ranks: ("shard",), or ("replicate", "shard") for HSDP; None without a process group.

    `parallel.replicate` divides their number (`config.validate`).
    """
    if not dist.is_initialized():
        return None
    size = dist.get_world_size()
    if options.replicate == 1:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    shape = (options.replicate, size // options.replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def parallelize(
    model: LeJEPAModel,
    cfg: Config,
    mesh: DeviceMesh | None,
    device: torch.device,
    *,
    weights: bool = True,
) -> nn.Module:
    """The module to call in the training step, on `device`.

    `model` may be on the meta device (`build_model(cfg, meta=True)`); it then gets memory and the weights of
    `cfg.seed`, the same for every number of ranks. With `weights=False` it stays there: enough to plan with.
    It is changed in place, and stays the module that holds parameters and state dict: sharded DTensors
    under FSDP2. Returns `model` itself, or a DDP wrapper over it. `mesh` is that of `make_mesh`.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    strategy = choose_strategy(cfg.parallel, parameters, ranks=mesh.size() if mesh is not None else None)
    if mesh is not None:
        model = _with_global_batchnorm(model, device, mesh.size())
    blocks = list(find_blocks(model.encoder).values())
    compiled = compilable(blocks) if compiles(cfg, device) else []
    recompute(blocks, cfg.parallel.activation_checkpointing, compiled=compiled)
    if compiles(cfg, device):
        compile_blocks(blocks, device)
    if strategy == "fsdp":
        assert mesh is not None
        shard(model, blocks, mesh, compute_dtype(cfg, device), keep=cfg.parallel.keep_gathered)
    if weights:
        initialize(model, cfg, device)
    if strategy != "ddp":
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    options: dict[str, Any] = {"gradient_as_bucket_view": True, _BUFFER_OPTION: False}
    return DistributedDataParallel(model, device_ids=device_ids, **options)


# ---- activation checkpointing ----------------------------------------------------------------------------

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.convolution.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def recompute(
    blocks: Iterable[nn.Module],
    mode: Literal["none", "selective", "full"],
    *,
    compiled: Collection[nn.Module] = (),
) -> None:
    """Let the backward pass compute the activations of each block again, all or the cheap ones.

    `compiled`: those that `compile_blocks` gets afterwards.
    """
    if mode == "none":
        return
    # Its warning of operators in place: those that would change what is kept are switched off below.
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_not_of_contexts)
    for block in blocks:
        options: dict[str, Any] = {"use_reentrant": False}
        if mode == "selective":
            options["context_fn"] = _selective_contexts
            for module in block.modules():
                if getattr(module, "inplace", False):  # an activation that would change what is kept
                    module.inplace = False  # type: ignore[assignment]
        norms = [module for module in block.modules() if _is_batchnorm(module)]
        # Running statistics of a compiled block are results of its forward graph, which runs once.
        if norms and block not in compiled:
            contexts = options.get("context_fn", noop_context_fn)
            options["context_fn"] = functools.partial(_counting_once, norms, contexts)
        block.forward = functools.partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _not_of_contexts(record: logging.LogRecord) -> bool:
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


def _counting_once(norms: list[nn.Module], contexts: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """`contexts` of which that of the recomputation leaves running statistics as they are."""
    first, again = contexts()
    return first, _statistics_aside(norms, again)


@contextlib.contextmanager
def _statistics_aside(norms: list[nn.Module], inner: AbstractContextManager[Any]) -> Iterator[None]:
    """In training mode `norms` update other buffers. Without any they would keep fewer tensors for the
    backward pass than the first time, and `inner` is entered later, as it counts operators."""
    kept = [(n, name, buffer) for n in norms if n.training for name, buffer in n.named_buffers(recurse=False)]
    try:
        for norm, name, buffer in kept:
            setattr(norm, name, torch.zeros_like(buffer))
        with inner:
            yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)


def _selective_contexts() -> tuple[Any, Any]:
    """Keeps attention and every second matrix product or convolution: most of the time, half the memory."""
    counts = {False: 0, True: 0}  # in the forward pass, in the recomputation

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op in _PRODUCTS:
            counts[context.is_recompute] += 1
            if counts[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


# ---- compilation -----------------------------------------------------------------------------------------


def compiles(cfg: Config, device: torch.device) -> bool:
    return cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")


def compile_blocks(blocks: list[nn.Module], device: torch.device) -> None:
    """Compile the forward of each block that can be: equal blocks share their graphs, one for each size of
    crops.

    The hooks of FSDP2 and DDP stay outside. Sizes are constants of the graphs, since a run has two and each
    occurs at every step; a shape that varies (an evaluation's last batch) runs uncompiled, see `eagerly`.
    """
    config = torch._dynamo.config
    # Blocks that differ (in width from stage to stage) count as recompilations of one function, and each has
    # a graph for each size.
    config.recompile_limit += 4 * len(blocks)
    config.accumulated_recompile_limit += 4 * len(blocks)
    config.optimize_ddp = False  # it would cut the graphs at DDP's buckets; a block's is smaller than one
    found = compilable(blocks)
    if len(found) < len(blocks):
        log.info(
            "%d of %d blocks are not compiled: PyTorch cannot compile SyncBatchNorm (pytorch/pytorch#161302)",
            len(blocks) - len(found),
            len(blocks),
        )
    for block in found:
        share_drop_path(block, device)
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=COMPILE_BACKEND)
        block.forward = compiled  # type: ignore[method-assign]


def compilable(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Those without SyncBatchNorm. Dynamo cannot trace its operators and collectives, and graphs that end at
    every norm would not fuse it with anything."""
    return [b for b in blocks if not any(isinstance(m, nn.SyncBatchNorm) for m in b.modules())]


def compiled_blocks(model: LeJEPAModel, cfg: Config, device: torch.device) -> int:
    """How many blocks of a model that went through `parallelize` are compiled."""
    return len(compilable(find_blocks(model.encoder).values())) if compiles(cfg, device) else 0


def eagerly() -> Any:
    """A context in which compiled blocks run uncompiled: no graphs for sizes that occur once."""
    return torch.compiler.set_stance("force_eager")


# ---- sharding --------------------------------------------------------------------------------------------


def shard(
    model: LeJEPAModel,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype | None,
    *,
    keep: bool = False,
) -> None:
    """FSDP2: a unit for each block, one for the projector, and one for what remains of the model.

    Parameters and moments are float32 and sharded; a unit is gathered in `dtype` (None: float32) for its
    forward and again for its backward, and gradients are summed in float32. Blocks are gathered so for the
    crops of each size, or with `keep` once a step. (Their gradients are summed once in any case: autograd
    hands them over when they are those of all crops.)
    """
    # The embeddings are views of one tensor, and nothing changes them in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    units: list[nn.Module] = [*blocks, model.projector, model]
    done: set[nn.Module] = set()
    for unit in units:
        own = [module for module in unit.modules() if module not in done]
        done.update(own)
        # BatchNorm's running statistics are float32, and its parameters must be what they are.
        gathered = None if any(map(_is_batchnorm, own)) else dtype
        policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
        # The backward pass begins where the forward pass ends, so these are gathered once.
        once = keep or unit in (model.projector, model)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not once)
    # The next block is gathered while this one computes. The backward pass does the same by itself, from the
    # order of the forward pass.
    for block, following in itertools.pairwise(blocks):
        assert isinstance(block, FSDPModule)
        block.set_modules_to_forward_prefetch([following])  # type: ignore[list-item]
    if keep:
        _keep_until_the_first_call(model, blocks)


def _keep_until_the_first_call(model: LeJEPAModel, blocks: list[nn.Module]) -> None:
    """In the backward pass let go of the blocks' parameters at the encoder's first call of the step only.

    That call's turn is the last: autograd runs what came later first.
    """
    calls = 0

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls = 0

    def called(module: nn.Module, args: Any, features: Tensor) -> None:
        nonlocal calls
        first, calls = calls == 0, calls + 1
        if features.requires_grad:
            features.register_hook(lambda grad: backward_begins(first))

    def backward_begins(first: bool) -> None:
        for block in blocks:
            assert isinstance(block, FSDPModule)
            block.set_reshard_after_backward(first, recurse=False)

    model.register_forward_pre_hook(begin)
    model.encoder.register_forward_hook(called)


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype | None:
    """bfloat16 where the run computes in it, else None; UsageError if the device has none."""
    if cfg.precision == "fp32" or (cfg.precision == "auto" and device.type == "cpu"):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        if cfg.precision == "bf16":
            raise UsageError("precision: this GPU has no bfloat16; use --precision fp32")
        return None
    return torch.bfloat16


def _with_global_batchnorm(model: LeJEPAModel, device: torch.device, ranks: int) -> LeJEPAModel:
    if ranks == 1 or not any(map(_is_batchnorm, model.modules())):
        return model
    if device.type == "cuda":
        return convert_sync_batchnorm(model)  # timm's, which keeps the activation that some of its norms hold
    if dist.get_rank() == 0:
        log.warning(
            "BatchNorm statistics are per rank: PyTorch has no SyncBatchNorm on CPU tensors, so the "
            "losses differ slightly from those of one process with the same global batch"
        )
    return model


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
