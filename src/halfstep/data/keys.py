"""File names as keys of a store, which are UTF-8, and back."""

from __future__ import annotations

import re

_MARK = "\ufffd"
_NEEDS_ESCAPE = re.compile(f"[\udc80-\udcff]|{_MARK}(?=[89A-F][0-9A-F])")
_ESCAPED = re.compile(f"{_MARK}([89A-F][0-9A-F])")


def name_to_key(name: str) -> str:
    """A file name as a key: the name itself, but with U+FFFD and two hexadecimal digits for each byte that is not
    UTF-8. Where a name holds what looks like such an escape, its U+FFFD is escaped: no two names give one key."""
    return name if name.isascii() else _NEEDS_ESCAPE.sub(lambda found: _escape(found[0]), name)


def key_to_name(key: str) -> str:
    """The file name that gave `key`, as Python holds it: os.fsencode gives its bytes."""
    data = _ESCAPED.sub(lambda found: chr(0xDC00 + int(found[1], 16)), key)
    return data.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _escape(character: str) -> str:
    return "".join(f"{_MARK}{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
