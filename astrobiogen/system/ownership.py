"""A lock file that one process holds until it ends, however it ends, and that tells the others whose it is."""

import dataclasses
import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

# An owner needs less than this between taking the lock and signing it.
_SIGNING_SECONDS = 0.5
_LONGEST_SIGNATURE = 4096
# Processes that a killed owner has forked (data loaders) share its lock until they notice that it is gone: 5 s each.
_ORPHAN_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    pid: int
    host: str
    since: str
    command: str

    def is_gone(self) -> bool:
        """Whether it has ended: known of processes of this machine only."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def __str__(self) -> str:
        """In words, for the refusal of another process."""
        return f"process {self.pid} on {self.host} since {self.since}: {self.command}"


class InUseError(Exception):
    """Another process holds the lock.

    Args:
        path: of the lock file.
        owner: who it is; None if it has not said so.
    """

    def __init__(self, path: Path, owner: Owner | None) -> None:
        super().__init__(str(owner or "a process that has not signed the lock"))
        self.path = path
        self.owner = owner


class Lock:
    """The lock file `path`, made if it is not there; as a context manager, the lock held by this process alone.

    The lock is `flock`'s, so it ends with the process and needs no clearing up. What it guards may be looked at only
    once it is held. A link at `path` is not followed. After `flock` the file of that name must still be the one that
    was locked: its last holder may have removed it in between.

    Args:
        path: in an existing folder.
        sign: write down at once who holds it; otherwise by `sign()`, once it is certain that the file is a lock.

    Raises:
        InUseError: another process holds it.
        FileNotFoundError: the folder is not there, or was taken away meanwhile.
        OSError: the file cannot be written, is a link or no plain file, or the file system has no locks.
    """

    def __init__(self, path: Path, *, sign: bool = True) -> None:
        self.path = path
        self._sign = sign
        self._descriptor = -1

    def __enter__(self) -> Self:
        patience = time.monotonic() + _ORPHAN_SECONDS
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(self.path, flags, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise OSError(errno.EINVAL, "it is no plain file")
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_still_there(descriptor):
                    self._descriptor, descriptor = descriptor, -1
                    break
            except BlockingIOError as error:
                owner = _signature(descriptor)
                if owner is None or not owner.is_gone() or time.monotonic() > patience:
                    raise InUseError(self.path, owner) from error
                time.sleep(0.1)
            except OSError as error:
                raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(self.path)) from error
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        if self._sign:
            self.sign()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            there, ours = os.stat(self.path, follow_symlinks=False), os.fstat(descriptor)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def sign(self) -> None:
        """Write down who holds the lock; on a full disk the owner stays unknown, and the lock holds all the same."""
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        owner = Owner(os.getpid(), socket.gethostname(), since, shlex.join(sys.argv)[:500])
        text = json.dumps(dataclasses.asdict(owner)) + "\n"
        os.ftruncate(self._descriptor, 0)
        try:
            os.pwrite(self._descriptor, text.encode(errors="replace"), 0)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise

    def remove(self) -> None:
        """Delete the lock file, which this process holds."""
        self.path.unlink(missing_ok=True)


def _signature(descriptor: int) -> Owner | None:
    """Who has signed the lock; waits a moment for one who has only just taken it."""
    end = time.monotonic() + _SIGNING_SECONDS
    while True:
        try:
            owner = Owner(**json.loads(os.pread(descriptor, _LONGEST_SIGNATURE, 0)))
            return dataclasses.replace(owner, pid=int(owner.pid))
        except (ValueError, TypeError):
            if time.monotonic() > end:
                return None
        time.sleep(0.02)
