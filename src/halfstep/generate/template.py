"""Prompt templates: `a [red|blue] car` makes one prompt a choice."""

from __future__ import annotations

import itertools
import re

from halfstep.errors import InputError

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expand_template(template: str) -> list[str]:
    """All prompts of `template`, the last choice changing fastest. Choices may be empty; brackets do not nest. Raises
    InputError when a bracket is not closed, or there is no prompt."""
    if re.search(r"[\[\]]", _CHOICE.sub("", template)):
        raise InputError(f"template {template!r}: its brackets do not match; write choices as [red|blue]")
    texts = _CHOICE.split(template)  # text, choices, text, choices, ..., text
    choices = [text.split("|") if i % 2 else [text] for i, text in enumerate(texts)]
    prompts = [" ".join("".join(parts).split()) for parts in itertools.product(*choices)]
    if not all(prompts):
        raise InputError(f"template {template!r}: makes an empty prompt")
    if len(set(prompts)) < len(prompts):
        raise InputError(f"template {template!r}: makes the same prompt twice; remove the repeated choice")
    return prompts
