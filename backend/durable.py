"""What reaches the disk stays there, or is not there at all: publishing files, locking a folder, the secret key, SQLite.

A published file was fsynced before it was renamed, and its folder after: a power cut leaves the old state or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import sqlite3
import time
from pathlib import Path

from backend.errors import LayerscopeError

_BLOCK = 1 << 20
SECRET_BYTES = 32
# A part file is only stale when nobody has touched it for this long: its writer closes and reopens it just before publishing.
STALE_AFTER_S = 5.0


def publish(part: Path, final: Path) -> None:
    """Make the finished file `part` visible as `final`, replacing what was there. Raises OSError; `part` is then left to the caller."""
    descriptor = os.open(part, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(part, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename or unlink inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def private_folder(path: Path) -> Path:
    """Make the folder if need be, readable by its owner alone; refuse one that belongs to somebody else."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.stat().st_uid != os.getuid():
            raise LayerscopeError(f"The folder {path} belongs to user {path.stat().st_uid}, not to user {os.getuid()} who runs Layerscope.")
        path.chmod(0o700)
    except OSError as error:
        raise LayerscopeError(f"The folder {path} cannot be used: {error.strerror}.") from None
    return path


def secret_key(path: Path) -> bytes:
    """The secret in `path` (mode 0600), made on first use. Processes that start together agree on one."""
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)  # unlike rename, fails if another process was first
        except FileExistsError:
            pass
        finally:
            part.unlink()
        sync_folder(path.parent)
    if path.stat().st_mode & 0o077:
        raise LayerscopeError(f"Other users can read the secret key {path}; run chmod 600 on it, or delete it and a new one is made.")
    key = path.read_bytes()
    if len(key) < SECRET_BYTES:
        raise LayerscopeError(f"The secret key {path} has {len(key)} bytes, fewer than {SECRET_BYTES}; delete it and a new one is made.")
    return key


class FolderLock:
    """Held by the one server that owns a data folder. The kernel drops it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Raises LayerscopeError if another process holds the folder."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / "server.lock", "a+", encoding="ascii")
        except OSError as error:
            raise LayerscopeError(f"The data folder {folder} cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise LayerscopeError(f"The data folder {folder} is in use by another Layerscope (process {owner}); stop it, or choose another folder.") from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        self._file.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def connect(path: Path) -> sqlite3.Connection:
    """A SQLite connection with write-ahead log and synchronous=FULL: what was committed survives a power cut.

    Autocommit: a statement is its own transaction unless the caller says BEGIN IMMEDIATE.
    """
    connection = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def remove_stale_parts(folder: Path) -> list[Path]:
    """Delete the `*.part` files in `folder` whose writer is gone; the paths deleted.

    A writer is there as long as any process has the file open or locked.
    """
    removed: list[Path] = []
    parts = list(folder.glob("*.part"))
    opened = _open_files() if parts else set()
    for part in parts:
        try:
            old = time.time() - part.stat().st_mtime >= STALE_AFTER_S
            if old and os.path.realpath(part) not in opened and _can_lock(part):
                part.unlink()
                removed.append(part)
        except FileNotFoundError:
            continue  # published or discarded in the meantime
    return removed


def _can_lock(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _open_files() -> set[str]:
    """Paths that processes of this user have open."""
    found: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            for entry in os.scandir(folder):
                found.add(os.readlink(entry.path))
        except OSError:
            continue  # the process ended, or belongs to another user
    return found
