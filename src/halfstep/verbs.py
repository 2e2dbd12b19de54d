"""Packages that are named as their one function: `halfstep.encode` is the package and, called, its `encode`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    """The import system puts a package in the place of a function of its name, whoever imports it first: so the package
    itself can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        """By name, as a function: other processes can be told to call it."""
        return import_module, (self.__name__,)


def make_callable(package: str) -> None:
    """Let the imported package be called as its function of the same name."""
    sys.modules[package].__class__ = _Verb
