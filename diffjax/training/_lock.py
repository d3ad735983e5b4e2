"""A lock on a folder, so that one run at a time writes to it."""

import errno
import os
import pathlib
import socket
import threading
import warnings
from typing import ClassVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["FolderLock"]


class FolderLock:
    """A lock on a folder. It names its holder, and ends with the holder's process."""

    _held: ClassVar[set[str]] = set()
    _guard = threading.Lock()

    def __init__(self, directory: pathlib.Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._name = str(directory.resolve())
        with self._guard:
            # The system's lock belongs to the process: this finds other managers of this process.
            if self._name in self._held:
                raise self._error(f"this process ({os.getpid()})")
            self._file = (directory / "lock").open("a+")
            try:
                self._lock()
            except BaseException:
                self._file.close()
                raise
            self._held.add(self._name)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # the file system has no locks
                warnings.warn(f"could not lock {self._name}: {error}", stacklevel=2)
                return
            self._file.seek(0)
            raise self._error(self._file.read().strip() or "another process") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def _error(self, holder: str) -> RuntimeError:
        return RuntimeError(
            f"directory: expected a folder that no other run writes to, "
            f"got {self._name}, in use by {holder}; end that run, or choose another folder"
        )

    def release(self) -> None:
        with self._guard:
            if not self._file.closed:
                self._file.close()
                self._held.discard(self._name)
