"""The blocks of a model by their numbers, which name cuts of deep models: "2" is the end of the second block.

The blocks are the longest `nn.ModuleList` of layers of one class: the decoder or encoder layers of a transformer.
"""

from __future__ import annotations

from torch import nn

from cutlayer.errors import CutError

_SHOWN = 8  # names in a sentence


def blocks_of(model: nn.Module) -> list[str]:
    """The names of a model's blocks, in order; empty if it has none."""
    lists = [(name, found) for name, found in model.named_modules() if _alike(found)]
    longest = max(lists, key=lambda one: len(list(one[1].children())), default=None)
    return [] if longest is None else [f"{longest[0]}.{child}" for child, _ in longest[1].named_children()]


def named_block(model: nn.Module, name: str) -> str:
    """The module that `name` means: a number that is not a module's name means the last of that many blocks.

    Raises CutError if the model has fewer blocks.
    """
    if not (name.isascii() and name.isdigit()) or name in dict(model.named_modules(remove_duplicate=False)):
        return name
    blocks, number = blocks_of(model), int(name)
    if not blocks:  # then it is an unknown module, like any other word
        return name
    if not 1 <= number <= len(blocks):
        raise CutError(
            f"cut = {name} is not possible: the model has the blocks 1 to {len(blocks)} ({blocks[0]} to {blocks[-1]})"
        )
    return blocks[number - 1]


def places(model: nn.Module) -> str:
    """Where a model can be told to be cut, in words: its first modules, and the numbers of its blocks."""
    names = [repr(name) for name, _ in model.named_children()]
    shown = [*names[:_SHOWN], *["..."] * (len(names) > _SHOWN)]
    listed = f"its modules are {', '.join(shown)} and those inside them" if names else "it has no modules in it"
    if (blocks := len(blocks_of(model))) > 1:
        listed += f"; 1 to {blocks - 1} is the number of its blocks before the cut"
    return listed


def _alike(module: nn.Module) -> bool:
    children = list(module.children())
    return isinstance(module, nn.ModuleList) and len(children) > 1 and len({type(child) for child in children}) == 1
