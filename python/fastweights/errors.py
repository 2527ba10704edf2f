"""The exceptions of the library. Messages name the tensor or file, what was expected and what came.

Each is also a built-in exception, so that code that knows nothing of this library can handle it.
"""


class Error(Exception):
    """Base of everything the library raises on purpose."""


class ShapeError(Error, ValueError):
    """A tensor of a wrong shape, dtype or device."""


class FileError(Error, OSError):
    """A file that cannot be read or written, or whose content is malformed."""


class StateMismatch(Error, RuntimeError):  # noqa: N818
    """A state, or a set of weights, that belongs to another model."""


class Cancelled(Error, InterruptedError):  # noqa: N818
    """A long call that the caller stopped."""


__all__ = ["Cancelled", "Error", "FileError", "ShapeError", "StateMismatch"]
