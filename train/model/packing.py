"""Sequences of different lengths through the blocks of a transformer, without truncation.

Packed, the tokens of all sequences are the rows of one long sequence, (1, T, C). Norms, products and MLPs
work on rows, so only attention must know where a sequence ends. timm's blocks hand `attn_mask` on to
`scaled_dot_product_attention`, and PyTorch lets an argument that is no tensor compute the function
(`__torch_function__`, as `torch.nn.attention.bias` does for causal masks). A `Packing` is such an argument:
on a GPU it calls FlashAttention's kernel for sequences of different lengths. On a CPU it calls attention once
for each run of sequences of equal length, whose rows are views of the packed ones. Elsewhere (float32 on a
GPU, compiled blocks on a CPU) it pads queries, keys and values for the attention alone.

Padded, the batch is (S, L, C), L the longest length, with a mask of the keys. It serves for comparison, and
where a block draws random numbers for each sequence (stochastic depth).
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # other builds of PyTorch
    varlen_attn = None  # type: ignore[assignment]

_FLASH_CAPABILITY = (8, 0)  # FlashAttention's kernels need it


class Packing:
    """Where S sequences lie among T rows, one after the other.

    Args:
        lengths: of the sequences, (S,) int64 on the CPU, each at least 1. Sorted is fastest on a CPU.
        device: where the indices go.
    """

    def __init__(self, lengths: Tensor, device: torch.device):
        counts = lengths.tolist()
        self.size = S, L = len(counts), max(counts)
        self.rows = sum(counts)
        self.runs = [(len(list(run)), length) for length, run in groupby(counts)]
        """Sequences next to each other of equal length: how many, and how long."""
        valid = torch.arange(L) < lengths[:, None]
        slots = valid.flatten().nonzero().squeeze(1)
        filled_by = torch.zeros(S * L, dtype=torch.int64).index_copy_(0, slots, torch.arange(self.rows))
        offsets = torch.zeros(S + 1, dtype=torch.int32)
        offsets[1:] = lengths.cumsum(0)
        self.slots, self.filled_by, self.keys, self.offsets = to_device(
            device, slots, filled_by, valid[:, None, None], offsets
        )
        """Place of each row in the padded batch (T,); the row of each place, 0 where it is padding, (S L,);
        which keys are none (S, 1, 1, L) bool; and first rows (S + 1,) int32."""
        on_gpu = device.type == "cuda" and varlen_attn is not None
        self._flash = on_gpu and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY

    def pad(self, x: Tensor) -> Tensor:
        """Rows (T, ...) -> (S, L, ...), with copies of row 0 as padding."""
        return x.index_select(0, self.filled_by).unflatten(0, self.size)

    def unpad(self, x: Tensor) -> Tensor:
        """(S, L, ...) -> rows (T, ...)."""
        return x.flatten(0, 1).index_select(0, self.slots)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packing = (kwargs or {}).get("attn_mask")
        if func is not scaled_dot_product_attention or not isinstance(packing, cls):
            return NotImplemented
        query, key, value = args
        return packing._attention(query, key, value, kwargs.get("dropout_p", 0.0))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """(1, H, T, D) each -> (1, H, T, D): every row attends to the rows of its own sequence."""
        half, width = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
        if self._flash and half and width % 8 == 0 and width <= 256 and not dropout:
            q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
            longest = self.size[1]
            out = varlen_attn(q, k.to(q.dtype), v.to(q.dtype), self.offsets, self.offsets, longest, longest)
            assert isinstance(out, Tensor)
            return out.transpose(0, 1)[None]
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._attention_by_length(query, key, value, dropout)
        q, k, v = (self.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=self.keys, dropout_p=dropout)
        return self.unpad(out.transpose(1, 2)).transpose(0, 1)[None]

    def _attention_by_length(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """As `_attention`, without padding."""
        rows = [sequences * length for sequences, length in self.runs]
        parts = zip(*(x[0].transpose(0, 1).split(rows) for x in (query, key, value)), strict=True)
        found = []
        for (sequences, _), part in zip(self.runs, parts, strict=True):
            q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in part)
            out = scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            found.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(found).transpose(0, 1)[None]


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, packing: Packing, *, packed: bool) -> Tensor:
    """Run the rows of several sequences through timm's transformer blocks: (T, C) -> (T, C)."""
    if packed:
        x = x[None]
        for block in blocks:
            x = block(x, attn_mask=packing)
        return x[0]
    x = packing.pad(x)
    for block in blocks:
        x = block(x, attn_mask=packing.keys)
    return packing.unpad(x)


def to_device(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Copy tensors of the CPU without waiting for a GPU."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
