"""Stamps of files: what changes when a file is replaced, written to, or becomes readable."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

Stamp = tuple[tuple[object, ...], ...]


def stamps(files: Iterable[Path]) -> Stamp:
    """One entry a file: its name, size and times, or why they cannot be had. Never raises OSError."""
    return tuple(_stamp(file) for file in files)


def _stamp(file: Path) -> tuple[object, ...]:
    try:
        status = file.stat()
    except OSError as error:
        return file.name, error.errno
    # The time of change too: a copy can keep the time of modification, and permissions change nothing else.
    return file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
