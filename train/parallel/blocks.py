"""The blocks of an encoder: what is compiled, recomputed and sharded as one unit.

timm's families name their blocks differently (`blocks.3`, `layer2.0`, `stages.1.blocks.2`), so they are found
by structure: the members of a list (`Sequential`, `ModuleList`) all of whose members have modules of their
own, and no such list inside. Families that hold their blocks in another way (RegNet, DenseNet) are cut by
size.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Blocks by structure that cover less of the encoder than this have missed its bulk (LeViT: the only lists are
# pairs of convolution and norm).
_COVERED = 0.5
# Cut by size: a unit holds at most this share of the parameters, where the model's modules allow it.
_LARGEST = 0.25


def find_blocks(encoder: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a timm encoder by name, in the order of its modules; they do not overlap.

    Parameters outside them (stem, position embeddings, last norm) belong to no block.
    """
    by_structure = dict(_members_of_lists("", encoder))
    whole = _size(encoder)
    if sum(map(_size, by_structure.values())) >= _COVERED * whole:
        return by_structure
    return dict(_cut_by_size("", encoder, _LARGEST * whole))


def _members_of_lists(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    here = _is_block_list(module)
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if here and not _is_list(child) and not any(map(_is_block_list, child.modules())):
            if _size(child):
                yield full, child
        else:
            yield from _members_of_lists(f"{full}.", child)


def _cut_by_size(prefix: str, module: nn.Module, largest: float) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if not any(True for _ in child.children()):
            continue  # a single layer is not worth a unit
        # The forward of a list may never be called: its owner may run through the members itself.
        if 0 < _size(child) <= largest and not _is_list(child):
            yield full, child
        else:
            yield from _cut_by_size(f"{full}.", child, largest)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _is_block_list(module: nn.Module) -> bool:
    members = [child for child in module.children() if _size(child)]
    return (
        _is_list(module)
        and bool(members)
        and all(_is_list(child) or any(True for _ in child.children()) for child in members)
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
