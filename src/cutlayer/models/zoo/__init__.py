"""The built-in models: one file each. Their cut points are the names of direct children, in the order data flows.

A user's own `nn.Module` needs nothing from here: `cut` takes any module and any name of its `named_modules()`.
"""

from cutlayer.models.making import build

__all__ = ["build"]
