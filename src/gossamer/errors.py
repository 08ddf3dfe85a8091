"""Every error Gossamer raises on purpose.

    GossamerError
    ├── UsageError         an option, argument or combination that cannot work
    ├── FormatError        a format expression that does not parse or does not fit the matrix
    ├── CheckpointError    a file that is missing, damaged or not what its header says
    │   └── UnsupportedError   a sound file that asks for something Gossamer does not do
    ├── ResourceError      not enough memory or disk, or a place that cannot be written
    └── KernelError        the compiled module is missing or was built for another machine

A message is one sentence that says what was asked, what is wrong and what to do. The command line
prints it without a traceback and exits with code 2.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "FormatError",
    "GossamerError",
    "KernelError",
    "ResourceError",
    "UnsupportedError",
    "UsageError",
]


class GossamerError(Exception):
    """Base of all deliberate errors."""


class UsageError(GossamerError):
    """An option, argument or combination that cannot work."""


class FormatError(GossamerError):
    """A format expression that does not parse, or does not fit the matrix it is used on."""


class CheckpointError(GossamerError):
    """A file that is missing, damaged, or not what its header says."""


class UnsupportedError(CheckpointError):
    """A sound file that asks for something Gossamer does not do."""


class ResourceError(GossamerError):
    """Not enough memory or disk, or a place that cannot be written."""


class KernelError(GossamerError):
    """The compiled module is missing, or was built for another machine."""
