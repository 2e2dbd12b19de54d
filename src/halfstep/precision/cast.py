"""Casts of whole trees of tensors: floating-point tensors change their type, everything else stays as it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from halfstep.precision.policy import torch_dtype

HALF_TYPES = (torch.float16, torch.bfloat16)

TensorMap = Callable[[torch.Tensor], torch.Tensor]


def cast(tree: Any, type_name: str) -> Any:
    """`tree`, a tensor or nested tuples, lists, dicts and dataclasses of them, with its floating-point tensors in
    fp32, bf16 or fp16; integers keep their type."""
    return map_tensors(cast_to(torch_dtype(type_name)), tree)


def cast_to(dtype: torch.dtype) -> TensorMap:
    """The cast of one tensor: to `dtype` where it is floating-point."""
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


def map_tensors(fn: TensorMap, tree: Any) -> Any:
    """`fn` over the tensors of `tree`; what holds no tensor that changes stays the same object, because some networks
    pass lists on to be filled in place."""
    if isinstance(tree, torch.Tensor):
        return fn(tree)
    if isinstance(tree, (tuple, list)):
        mapped = [map_tensors(fn, item) for item in tree]
        if all(a is b for a, b in zip(mapped, tree, strict=True)):
            return tree
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    if isinstance(tree, dict):
        mapped_items = {key: map_tensors(fn, item) for key, item in tree.items()}
        if all(mapped_items[key] is tree[key] for key in tree):
            return tree
        # The libraries' model outputs are dicts and dataclasses at once, made from keywords.
        if is_dataclass(tree):
            return type(tree)(**mapped_items)
        if isinstance(tree, defaultdict):
            return defaultdict(tree.default_factory, mapped_items)
        return type(tree)(mapped_items)
    if is_dataclass(tree) and not isinstance(tree, type):
        before = {f.name: getattr(tree, f.name) for f in fields(tree) if f.init}
        after = {name: map_tensors(fn, value) for name, value in before.items()}
        return tree if all(after[name] is value for name, value in before.items()) else replace(tree, **after)
    return tree


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """All tensors of a tree, as `map_tensors` goes through it."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, tree)
    return found
