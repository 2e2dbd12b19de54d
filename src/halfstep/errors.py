"""The errors a user meets: one line that says where, what was found, what was expected and what to do."""

from collections.abc import Sequence


def some(items: Sequence[object], most: int = 5) -> str:
    """The first of `items`, and how many more there are, for a line that must stay one line."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def printable(text: str) -> str:
    """`text` as UTF-8 can have it: half of a surrogate pair as its escape."""
    return text.encode(errors="backslashreplace").decode()


class HalfstepError(Exception):
    """Base of all errors raised on purpose. `exit_code` is 2 when the input is at fault, 1 when the work failed."""

    exit_code = 1


class InputError(HalfstepError, ValueError):
    """Something the user gave cannot be used: an option, a file, a folder, a value."""

    exit_code = 2


class FileError(HalfstepError, OSError):
    """A file or folder could not be read or written; what was complete before is untouched."""


class StoreError(FileError):
    """A store, a batch of recorded runs or a checkpoint is damaged or not there."""


class BusyError(FileError):
    """Another process holds the folder."""


class UnsafePickleError(InputError):
    """A pickle asks for more than plain data and arrays."""


class NumericsError(HalfstepError, ArithmeticError):
    """A value that is not finite, or does not fit its number format, where it must."""
