"""Where a module is at any moment of a call: which of its submodules runs, and which line called it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_LIBRARY = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)


class Place:
    """The stack of submodules of `module` that run. Their names are dotted, the module's own is empty."""

    def __init__(self, module: nn.Module) -> None:
        self.names: dict[nn.Module, str] = {}
        for name, child in module.named_modules():
            self.names.setdefault(child, name)
        self.parents = {
            self.names[child]: self.names[parent] for parent in module.modules() for child in parent.children()
        }
        self.leaves = {name for child, name in self.names.items() if not any(child.children())}
        self.stack: list[str] = []
        self._error: BaseException | None = None
        self._failed = ""

    def of(self, error: BaseException) -> str:
        """The innermost module that an error came from."""
        return self._failed if error is self._error else ""

    @property
    def module(self) -> str:
        """The innermost that runs."""
        return self.stack[-1] if self.stack else ""

    @property
    def leaf(self) -> str | None:
        """The same, where it has no submodules."""
        return self.module if self.stack and self.module in self.leaves else None

    @contextmanager
    def watched(self, entered: Any = None, left: Any = None) -> Iterator[None]:
        """Keep the stack within the block. `entered` and `left` are called with a submodule's name and its arguments,
        and with its name and result."""

        def enter(module: nn.Module, args: Any, *_: Any) -> None:
            if (name := self.names.get(module)) is not None:
                self.stack.append(name)
                if entered is not None:
                    entered(name, args)

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            if (name := self.names.get(module)) is not None:
                error = sys.exc_info()[1]
                if error is not None and error is not self._error:  # the innermost is left first
                    self._error, self._failed = error, name
                if left is not None and result is not None:
                    left(name, result)
                self.stack.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        self.stack.clear()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def source_line(error: BaseException | None = None) -> str:
    """File and line of the innermost code that is neither PyTorch's nor this package's arithmetic; of an error, where
    it was raised."""
    found = ""
    if error is not None:
        for frame, line in traceback.walk_tb(error.__traceback__):
            if not frame.f_code.co_filename.startswith((_LIBRARY, _OURS, "<")):
                found = f"{Path(frame.f_code.co_filename).name}:{line}"
        return found
    frame = sys._getframe(1)
    while frame is not None and not found:
        file = frame.f_code.co_filename
        if not file.startswith((_LIBRARY, _OURS, "<")):
            found = f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return found
