"""The blocks of an encoder: units of compilation, recomputation and sharding.

timm's families name their blocks differently (`blocks.3`, `layer2.0`, `stages.1.blocks.2`), so they are found
by structure: the members of a list (`Sequential`, `ModuleList`) if every member has modules of its own and
none contains such a list. Families with another structure (RegNet, DenseNet) are cut by size.
"""

from collections.abc import Iterator

from torch import nn

_COVERED = 0.5  # blocks by structure must hold this share of the parameters (LeViT: its lists are tiny pairs)
_LARGEST = 0.25  # cut by size: a unit holds at most this share, if the model's modules allow it


def find_blocks(encoder: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a timm encoder by name, in the order of its modules; they do not overlap.

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
        if not _has_children(child):
            continue  # a single layer is not worth a unit
        # Not a list: its owner may call the members and never the list's own forward.
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
        and all(_is_list(child) or _has_children(child) for child in members)
    )


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
