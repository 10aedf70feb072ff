"""Lock of what a run writes: a file beside it that names the process that holds it.

Design choice: no lock of the operating system holds on every network file system, so a lock is a file that exists, and
the question is when its holder is dead. A holder on this machine is looked up by process id and start time, so a killed
one blocks nobody. A holder elsewhere (another host, or a container with other process ids) shows that it lives by
touching the file every :data:`HEARTBEAT` seconds; it is dead if the file stays untouched for :data:`PATIENCE` seconds
of the asking process's own clock. A holder that was taken for dead, because it was stopped for longer than that, finds
out before its next checkpoint (:func:`lost_lock`) and ends without saving.
"""

import contextlib
import datetime
import glob
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_camopd.errors import ConfigurationError

HEARTBEAT = 5.0
"""Seconds between two signs of life of a holder."""
PATIENCE = 60.0
"""Seconds without a sign of life after which a holder that cannot be looked up counts as dead."""
_ATTEMPTS, _PAUSE = 10, 0.5


_held: list["Lock"] = []


class Lock:
    """A lock that this process holds; made by :func:`locked`."""

    def __init__(self, path: Path, name: str, record: dict[str, Any]) -> None:
        self._path, self._name, self._record = path, name, record
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock {path}", daemon=True)
        self._thread.start()

    def lost(self) -> str | None:
        """Return who has taken the lock over, or None while this process holds it.

        A lock that somebody removed is taken again, unless another process was quicker.
        """
        found: dict[str, Any] | None = {}
        for _ in range(_ATTEMPTS):
            found = _read(self._path)
            if found is None:
                with contextlib.suppress(OSError):
                    _create(self._path, json.dumps(self._record))
            elif found == self._record:
                return None
            elif found:
                break
            time.sleep(_PAUSE)  # a read error of a network file system may pass
        now = f"now {_holder(found)} holds it" if found else "it cannot be read"
        return f"{self._name}: {self._path.name} is no longer this run's, {now}; nothing more is written"

    def release(self) -> None:
        """Give the lock up; one that another process has taken over is left alone."""
        self._ended.set()
        self._thread.join()
        if self._record["pid"] == os.getpid() and _read(self._path) == self._record:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                if _read(self._path) == self._record:
                    os.utime(self._path)


@contextlib.contextmanager
def locked(path: Path, name: str, *, patience: float = PATIENCE) -> Iterator[Lock]:
    """Hold the lock ``path`` during the block.

    Args:
        path: The lock file. Its folder is made if it is not there, and removed again if it stays empty.
        name: What the lock protects, for error texts: a flag and its value.
        patience: Seconds to wait for a sign of life of a holder that cannot be looked up.

    Raises:
        ConfigurationError: Another process holds it; the text names that process.
    """
    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    lock = Lock(path, name, _take(path, name, patience))
    _held.append(lock)
    try:
        yield lock
    finally:
        _held.remove(lock)
        lock.release()
        with contextlib.suppress(OSError):  # a run that ended before it wrote anything leaves no empty folder
            for folder in made:
                folder.rmdir()


def lost_lock() -> str | None:
    """Return which of the locks that this process took another one has taken over, or None if it holds them all."""
    return next((problem for lock in _held if (problem := lock.lost()) is not None), None)


def _take(path: Path, name: str, patience: float) -> dict[str, Any]:
    """Make the lock file, after that of a dead holder was removed, and return its content."""
    record = {**_this_process(), "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
              "token": uuid.uuid4().hex}  # fmt: skip
    if path.exists() and not path.is_file():  # a pipe would block, a folder is no lock
        raise ConfigurationError(f"{name}: {path} is no regular file; remove it, or name another place")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                _create(path, json.dumps(record))
                for left in path.parent.glob(f"{glob.escape(path.name)}.*"):  # by processes killed while they took it
                    left.unlink(missing_ok=True)
                return record
            except FileExistsError:
                _remove_dead(path, name, patience)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigurationError(f"{name}: {path} cannot be written ({reason}); expected a writable folder") from error


def _create(path: Path, content: str) -> None:
    """Create the file with its content at once.

    Raises:
        FileExistsError: It is there.
    """
    complete = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with complete.open("x", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(complete, path)
        except FileExistsError:
            if _links(complete) < 2:  # else the answer of a network file system got lost, and it asked twice
                raise
        except OSError:  # a file system without links: others may see the file empty for a moment, and wait
            with path.open("x", encoding="utf-8") as file:
                file.write(content)
    finally:
        complete.unlink(missing_ok=True)


def _links(path: Path) -> int:
    try:
        return path.stat().st_nlink
    except FileNotFoundError:  # whoever holds the lock has cleared up beside it
        return 0


def _remove_dead(path: Path, name: str, patience: float) -> None:
    """Remove the lock of a dead holder.

    Raises:
        ConfigurationError: The holder lives.
    """
    found = _read(path)
    if found is None:  # just released
        return
    if _lives(path, found, name, patience):
        raise ConfigurationError(f"{name}: {_holder(found)} writes to it; wait for its end, or name another place")
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    removed = _read(aside)
    if removed != found and removed is not None:  # a third process was quicker, and this is its lock: give it back
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.link(aside, path)
        aside.unlink(missing_ok=True)
        raise ConfigurationError(f"{name}: {_holder(removed)} writes to it; wait for its end, or name another place")
    aside.unlink(missing_ok=True)
    print(f"{name}: took over from {_holder(found)}, which is dead", flush=True)


def _lives(path: Path, found: dict[str, Any], name: str, patience: float) -> bool:
    """Return whether the holder ``found`` lives: looked up on this machine, else by its signs of life."""
    here = _this_process()
    if all(here[key] and found.get(key) == here[key] for key in ("boot", "namespace")):
        started = _started(found.get("pid"))
        return started is not None and started == found.get("started")
    print(f"{name}: {_holder(found)} holds it; waiting up to {patience:.0f} s for a sign of life", flush=True)
    before, deadline = _touched(path), time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 10))
        if _touched(path) != before:
            return _touched(path) is not None  # released meanwhile, or touched
    return False


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a lock file, empty if it is damaged, or None if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _touched(path: Path) -> int | None:
    """Return the time at which a file was last touched, or None; opening it makes NFS ask the server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _holder(record: dict[str, Any]) -> str:
    host, pid, since = (str(record.get(key, "?"))[:80] for key in ("host", "pid", "since"))
    return f"process {pid} on {host} (since {since})"


def _this_process() -> dict[str, Any]:
    """Return what tells this process from every other one: machine since its start, process-id space, id and start."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "pid": pid,
        "started": _started(pid),
    }


def _started(pid: Any) -> str | None:
    """Return when a process of this machine was started, in ticks since the machine's start, or None if it is dead."""
    if not isinstance(pid, int):
        return None
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name, in brackets, may hold anything
    return None if len(fields) < 20 or fields[0] in "ZX" else fields[19]


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
