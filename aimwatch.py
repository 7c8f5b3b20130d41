#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Watch machine-learning training runs and notify people when one fails or stalls.

One file, standard library only. A training script imports it and reports progress; a watcher
that reads nothing but the shared directory notifies people, once, when a promise was not kept.

The command line, on any machine that sees the directory::

    python3 aimwatch.py --repo /shared/experiments start

The library, in the training script::

    from aimwatch import Run

    with Run(repo="/shared/experiments", experiment="resnet") as run:
        for batch in batches:
            train(batch)
            run.report_progress(expect_next_in=60)

On disk, below ``<root>/.aim`` (``check_ins`` and ``ext`` are shared with Aim):

    check_ins/                         one empty file per run; its name is the heartbeat
    ext/notifications/config.json      who is notified, and how (mode 0600); config.lock beside it
    ext/notifications/watcher.lock     held by the one watcher
    aimwatch/runs/<hash>.jsonl         what a run recorded, one JSON value per line
    aimwatch/pending/<hash>            empty: the index lacks some of this run; locked by its writer
    aimwatch/index.sqlite              a cache, made of the logs; index.lock beside it
    aimwatch/news/<hash>               messages that a run logged, until the watcher takes them
    aimwatch/stacks/<hash>.txt         where a run hung that missed its promise
    aimwatch/mutes/<hash>-<until>      empty: nobody is notified of the run before that time
    aimwatch/outbox.jsonl              what was to be sent, and what was
    aimwatch/watcher.json              what the watcher has seen, and who it is

It does not: need a server or clocks that agree, change a run, read or write Aim's own run storage,
or work on Windows. Stable names are those in ``__all__``, the command line, and the files above.

Fault model
-----------
Every mechanism here serves a line of this list. Defended against: SIGKILL at any instruction, a power
cut, a full disk, a share that hangs, goes away and comes back, clocks that differ, hostile names and
texts, servers that fail in any way.

Not defended against: a repository that is deleted or moved under a live run (it goes on recording into
a new one, which begins with a summary of what was), a name server that is silent (it delays its own
notifier), Ctrl-C inside one microsecond, an index edited by hand, code that closes descriptors which it
does not own, and whoever may write the folders and lies about runs.

Map
---
Read first: `CheckIn`, `RunState`, `run_row`, `RunTable.take`, `Dispatcher.notify`. Then what depends on them:

- A heartbeat: `Run.report_progress` returns while the check-in on disk covers the promise, else
  `CheckInFile.write` renames it. `Watcher.poll` lists the names, `RunTable.take` and `overdue` find what
  changed, `change_facts` says what is known of it, `Dispatcher.notify` makes it last, and a `NotifierThread`
  for each notifier sends it, through `message_for_batch` and a transport, and notes that.
- A point: `Run.track` appends a line (`AppendFile.append`). `Reindexer` reads the log (`read_log`), makes
  a row of it (`run_row`) and stores it (`index_run`); the marker in `pending` goes after the commit.
- A question: `Query` turns its text into functions of a row. `Query.candidates` narrows the rows by what
  the index knows; `Repo` adds the rows of pending runs from their logs; `matches` asks each row.

Locks: `FileLock` on `pending/<hash>` (who writes the run), `index.lock`, `config.lock`, `watcher.lock`. In
memory: the registry of `FileLock`; one of each `Run`, of each `AppendFile` on a share, of the `Outbox` and of
each `LogFollower`, for what they keep; `_starting`, for programs of notifiers.

Threads of a training process: one of `_Stacks` from the first promise on, and on a network file system one
of `AppendFile`, which syncs. Threads of `start`: the poll; `keep_indexed`; a `NotifierThread` for each
notifier; `watch_sight` for a repository that does not answer; `ping_when`; `_LogThread`, which prints.
Threads of `up`: one that accepts, and one for each connection, 32 at most; `keep_indexed`; with `--watch`
those of `start` but `ping_when`; `_LogThread`.
"""

from __future__ import annotations

import _thread
import ast
import atexit
import collections.abc
import contextlib
import datetime
import errno
import fcntl
import functools
import itertools
import json
import logging
import math
import operator
import os
import re
import signal
import stat
import sys
import threading
import time
import traceback
import types
import weakref
from collections import Counter, deque
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

if TYPE_CHECKING:
    import sqlite3

# ======================================================================================
# Constants, errors, small helpers
#
# Everything below depends on these and on nothing else. Errors raised by the library all
# derive from AimwatchError; the library itself never prints and never exits.
# ======================================================================================

__version__ = "0.1.0"
__all__ = [
    "AimwatchError",
    "ArgumentError",
    "ArgumentTypeError",
    "ConfigError",
    "Metric",
    "QueryError",
    "Repo",
    "RepoError",
    "Run",
    "RunBusyError",
    "__version__",
    "callback",
    "main",
    "report_progress",
]

#: Library messages go here; nothing is configured unless the command line runs.
log = logging.getLogger("aimwatch")


class AimwatchError(Exception):
    """Base of every error that aimwatch raises on purpose."""


class ArgumentError(AimwatchError, ValueError):
    """An argument has the right type and an impossible value."""


class ArgumentTypeError(AimwatchError, TypeError):
    """An argument has a type that cannot be used."""


class RepoError(AimwatchError):
    """A repository, or a file in it, is missing or cannot be used."""


class WatcherBusyError(RepoError):
    """Another process watches the repository."""


class RunBusyError(RepoError):
    """Another process, or another object in this one, writes the run."""


class QueryError(AimwatchError, ValueError):
    """A query that is not in the language; `column` (1-based) is where the trouble stands."""

    def __init__(self, reason: str, column: int, line: int = 1) -> None:
        super().__init__(f"query, {f'line {line}, ' if line > 1 else ''}column {column}: {reason}")
        self.column = column
        self.line = line


class ConfigError(AimwatchError):
    """The notifier configuration is damaged, or what was asked of it is impossible."""


#: Strict JSON on one line: escapes keep line breaks and lone surrogates out of the files.
to_json: Callable[[Any], str] = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


#: What comes of data that another program wrote, or a query over it, where it is not of the kind expected.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # NaN, or 1e999: nothing that could be written again
        raise ValueError(f"{text} is no number of JSON")
    return number


_from_json = json.JSONDecoder(parse_constant=_finite_number, parse_float=_finite_number).decode


def from_json(data: Union[bytes, str]) -> Any:
    """Return the value of strict JSON text. Raises ValueError, and RecursionError where it is too deep."""
    return _from_json(data if isinstance(data, str) else data.decode("utf-8", "replace"))


def json_object(data: Union[bytes, str]) -> Optional[Dict[str, Any]]:
    """Return the JSON object that text is, or None for anything else."""
    with contextlib.suppress(ValueError, RecursionError):
        value = from_json(data)
        return value if isinstance(value, dict) else None
    return None


#: Opens a folder only to reach what is in it, which needs no right to list it.
_O_REACH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY


@contextlib.contextmanager
def folder_of(path: str) -> Iterator[Tuple[int, str]]:
    """Open the folder of a file, and yield its descriptor, for `dir_fd`, and the name in it. Raises OSError.
    Below `.aim` each folder is opened in the one above it, and no link is followed: who may write there could
    put one in the place of a folder after it was checked, and have the files of another folder removed."""
    folder, name = os.path.split(path)
    root, aim, below = folder.rpartition("/.aim/")
    at = f"{root}/.aim" if aim else folder or "."
    fd = os.open(at, _O_REACH)
    try:
        for part in below.split("/") if aim else ():
            at = f"{at}/{part}"
            above, fd = fd, os.open(part, _O_REACH | os.O_NOFOLLOW, dir_fd=fd)
            os.close(above)
        at = path
        yield fd, name
    except OSError as error:
        if at != path and os.path.islink(at):
            raise OSError(errno.ELOOP, "links are not followed here: put a folder in its place", at) from None
        error.filename = at
        raise
    finally:
        os.close(fd)


def open_below(path: str, flags: int, mode: int = 0o666) -> int:
    """Open a regular file, or with O_DIRECTORY a folder, as `os.open` does, in a folder that is opened as by
    `folder_of`. No link is followed, and a FIFO hangs nobody. What is made in a folder with the setgid bit
    takes what its group may do from the folder, whatever the umask: so several people share a repository.
    Not a file with a private `mode`."""
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK
    with folder_of(path) as (folder, name):
        try:
            # In a sticky folder Linux refuses O_CREAT for a file that is there and is another user's.
            fd = os.open(name, flags if flags & os.O_EXCL else flags & ~os.O_CREAT, mode, dir_fd=folder)
        except FileNotFoundError:
            fd = os.open(name, flags, mode, dir_fd=folder)
        above, kind = os.fstat(folder).st_mode, os.fstat(fd).st_mode
        if not flags & os.O_DIRECTORY and not stat.S_ISREG(kind):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", path)
        if flags & os.O_CREAT and above & stat.S_ISGID and mode & 0o060:
            with contextlib.suppress(OSError):  # somebody else's
                os.fchmod(fd, stat.S_IMODE(kind) & ~0o070 | above & 0o060)
        return fd


def unlink_below(path: str) -> None:
    """Remove a file, if it is there, from a folder that is opened as by `folder_of`. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), folder_of(path) as (folder, name):
        os.unlink(name, dir_fd=folder)


def remove_all(files: Iterable[str]) -> None:
    """Remove files that nobody needs any more; what cannot be removed is left for the next time."""
    for path in files:
        with contextlib.suppress(OSError):
            unlink_below(path)


def list_below(folder: str) -> List[str]:
    """Return the names in a folder that is opened as by `folder_of`. Raises OSError."""
    fd = open_below(f"{folder}/.", os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def replace_file(path: str, data: bytes, mode: int = 0o666) -> None:
    """Put `data` at `path` in one step, so that a reader sees the old file or the new one. The caller keeps
    other writers of this machine out. The temporary file is new (O_EXCL), so no planted link is written to,
    and it has its final `mode` (less the umask) from its first byte."""
    temporary = f"{path}.{this_host()}.tmp"
    unlink_below(temporary)  # of a writer that was killed, or found no room
    with os.fdopen(open_below(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    with folder_of(path) as (folder, name):
        os.replace(os.path.basename(temporary), name, src_dir_fd=folder, dst_dir_fd=folder)


def names_in(folder: str, pattern: str) -> List[str]:
    """Return the names in a folder that match a regular expression as a whole; [] where there is none."""
    try:
        return list(filter(re.compile(pattern).fullmatch, list_below(folder)))
    except FileNotFoundError:
        return []


def nearest_with(name: str, folder: str) -> str:
    """Return the nearest folder, from this one upwards, that holds a name; "" for none."""
    while not os.path.lexists(os.path.join(folder, name)):
        folder, below = os.path.dirname(folder), folder
        if folder == below:
            return ""
    return folder


def file_stamp(path: str) -> Any:
    """Return what changes when a file does; None where there is none."""
    with contextlib.suppress(OSError):
        info = os.stat(path)
        return info.st_ino, info.st_size, info.st_mtime_ns
    return None


def open_regular(path: str) -> BinaryIO:
    """Open a file to read it, as by `open_below`. Raises OSError."""
    return os.fdopen(open_below(path, os.O_RDONLY), "rb")


def read_bounded(path: str, limit: int) -> bytes:
    """Return at most `limit` bytes of a file that is opened as by `open_regular`."""
    with open_regular(path) as file:
        return file.read(limit)


#: File systems that no other machine writes; whatever is not among them is taken for a shared one.
_LOCAL_FILE_SYSTEMS = set(
    b"bcachefs btrfs devtmpfs ext2 ext3 ext4 exfat f2fs fuseblk jfs msdos ntfs ntfs3 overlay ramfs reiserfs"
    b" rootfs tmpfs ubifs vfat xfs zfs".split()
)


def is_network(path: str) -> bool:
    """True where a path lies on a network file system, as far as Linux's table of mounts can tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        device = os.stat(path).st_dev
        number = f"{os.major(device)}:{os.minor(device)}".encode()
        with open("/proc/self/mountinfo", "rb") as file:
            for fields in map(bytes.split, file):
                if fields[2] == number:
                    return fields[fields.index(b"-") + 1] not in _LOCAL_FILE_SYSTEMS
    return False


def command_line(repo: Optional[str] = None) -> str:
    """Return how this program is called here, with --repo where that was given, for people to type."""
    import shlex

    called = os.path.basename(sys.argv[0]) if sys.argv else ""
    if called not in ("aimwatch", "aim-watcher"):
        # As it was given; not a training script, which would train again.
        file = sys.argv[0] if called == "aimwatch.py" else os.path.abspath(__file__)
        called = f"python3 {shlex.quote(file)}"
    return called if repo is None else f"{called} --repo {shlex.quote(repo)}"


#: Not the joiners U+200C and U+200D: words of Persian and families of emoji need them.
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
    r"\U000e0000-\U000e007f]"
)


def printable(text: str, limit: int = 500) -> str:
    """Return `text` on one line of at most `limit` characters, with what could move a cursor,
    reverse a line or break an encoder shown as an escape."""
    text = _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def human_s(seconds: float) -> str:
    """Return a duration in seconds as people say it: `850 ms`, `12 s`, `3 min 5 s`."""
    if seconds < 0.9995:
        return f"{max(seconds, 0.0) * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    whole = round(seconds)
    for unit_s, name, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit_s:
            rest = whole % unit_s // part_s
            return f"{whole // unit_s} {name}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"


def local_time(epoch_s: float) -> str:
    """Return seconds since the epoch as local time with its zone, for people to read."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(epoch_s)).rstrip()


def iso_time(epoch_s: float, precision: str = "milliseconds") -> str:
    """Return seconds since the epoch in ISO 8601 with its zone, which is UTC, for programs to read."""
    with contextlib.suppress(OverflowError, ValueError, OSError):
        return datetime.datetime.fromtimestamp(epoch_s, datetime.timezone.utc).isoformat(timespec=precision)
    return ""


def brief(value: Any) -> str:
    """Return what a wrong argument looks like, for the message that refuses it."""
    with contextlib.suppress(Exception):  # a tensor whose device is gone, an int of more than 4,300 digits
        return printable(repr(value), 60)
    return f"unprintable {type(value).__name__}"


def plural(count: int, noun: str) -> str:
    """Return `1 run`, `2 runs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def start_quiet_thread(run: Callable[[], None]) -> None:
    """Start a thread that takes no signal and that `threading` does not know: the main thread would sleep on
    through a signal that the system delivers to another. So all are blocked before the thread starts, which
    inherits that: it could be chosen before its first statement. Return when the thread has begun: CPython
    may crash where its end overtakes the beginning of a thread. Raises RuntimeError."""
    begun = threading.Lock()

    def begin() -> None:
        begun.release()
        run()

    begun.acquire()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        _thread.start_new_thread(begin, ())
        begun.acquire()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def short_hash(run_hash: str) -> str:
    """Return a run's hash as people see it: of one that aimwatch or Aim made up, the first 8 characters."""
    return run_hash[:8] if re.fullmatch("[0-9a-f]{24}", run_hash) else run_hash


def find_by_prefix(
    prefix: str, names: Iterable[str], what: str, way_out: str, also: Iterable[str] = ()
) -> str:
    """Return the name that is `prefix`, or the only one that starts with it, or is among those meant `also`.
    Raises RepoError for none or several: it says `what` was looked for, and for none the `way_out`."""
    names = list(names)
    # Everything starts with "", which is what a script gives whose variable is not set.
    found = {name for name in names if prefix and name.startswith(prefix)}.union(also)
    if prefix in names or len(found) == 1:
        return prefix if prefix in names else found.pop()
    shown = printable(repr(prefix), 80)
    if not found:
        raise RepoError(f"no {what} {shown}{way_out}")
    some = ", ".join(sorted(found)[:5]) + (", ..." if len(found) > 5 else "")
    raise RepoError(f"{what} {shown} is ambiguous: {some}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `: did you mean x?` for the known name that is most like one, "" where none is."""
    import difflib

    near = difflib.get_close_matches(name, sorted(known), 1, 0.5)
    return f": did you mean {printable(near[0], 60)}?" if near else ""


def this_host() -> str:
    """Return this machine's name as `uname` gives it."""
    return os.uname().nodename


def login_name(uid: int) -> str:
    """Return the login name of a user as the password database has it, else the number."""
    import pwd

    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def process_stat(pid: Any) -> List[bytes]:
    """Return of /proc/<pid>/stat what stands after the name, which may hold anything: the state is the
    first. Raises OSError."""
    return read_bounded(f"/proc/{pid}/stat", 1 << 16).rpartition(b")")[2].split()


def process_identity(pid: Any = "self") -> Tuple[Optional[str], Optional[int]]:
    """Return what tells a process of this boot from others of its number: its pid namespace, and when it
    started; None where Linux does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = process_stat(pid)
        if fields[0] not in (b"Z", b"X"):
            return os.readlink("/proc/self/ns/pid"), int(fields[19])
    return None, None


def boot_id() -> str:
    """Return what identifies this boot of this machine: within one, monotonic clocks compare."""
    with contextlib.suppress(OSError):
        return read_bounded("/proc/sys/kernel/random/boot_id", 100).decode("ascii").strip()
    return this_host()


def freshen(folder: str) -> None:
    """Have the next listing of a folder on a network file system fetched anew, and not taken from a cache:
    measured, nothing else does that with NFS and sshfs alike and leaves no name."""
    with contextlib.suppress(OSError):
        os.utime(folder)


# ======================================================================================
# Locks
#
# Who watches, who writes a run, who indexes: each is a lock on a file, which the system lets go when
# its process dies.
# ======================================================================================


def _try_lock(take: Callable[..., Any], fd: int, how: int, *span: int) -> Optional[bool]:
    """Return True when the lock was taken, False when it is held elsewhere, None where nobody can say."""
    try:
        take(fd, how | fcntl.LOCK_NB, *span)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


class FileLock:
    """A lock on a file that other processes see, on other machines too where the file system shares locks.

    A POSIX record lock goes with the process that holds it, and also when that process closes *any*
    descriptor of the same file. So this class alone opens files that are ever locked, and the process
    keeps a registry of those it holds: neither a second lock nor a probe opens one of them again.
    With `flock`, the other kind of lock is taken too, which a program may use that does not see ours. With
    `brief`, the first byte alone is locked: that excludes whoever locks the whole file, and is not taken for
    that by `lock_state`.
    """

    #: The locks that this process holds. The guard is reentrant, since a signal's handler may end a run.
    _registry: Dict[Tuple[int, int], FileLock] = {}
    _guard = threading.RLock()

    def __init__(self, path: str, *, flock: bool = False, brief: bool = False) -> None:
        self.path = path
        self.brief = brief
        self._flock = flock
        self._fd, self._identity = -1, (0, 0)

    @classmethod
    def of(cls, path: str) -> Optional[FileLock]:
        """Return what holds the lock on a file in this process."""
        with contextlib.suppress(OSError):
            return cls._registry.get(identity_of(path))
        return None

    def acquire(self, wait_s: float = 0.0, create: bool = True) -> Optional[bool]:
        """Lock the file at the path, waiting at most `wait_s` seconds for who holds it. Raises OSError.

        True: it is held now. False: another process holds it, or another FileLock of this one. None: it
        is held within this process, and the file system has no locks for others. Where this object holds
        it, it is locked again: code that copies the repository may have cost it the lock.
        """
        deadline = time.monotonic() + wait_s
        while True:
            with self._guard:
                locked = self._acquire(create)
            if locked is not False or time.monotonic() >= deadline:
                return locked
            time.sleep(0.01)

    def _acquire(self, create: bool) -> Optional[bool]:
        if self.held and self.is_there():
            return self._lock(self._fd)
        self.release()
        if self.of(self.path) is not None:
            return False
        fd = open_below(self.path, os.O_RDWR | (os.O_CREAT if create else 0))
        locked, identity = self._lock(fd), identity_of(fd)
        # An indexer that held the lock may have removed the file before it let go.
        if locked is False or not is_still(identity, self.path):
            os.close(fd)
            return False
        self._fd, self._identity = fd, identity
        self._registry[identity] = self
        return locked

    def _lock(self, fd: int) -> Optional[bool]:
        locked = _try_lock(fcntl.lockf, fd, fcntl.LOCK_EX, int(self.brief))
        # On macOS and on NFS, both kinds of lock are one, and we would meet our own.
        if self._flock and sys.platform == "linux" and not is_network(self.path):
            if _try_lock(fcntl.flock, fd, fcntl.LOCK_EX) is False:
                return False
        return locked

    @property
    def held(self) -> bool:
        """True from `acquire` to `release`, in the process that called them."""
        return self._registry.get(self._identity) is self

    def is_there(self) -> bool:
        """True where descriptor and path lead to the file that is locked, or nobody can tell."""
        return is_still(self._identity, self.path, self._fd)

    def release(self) -> None:
        """Let others have the lock. Does nothing where it is not held."""
        with self._guard:
            if self.held:
                del self._registry[self._identity]
                close_quietly(self._fd)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    @classmethod
    def forget_in_child(cls) -> None:
        """Start with nothing held: a forked child has none of its parent's record locks, and threads
        that do not exist in it would never release the guard."""
        cls._guard, cls._registry = threading.RLock(), {}


os.register_at_fork(after_in_child=FileLock.forget_in_child)


def lock_state(path: str) -> str:
    """Return whether somebody, be it this process, holds the lock on a file: `held`, `free`, `absent` for
    no such file, `unknown` where locks do not work or the file may not be read."""
    with FileLock._guard:
        ours = FileLock.of(path)
        if ours is not None:
            return "free" if ours.brief else "held"
        try:
            with open_regular(path) as file:
                # Shared, so that two that only look do not see each other; the second byte, see FileLock.
                locked = _try_lock(fcntl.lockf, file.fileno(), fcntl.LOCK_SH, 1, 1)
                return {True: "free", False: "held", None: "unknown"}[locked]
        except FileNotFoundError:
            return "absent"
        except OSError:
            return "unknown"


def identity_of(file: Union[int, str]) -> Tuple[int, int]:
    """Return what tells the file of a descriptor, or at a path, from every other. Raises OSError."""
    info = os.stat(file)
    return info.st_dev, info.st_ino


def is_still(identity: Tuple[int, int], *files: Union[int, str]) -> bool:
    """True where descriptors and paths lead to a file, or nobody can tell. A descriptor goes stale with its
    share, and where somebody else closed it, its number may by now be that of another file."""
    try:
        return all(identity_of(file) == identity for file in files)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EBADF)


def close_quietly(fd: int) -> None:
    """Close a descriptor, or -1 for none: of a share that is gone, not even that succeeds."""
    with contextlib.suppress(OSError):
        os.close(fd)


# ======================================================================================
# Repository paths
#
# One place knows where things lie. Looking a repository up touches nothing; only `Run()` and
# `init` create one, and everything else says plainly that there is none.
# ======================================================================================

#: A run's hash as it may stand in a file name that Aim splits at "-".
RUN_HASH = re.compile(r"[A-Za-z0-9_]{1,64}")


class RepoPaths:
    """Where the files of the repository at `root` are."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.aim = os.path.join(root, ".aim")
        self.check_ins = os.path.join(self.aim, "check_ins")
        self.ext = os.path.join(self.aim, "ext")
        self.notifications = os.path.join(self.ext, "notifications")
        self.config = os.path.join(self.notifications, "config.json")
        self.config_lock = os.path.join(self.notifications, "config.lock")
        self.watcher_lock = os.path.join(self.notifications, "watcher.lock")
        self.own = os.path.join(self.aim, "aimwatch")
        self.runs = os.path.join(self.own, "runs")
        self.pending = os.path.join(self.own, "pending")
        self.index = os.path.join(self.own, "index.sqlite")
        self.index_lock = os.path.join(self.own, "index.lock")
        self.outbox = os.path.join(self.own, "outbox.jsonl")
        self.watcher = os.path.join(self.own, "watcher.json")
        self.news = os.path.join(self.own, "news")
        self.stacks = os.path.join(self.own, "stacks")
        self.mutes = os.path.join(self.own, "mutes")
        #: The folders in which only the owner of the repository writes, and all, each after the one it is in.
        self.owners_folders = [self.aim, self.ext, self.notifications, self.own]
        shared = [self.check_ins, self.runs, self.pending, self.news, self.stacks, self.mutes]
        self.folders = [*self.owners_folders, *shared]

    def run_log(self, run_hash: str) -> str:
        return os.path.join(self.runs, f"{run_hash}.jsonl")

    def marker(self, run_hash: str) -> str:
        return os.path.join(self.pending, run_hash)

    def stack(self, run_hash: str) -> str:
        return os.path.join(self.stacks, f"{run_hash}.txt")

    def create(self) -> None:
        """Make the folders that are missing. Raises RepoError where that is impossible."""
        folder = self.root
        try:
            os.makedirs(folder, exist_ok=True)
            for folder in self.folders:
                with folder_of(folder) as (above, name), contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755 if folder in self.owners_folders else 0o777, dir_fd=above)
                with folder_of(f"{folder}/."):
                    pass
        except OSError as error:
            raise RepoError(
                f"cannot create a repository at {self.root}: {folder}: {error.strerror}: "
                "check the path, or choose another folder with --repo or Run(repo=...)"
            ) from None

    def share(self, group: int, owner: int = -1) -> None:
        """Make the folders those of a group whose members all train here, and nobody but the owner watches,
        indexes, and says who is notified. Raises OSError."""
        for folder in self.folders:
            with folder_of(f"{folder}/.") as (fd, here):
                os.chown(here, owner, group, dir_fd=fd)
                os.chmod(here, 0o2755 if folder in self.owners_folders else 0o3775, dir_fd=fd)


def find_repo(given: Optional[str] = None, create: bool = False) -> RepoPaths:
    """Return the paths of the repository meant by `given`.

    `given` is the folder that holds `.aim`, or `.aim` itself. Without it: $AIMWATCH_REPO, else the
    nearest `.aim` in this folder or one above it, else this folder. With `create` the repository
    is made where it is missing. Raises RepoError where there is none and none may be made.
    """
    try:
        if given is None:
            given = os.environ.get("AIMWATCH_REPO") or nearest_with(".aim", os.getcwd()) or "."
        root = os.path.abspath(os.path.expanduser(given))
    except OSError as error:
        raise RepoError(f"the current folder cannot be told: {error.strerror}") from None
    if not given or "://" in given:
        raise RepoError(f"{brief(given)} is no folder: give the one that holds .aim, on a disk or a share")
    if os.path.basename(root) == ".aim":
        root = os.path.dirname(root)
    paths = RepoPaths(root)
    try:
        os.stat(os.path.join(paths.aim, "."))
    except (FileNotFoundError, NotADirectoryError):
        if not create:
            raise RepoError(
                f"no repository at {root}: run '{command_line(root)} init' or start a run there"
            ) from None
    except OSError as error:
        raise RepoError(f"cannot use {error.filename}: {error.strerror}") from None
    if create:
        paths.create()
    return paths


# ======================================================================================
# Check-ins
#
# A heartbeat is a file name. One run leaves one file and moves it forward with rename; a name
# that anybody else left in the folder is read if it parses and is harmless if it does not.
# ======================================================================================

STARTING, CHECK_IN, FINISHED, FAILED = "starting", "check_in", "finished", "failed"
#: Aim's own heartbeat and its notice of log lines; neither says anything about a promise.
AIM_ONLY_FLAGS = {"progress", "new_logs"}

#: Longest promise: ten years. More is a mistake, and 0 says "no promise".
MAX_EXPECT_S = 315_360_000
#: No check-in of ours has a higher number.
MAX_IDX = 10**15

_CHECK_IN_NAME = re.compile(
    r"([A-Za-z0-9_]{1,64})-([0-9]{1,18})-([a-z_]{1,20})-([0-9]{1,13}(?:\.[0-9]{1,6})?)-([0-9]{1,9})"
)


class CheckIn(NamedTuple):
    """One parsed file name of `check_ins`. `utc` is for people; 0 expected seconds = no promise."""

    run_hash: str
    idx: int
    flag: str
    utc: str
    expect_next_in_s: int


def parse_check_in(name: str) -> Optional[CheckIn]:
    """Return the check-in that a file name states, or None where it states none."""
    match = _CHECK_IN_NAME.fullmatch(name)
    if match is None:
        return None
    run_hash, idx, flag, utc, expect = match.groups()
    return CheckIn(run_hash, int(idx), flag, utc, int(expect))


def check_in_name(run_hash: str, idx: int, flag: str, utc_s: float, expect_next_in_s: int) -> str:
    """Return the file name of a check-in, in the format that Aim 3 reads."""
    return f"{run_hash}-{idx:016d}-{flag}-{utc_s:011.2f}-{expect_next_in_s:05d}"


def promise_margin_s(expect_next_in_s: float) -> float:
    """Return by how many seconds a written promise exceeds the caller's, whose next calls need not write."""
    return min(max(expect_next_in_s / 10, 1.0), 30.0)


def own_check_ins(paths: RepoPaths, run_hash: str) -> List[str]:
    """Return the names in `check_ins` that are this run's, by number."""
    return sorted(filter(parse_check_in, names_in(paths.check_ins, f"{run_hash}-.*")))


class CheckInFile:
    """One run's file in `check_ins`. Takes no lock: numbers come from an atomic counter, and of what two
    threads write at the same moment the higher number is in force. Not used after a fork."""

    def __init__(self, folder: str, run_hash: str, next_idx: int, names: Sequence[str]) -> None:
        self.folder = folder
        self.run_hash = run_hash
        #: Gives the number of the next check-in, each once.
        self.next_idx = functools.partial(next, itertools.count(next_idx))
        #: The run's files, by number.
        self._names = list(names)

    def write(self, idx: int, flag: str, expect_next_in_s: int) -> None:
        """Move the run's file forward to check-in `idx`; put a `failed` one beside the last, which Aim's
        watcher goes on timing, unless the file system has no room for another name. Raises OSError."""
        names = self._names  # as they are now: a thread that hangs here must not move a later check-in
        target = check_in_name(self.run_hash, idx, flag, time.time(), expect_next_in_s)
        if flag == FAILED:
            with contextlib.suppress(OSError):
                self._create(target)
                return
        *older, newest = names or [target]
        try:
            os.rename(os.path.join(self.folder, newest), os.path.join(self.folder, target))
        except FileNotFoundError:  # there was none yet, or another thread moved it, or somebody tidied up
            self._create(target)
        self._names = [target]
        # A leftover with a lower number says nothing.
        remove_all(os.path.join(self.folder, name) for name in older)

    def _create(self, name: str) -> None:
        os.close(open_below(os.path.join(self.folder, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        self._names.append(name)


# ======================================================================================
# Run log
#
# Everything a run recorded, as JSON lines that one process appends with one write(2) each. What
# `append` returned from survives the death of the process; a torn or foreign line is skipped and
# counted, and never glued to the next record.
# ======================================================================================

LOG_FORMAT = 1
#: The year 10000, where Python's calendar ends.
MAX_TIME_S = 253_402_300_800
#: A longer line is not ours, and is never held in memory as a whole.
MAX_LINE_BYTES = 16 << 20
#: A run writes a checkpoint long before it has recorded so much.
MAX_TAIL_BYTES = 128 << 20
#: How much waits in memory while a file cannot be written.
MAX_WAITING_BYTES = 64 << 20
#: How often an unwritable log is tried again.
RETRY_S = 1.0
#: A checkpoint is written every so many lines, and at the end.
CHECKPOINT_LINES = 10_000
#: How much of a run's log is read for an alert after its last checkpoint, and of its end.
FACTS_BYTES = 16 << 10
#: Deeper params are stored as text.
MAX_PARAM_DEPTH = 50


def context_key(context: Any, depth: int = 0) -> Any:
    """Return what two encoded contexts have in common exactly when they are equal: 1, 1.0 and True are equal
    in Python, and name the same series in Aim."""
    if depth > 4 * MAX_PARAM_DEPTH:
        return None  # no writer of ours nests so deeply
    if isinstance(context, dict):
        return frozenset((key, context_key(item, depth + 1)) for key, item in context.items())
    if isinstance(context, list):
        return tuple(context_key(item, depth + 1) for item in context)
    return context


class SeriesState:
    """What is known of one metric series without reading its points."""

    #: In the order of a checkpoint, with what makes each of a value of JSON.
    KINDS: Dict[str, Callable[[Any], Any]] = {
        "id": int, "name": str, "context": dict, "count": int, "min": float, "max": float, "last": float,
        "first_step": int, "last_step": int,
        "last_epoch": lambda value: None if value is None else float(value), "last_time": float,
    }  # fmt: skip
    count = first_step = last_step = 0
    min = max = last = math.nan
    last_epoch: Optional[float] = None
    last_time = 0.0

    def __init__(self, series_id: int, name: str, context: Dict[str, Any]) -> None:
        self.id = series_id
        self.name = name
        self.context = context

    def add(self, step: int, value: float, when: float, epoch: Optional[float]) -> None:
        """Count one point in. `last` is the value at the highest step, the newest there; NaN takes
        no part in `min` and `max`."""
        if not self.count:
            self.first_step = self.last_step = step
        elif step < self.first_step:
            self.first_step = step
        # Written so that a NaN on either side gives way to a number.
        if not value >= self.min and value == value:
            self.min = value
        if not value <= self.max and value == value:
            self.max = value
        self.count += 1
        if step >= self.last_step:
            self.last_step, self.last = step, value
            self.last_time, self.last_epoch = when, epoch

    def to_list(self) -> List[Any]:
        """Return the series as a checkpoint holds it."""
        values, infinite = (getattr(self, field) for field in self.KINDS), (math.inf, -math.inf)
        return [repr(value) if value in infinite or value != value else value for value in values]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> SeriesState:
        """Read back what `to_list` gave. Raises ValueError or TypeError on anything else."""
        series = cls(*values[:3])
        for (field, kind), value in zip(cls.KINDS.items(), values):
            setattr(series, field, kind(value))
        return series


def encode_value(value: Any, odd: List[str], around: Tuple[int, ...] = ()) -> Any:
    """Return a param or a context value as strict JSON can hold it.

    None, bool, int, float, text, mappings, sequences and sets keep their kind; arrays of up to 10,000
    items become lists; dataclasses and namespaces become dicts of their fields; a NumPy scalar becomes its
    number. Anything else becomes text, as does a container inside itself, and its type is added to `odd`.
    `around` holds the ids of the containers that the value is in.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(float(value))}
    parts = _parts(value)
    if parts is None:
        odd.append(type(value).__name__)
        return _text(value)
    if id(value) in around or len(around) >= MAX_PARAM_DEPTH:
        odd.append(f"{type(value).__name__} inside itself or in too many others")
        return f"<{type(value).__name__} inside itself, or in more than {MAX_PARAM_DEPTH} others>"
    around = (*around, id(value))
    if isinstance(parts, list):
        return [encode_value(item, odd, around) for item in parts]
    if isinstance(parts, dict):
        return {_text(key): encode_value(item, odd, around) for key, item in parts.items()}
    return encode_value(parts, odd, around)


def _parts(value: Any) -> Any:
    """Return the dict or list that a container amounts to, the number of an array's scalar, or None for
    what is no container. By protocol: the libraries that these types come from are not imported."""
    # The code of those types may fail in any way, and then the value is only text.
    with contextlib.suppress(Exception):
        if isinstance(value, collections.abc.Mapping):
            return dict(value.items())
        if isinstance(value, (bytes, bytearray, memoryview, type)):
            return None
        if hasattr(value, "shape"):  # of none, as a NumPy scalar has, the product is 1
            return value.tolist() if math.prod(value.shape) <= 10_000 else None
        if isinstance(value, collections.abc.Set):
            return sorted(value, key=lambda item: (type(item).__name__, item))
        if isinstance(value, collections.abc.Sequence):
            return list(value)
        if hasattr(value, "__dataclass_fields__"):
            return {name: getattr(value, name) for name in value.__dataclass_fields__}
        if {"Namespace", "SimpleNamespace"}.intersection(kind.__name__ for kind in type(value).__mro__):
            return dict(vars(value))
    return None


def _text(value: Any) -> str:
    # str() of an enum's member is `Color.RED`, where its value is "red" or 2.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__repr__(value)
    with contextlib.suppress(Exception):
        return str(value)
    return f"<{type(value).__name__} without a text>"


def decode_value(value: Any, depth: int = 0) -> Any:
    """Return what `encode_value` was given, as a copy, without what no writer of ours nests so deeply."""
    if depth > 4 * MAX_PARAM_DEPTH:
        return None
    if isinstance(value, dict):
        if len(value) == 1 and value.get("$float") in ("nan", "inf", "-inf"):
            return float(value["$float"])
        return {key: decode_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [decode_value(item, depth + 1) for item in value]
    return value


def param_items(value: Any, path: str) -> Iterator[Tuple[str, Any]]:
    """Yield params with their dotted paths."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from param_items(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _in_range(number: float, most: float) -> float:
    if not 0 <= number < most:
        raise ValueError(f"{number} is no time, or no number of a check-in")
    return number


#: What makes each property of a value of JSON.
_PROP_KINDS: Dict[str, Callable[[Any], Any]] = {
    "name": str, "description": lambda value: value if value is None else str(value), "experiment": str,
    "archived": bool, "tags": lambda tags: list(map(str, tags)),
}  # fmt: skip


class RunState:
    """Everything a run log says, less the points themselves. The writer keeps one beside its log and the
    reader builds one from the log, both with `apply`, so that what is read back is what the writer had."""

    #: How many bytes of the log it covers; more may have been read.
    log_size = 0

    def __init__(self, run_hash: str) -> None:
        self.hash = run_hash
        self.header: Dict[str, Any] = {}
        self.created_at = 0.0
        self.params: Dict[str, Any] = {}
        self.props: Dict[str, Any] = {}
        self.series: Dict[int, SeriesState] = {}
        self.end: Optional[Dict[str, Any]] = None
        self.next_idx = 1
        self.last_time = 0.0
        self.skipped = 0

    def apply(self, record: Any) -> bool:
        """Take one parsed line in; False where it is not a record of ours."""
        try:
            if type(record) is list:
                step, value, epoch, when = _parse_point(record)
                self.series[record[0]].add(step, value, when, epoch)
                self.last_time = max(self.last_time, when)
            elif "checkpoint" in record:
                self._restore(record)
            elif "format" in record:
                self.created_at = self._seen(record["created_at"])
                self.header = record
            elif "resume" in record:
                self._seen(record["resume"])
                self.header = {**self.header, **record}
                self.end = None
            elif "set" in record:
                parent, key = self._place(record["set"], make=True)
                parent[key] = record["value"] if record["set"] else dict(record["value"])
            elif "del" in record and record["del"]:
                parent, key = self._place(record["del"])
                del parent[key]
            elif "del" in record:
                self.params = {}
            elif "series" in record:
                series = SeriesState(int(record["series"]), str(record["name"]), dict(record["context"]))
                self.series.setdefault(series.id, series)
            elif "props" in record:
                props = dict(record["props"])
                for name in props.keys() & _PROP_KINDS.keys():
                    props[name] = _PROP_KINDS[name](props[name])
                self.props.update(props)
            elif "log" in record:
                self._seen(record["time"])
            elif record["end"] in (FINISHED, FAILED):
                self.next_idx = max(self.next_idx, int(_in_range(int(record["idx"]), MAX_IDX)) + 1)
                self._seen(record["time"])
                self.end = record
            else:
                return False
        except MALFORMED:
            return False
        return True

    def _seen(self, when: Any) -> float:
        when_s = _in_range(float(when), MAX_TIME_S)
        self.last_time = max(self.last_time, when_s)
        return when_s

    def _place(self, path: Sequence[str], make: bool = False) -> Tuple[Any, Any]:
        """Return what holds the last key of a path of params, and that key; `make` the dicts above it."""
        parent: Any = vars(self)
        at: Any = "params"
        for key in path:
            if make and not isinstance(
                parent[at] if isinstance(parent, list) else parent.get(at), (dict, list)
            ):
                parent[at] = {}
            parent = parent[at]
            at = int(key) if isinstance(parent, list) else str(key)
        return parent, at

    def param(self, path: Sequence[str]) -> Any:
        """Return what stands at a path of params, encoded. Raises KeyError."""
        with contextlib.suppress(LookupError, TypeError, ValueError):
            parent, key = self._place(path)
            return parent[key]
        raise KeyError(tuple(path))

    def to_checkpoint(self) -> Dict[str, Any]:
        """Return the whole state as a record, from which `apply` builds it again."""
        plain = ("header", "params", "props", "end", "next_idx", "last_time")
        series = [series.to_list() for series in list(self.series.values())]
        return {"checkpoint": 1, **{name: getattr(self, name) for name in plain}, "series": series}

    def _restore(self, record: Dict[str, Any]) -> None:
        # Into another state first: half a checkpoint would be a lie.
        state = RunState(self.hash)
        records = [record["header"], {"set": [], "value": record["params"]}, {"props": record["props"]}]
        records += [record["end"]] if record["end"] else []
        if record["checkpoint"] != 1 or not all(map(state.apply, records)):
            raise ValueError("another format")
        state.series = {item.id: item for item in map(SeriesState.from_list, record["series"])}
        next_idx = int(_in_range(int(record["next_idx"]), MAX_IDX))
        state.next_idx = max(self.next_idx, state.next_idx, next_idx)
        state.last_time = max(self.last_time, state._seen(record["last_time"]))
        self.__dict__.update(vars(state), skipped=self.skipped)


class AppendFile:
    """Appends lines to one file, whose only writer the caller is: a run's log, or the outbox. Raises OSError
    where it cannot be opened or made; its folder must be there.

    A line that the disk refuses waits in memory, in order, and is tried again with the next one, at most
    once a second. When too much waits, the oldest lines are given up. Where the file was removed or replaced,
    another is begun with the `summary` of all that was ever appended.

    On a network file system a write succeeds, and its error comes at fsync. There a thread syncs the file
    once a second, and lines are kept until a sync has succeeded. After one that failed, the file is cut to
    what is known to be on the disk, and the lines since wait again.
    """

    def __init__(self, path: str, summary: Callable[[], List[bytes]]) -> None:
        self.path = path
        self._summary = summary
        #: What the disk refused, how many bytes that is, and how many lines were given up.
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = self._dropped = 0
        self._retry_mono = -math.inf
        self._complained = False
        #: True where nothing may be written before the file is opened again: its path leads elsewhere, its
        #: descriptor is stale, or some of what was written to it is lost.
        self._lost = False
        #: On a network file system, the size of the file when it was on the disk, the lines since, each with
        #: the size of the file at its end, and whether the thread found the file in its place. Asking has
        #: the system send all that was written since, so nobody else asks.
        self._must_sync = is_network(os.path.dirname(path))
        self._synced_size = self._opened = 0
        #: What the last sync reached: of which opening of the file (the system gives numbers of descriptors
        #: again), and which size. The writer takes it over when it looks, and not in a write, since of an
        #: error that a write was told no sync is told.
        self._reached = (0, 0)
        self._syncing = threading.RLock()
        self._unsynced: deque[Tuple[int, bytes]] = deque()
        self._in_place = True
        self._fd, self._identity = -1, (0, 0)
        self._open()
        if self._must_sync:
            with contextlib.suppress(RuntimeError):  # none can be started; `close` syncs
                start_quiet_thread(self._sync_each_second)

    def _open(self) -> None:
        fd = open_below(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        close_quietly(self._fd)
        # In this order, for a sync under way. Whatever fails below is tried again, and closes the descriptor.
        self.size, self._fd = 0, fd
        identity, size = identity_of(fd), os.fstat(fd).st_size
        if identity == self._identity and self._must_sync and self._synced_size < size:
            size = self._synced_size
            os.ftruncate(fd, size)
        # A writer that was killed may have left half a line; the next record must not join it.
        self._torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        self._identity, self.size, self._synced_size = identity, size, size
        self._opened += 1  # last, since a sync under way says nothing of this opening

    def append(self, line: bytes) -> None:
        """Write one line with its line break; keep it for later where that fails. Never raises OSError."""
        if not self._waiting and self._write(line):
            return
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        while self._waiting_bytes > MAX_WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())
            self._dropped += 1
        self.flush()

    def flush(self, now: bool = False) -> bool:
        """Write what waits, if the last try was not a moment ago or `now`; True when nothing waits."""
        if (self._waiting or self._lost) and (now or time.monotonic() >= self._retry_mono):
            if self._lost:
                self._open_again()
            while self._waiting:
                line = self._waiting[0]
                if not self._write(line):
                    break
                # A signal's handler that recorded something meanwhile has written this line too.
                if self._waiting and self._waiting[0] is line:
                    self._waiting_bytes -= len(self._waiting.popleft())
        return not self._waiting and not self._lost

    def _open_again(self) -> None:
        """Open the file again; what is not known to be in it waits to be written. Where there is another or
        none, it is begun with the first line of the summary, what waits, and the rest of the summary."""
        identity, synced_size = self._identity, self._synced_size
        try:
            self._open()
        except OSError as error:
            self._complain(error)
            return
        lines = [line for end, line in self._unsynced if end > self._synced_size] + [*self._waiting]
        if self._identity != identity or self.size < synced_size:  # servers give numbers of files again
            first, *rest = self._summary()
            lines = [first, *self._waiting, *rest]
            log.warning("%s was begun anew: of what it held, only the summary is there", self.path)
        # In one statement: the handler of a signal finds the lines here or there.
        self._unsynced, self._waiting = deque(), deque(lines)
        self._lost, self._in_place, self._waiting_bytes = False, True, sum(map(len, lines))

    def _write(self, line: bytes) -> bool:
        if self._lost:
            return False
        try:
            data = b"\n" + line if self._torn else line
            written = os.write(self._fd, data)
        except OSError as error:
            self._complain(error)
            return False
        self.size += written
        self._torn = written < len(data)
        if written < len(data) - 1:  # the next record brings a line break
            return False
        if self._must_sync:  # the line is kept until it is known to be on the disk
            self._unsynced.append((self.size, line))
            while self._unsynced and self._unsynced[0][0] <= self._synced_size:
                self._unsynced.popleft()
            if self.size - self._synced_size > MAX_WAITING_BYTES:  # what a share that hangs is given to lose
                self._synced_size = self._unsynced.popleft()[0]
        return True

    def _settle(self) -> None:
        opened, size = self._reached
        if opened == self._opened and not self._lost:
            self._synced_size = max(self._synced_size, size)

    def _complain(self, error: OSError) -> None:
        # On a network file system, it may be the error of an earlier write, and is reported only once.
        self._lost = self._lost or self._must_sync
        self._retry_mono = time.monotonic() + RETRY_S
        if not self._complained:
            self._complained = True
            log.warning("cannot write %s: %s; records wait in memory", self.path, error.strerror)

    def _sync_each_second(self) -> None:
        while self._fd >= 0:
            self.sync()
            self._in_place = is_still(self._identity, self.path, self._fd)
            time.sleep(RETRY_S)

    def sync(self) -> bool:
        """Wait until what was written has reached the disk; False where it is known that it did not."""
        with self._syncing:  # of two at once, one is told the error, and the other that all is well
            opened, size, fd = self._opened, self.size, self._fd
            try:
                if fd != -1:  # closed while this waited
                    os.fsync(fd)
                    self._reached = opened, size
            except OSError as error:
                if self._must_sync and opened == self._opened and self._fd != -1:
                    self._complain(error)
        return not self._lost

    def look(self) -> bool:
        """Return True where the path leads to the file that is written; open it again where not. A file that
        was removed takes writes all the same, and nobody finds them."""
        self._settle()
        in_place = self._in_place if self._must_sync else is_still(self._identity, self.path, self._fd)
        self._lost = self._lost or not in_place
        self.flush(now=self._lost)
        return not self._lost

    def close(self) -> int:
        """Try once more to write what waits, and close the file. Return its size in bytes, or -1 where
        not everything is in it."""
        whole = False
        for _ in range(2):  # what a failed sync lost is written once more
            whole = whole or self.flush(now=True) and (not self._must_sync or self.sync())
        self._settle()
        missing = self._dropped + len(self._waiting)
        missing += sum(end > self._synced_size for end, _ in self._unsynced)
        if missing:
            log.error("%s: %d records could not be written", self.path, missing)
        close_quietly(self._fd)
        self._fd, self._lost = -1, True
        return -1 if missing or not whole else self.size


def read_log(path: str, run_hash: str, part: int = 0) -> RunState:
    """Return what the run log at `path` says. Raises OSError where it cannot be read, or is no log of ours,
    with so much after its last checkpoint.

    Reads from the last checkpoint on: what a run has recorded since decides the cost. With `part`, so many
    bytes after the checkpoint, and of the end, are read alone: where a run writes on without end, that it
    died must be said all the same, and soon.
    """
    with open_regular(path) as file:
        state, lines, left = RunState(run_hash), read_lines(file), part or math.inf
        # Of the open file: a network file system may answer `stat` from a cache.
        state.log_size = size = start = os.fstat(file.fileno()).st_size
        for is_last in (False, False, True):  # the last may be torn, and the one before it serves as well
            start = 0 if is_last else _last_checkpoint(file.fileno(), start - 1, size - MAX_TAIL_BYTES)
            file.seek(start)
            if not start or _apply_line(state, next(lines, (b"", True))[0]):
                break
        if not start and size > MAX_TAIL_BYTES and not part:
            raise OSError(errno.EFBIG, f"no checkpoint in its last {MAX_TAIL_BYTES >> 20} MB")
        for line, whole in lines:
            # A last line without its end is being written, or was torn; not counted as damage.
            if not _apply_line(state, line) and whole:
                state.skipped += 1
            left -= len(line)
            if left <= 0 and size - part > file.tell():
                left = math.inf
                file.seek(size - part - 1)
                file.readline(part)  # the rest of a line
    return state


def skim_log(paths: RepoPaths, run_hash: str) -> RunState:
    """Return what an alert needs of a run's log, however long that is. Raises OSError."""
    return read_log(paths.run_log(run_hash), run_hash, FACTS_BYTES)


def log_problem(state: RunState) -> str:
    """Return why a log that was read is of no use, or ""."""
    version = state.header.get("format", LOG_FORMAT)
    if version != LOG_FORMAT:
        known = f"this aimwatch knows {LOG_FORMAT}"
        return f"written in format {brief(version)}, and {known}: use the newer aimwatch"
    return "" if state.created_at else "no run description in it: it is empty, or no run's log"


def _parse_point(point: Any) -> Tuple[int, float, Optional[float], float]:
    # A last line without its end is one, if it parses: only its line break was torn off.
    epoch, when = float(point[4]) if len(point) > 4 else None, _in_range(float(point[3]), MAX_TIME_S)
    return int(point[1]), float(point[2]), epoch, when


def read_points(path: str, series_id: int) -> List[Tuple[int, float, Optional[float], float]]:
    """Return the points of one series as (step, value, epoch, time), sorted by step, those of one
    step as recorded; those that `read_log` counts and no others. Raises OSError."""
    start = b"[%d," % series_id
    points = []
    with open_regular(path) as file:
        for line, _ in read_lines(file):
            if line.startswith(start):
                with contextlib.suppress(*MALFORMED):
                    points.append(_parse_point(from_json(line)))
    points.sort(key=lambda point: point[0])
    return points


def parse_message(line: bytes) -> Optional[Dict[str, Any]]:
    """Return the log message that a line holds, with a level in `log`; None for any other line."""
    if line.startswith(b'{"log"'):
        with contextlib.suppress(*MALFORMED):
            record = from_json(line)
            level, when = int(record["log"]), _in_range(float(record["time"]), MAX_TIME_S)
            return {**record, "log": level, "time": when, "message": str(record["message"])}
    return None


def read_messages(path: str) -> Iterator[Dict[str, Any]]:
    """Yield the log messages of a run as recorded. Raises OSError."""
    with open_regular(path) as file:
        yield from filter(None, (parse_message(line) for line, _ in read_lines(file)))


def read_lines(file: BinaryIO) -> Iterator[Tuple[bytes, bool]]:
    """Yield (line, whether it had its end); of a line of over MAX_LINE_BYTES, the pieces."""
    for line in iter(functools.partial(file.readline, MAX_LINE_BYTES), b""):
        yield line, line.endswith(b"\n")


def _apply_line(state: RunState, line: bytes) -> bool:
    if line == b"\n":
        return True  # written by a resumed run to end its predecessor's torn line
    try:
        return state.apply(from_json(line))
    except (ValueError, RecursionError):
        return False


def _last_checkpoint(fd: int, end: int, least: int) -> int:
    """Return the offset, from `least` up to `end`, of the last line that starts a checkpoint, or 0. JSON
    strings hold no raw line break, so the bytes searched for stand nowhere else."""
    needle = b'\n{"checkpoint"'
    while end > max(least, 0):
        start = max(least, 0, end - (1 << 18))
        at = os.pread(fd, end - start + len(needle), start).rfind(needle)
        if at >= 0:
            return start + at + 1
        end = start
    return 0


# ======================================================================================
# Sessions and ends
#
# What a run's log says of the process that writes it, and how the run ended, in words and in the frames that
# say where. An exception is described whatever its code does.
# ======================================================================================


def git_commit() -> Optional[str]:
    """Return the commit that is checked out around the script, or else around the working folder, as the log
    says that git keeps of that."""
    script = next(iter(getattr(sys, "argv", ())), "")
    ours = os.path.realpath(script) == os.path.realpath(__file__)  # `exec`: where this file lies says nothing
    for start in ("." if ours else os.path.dirname(script), "."):
        folder = nearest_with(".git", os.path.realpath(start))
        git = os.path.join(folder, ".git")
        with contextlib.suppress(OSError):
            if os.path.isfile(git):  # of a worktree, or a submodule
                git = os.path.join(folder, os.fsdecode(read_bounded(git, 4096)).partition(":")[2].strip())
            moves = read_bounded(os.path.join(git, "logs", "HEAD"), 1 << 24)
            commits = re.findall(rb"^\S+ ([0-9a-f]{40}|[0-9a-f]{64}) ", moves, re.MULTILINE)
            if commits:
                return str(commits[-1], "ascii")
    return None


def describe_session() -> Dict[str, Any]:
    """Return where this process runs, as the first line of a run log states it."""
    session: Dict[str, Any] = {
        "host": this_host(),
        "boot": boot_id(),
        **dict(zip(("pid_space", "pid_start"), process_identity())),
        "pid": os.getpid(),
        "user": login_name(os.getuid()),
        "argv": [str(argument)[:500] for argument in getattr(sys, "argv", [])][:100],
        "python": "{}.{}.{}".format(*sys.version_info[:3]),
        "commit": git_commit(),
        "stdout": os.environ.get("SLURM_JOB_STDOUT"),
        **describe_rank(),
    }
    with contextlib.suppress(OSError):  # the folder may be gone; the run is not
        session["cwd"] = os.getcwd()
        if stat.S_ISREG(os.fstat(1).st_mode):
            session["stdout"] = os.readlink("/proc/self/fd/1")
    for system, variable in (("lsf", "LSB_JOBID"), ("pbs", "PBS_JOBID"), ("slurm", "SLURM_JOB_ID")):
        if os.environ.get(variable):
            session["job"] = f"{system} {os.environ[variable]}"
    return session


MAX_REASON, MAX_FRAME = 2000, 500
#: How many causes and members of an exception are told, and how much is read of a traceback that is text.
MAX_CAUSES, MAX_TRACEBACK = 3, 1 << 16
#: What a file is called that is not the user's own: of a library, of Python itself, or this one.
_LIBRARY = re.compile(
    r"/(site|dist)-packages/|/lib(64)?/(python|pypy)[0-9][0-9.]*/|^<frozen |"
    rf"(^|/){re.escape(os.path.basename(__file__))}$"
)
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_=>])")
#: A frame in a traceback that came as text from another process.
_REMOTE_FRAME = re.compile(r'^ *File "([^"\n]+)", line (\d+), in (.+)(?:\n +(?!File ")(.+))?', re.MULTILINE)

#: Who starts several processes as one job says in these which of them this is, and how many there are.
RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
#: What is the same in all processes of a job and in no other job, and what tells its starts apart.
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
START_VARIABLES = (
    *("SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def describe_rank() -> Dict[str, Any]:
    """Return the `rank` of this process, the size of its `world`, and its `group`, the same for all of
    them; {} for a process that is alone."""
    env = os.environ
    for names in RANK_VARIABLES:
        values = [env.get(name, "") for name in names]
        if not all(re.fullmatch("[0-9]{1,7}", value) for value in values):
            continue
        rank, world = map(int, values)
        if not rank < world or world == 1:
            return {}
        job = [env[name] for name in JOB_VARIABLES if env.get(name)]
        if not job and env.get("MASTER_ADDR", "localhost") in ("localhost", "127.0.0.1"):
            job = [this_host()]
        import hashlib

        told = to_json([job, world, *(env.get(name) for name in START_VARIABLES)])
        return {"rank": rank, "world": world, "group": hashlib.sha256(told.encode("ascii")).hexdigest()[:12]}
    return {}


class End(NamedTuple):
    """How a run ended: its flag, why, and what shows where: frames, or the last output of a program."""

    flag: str
    reason: str = ""
    frames: Sequence[str] = ()
    output: Sequence[str] = ()


def describe_exception(error: BaseException, depth: int = 0) -> str:
    """Return an exception's type and message in one string, with its notes, the members of a group, and
    what caused it. Of a message of several lines, the first and the last."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    parts = [type(error).__qualname__]
    with contextlib.suppress(Exception):  # the code of the exception's class may fail in any way
        lines = [line.strip() for line in _ESCAPE.sub("", str(error)).splitlines() if line.strip()]
        if lines:
            ends = [lines[0], lines[-1]] if len(lines) > 1 else lines
            parts[0] += f": {' ... '.join(line[: MAX_REASON // 2] for line in ends)}"
        parts += [str(note).strip().split("\n")[0] for note in getattr(error, "__notes__", ())]
        members, cause = getattr(error, "exceptions", ()), error.__cause__
        if depth < MAX_CAUSES and isinstance(members, tuple):
            parts += [describe_exception(member, depth + 1) for member in members[:MAX_CAUSES]]
        if depth < MAX_CAUSES and cause is not None and not type(cause).__name__.endswith("RemoteTraceback"):
            parts.append(f"caused by {describe_exception(cause, depth + 1)}")
    return "; ".join(parts)[:MAX_REASON]


def exit_end(status: Any, error: Optional[BaseException]) -> Optional[End]:
    """Return how a run ends whose program exits with a status, or a text, while it handles an exception;
    None for a success."""
    if status is None or status == 0:
        return None
    while isinstance(error, SystemExit):  # who catches one may exit once more, as `multiprocessing` does
        error = error.__context__
    reason = f"exited with status {int(status) if isinstance(status, int) else f'1: {status}'}"
    if error is not None:
        reason += f" ({describe_exception(error)})"
    return End(FAILED, reason[:MAX_REASON], frames_of(error))


def telling_frames(files: Sequence[str]) -> List[int]:
    """Return which frames of a stack say where it is, by the files of all, outermost first: the innermost
    six, but always the last two in files of the user's own."""
    users = [index for index, file in enumerate(files) if not _LIBRARY.search(file)][-2:]
    others = [index for index in range(len(files)) if index not in users]
    return sorted(users + others[len(users) - 6 :])


def frames_of(error: Optional[BaseException] = None, frame: Optional[types.FrameType] = None) -> List[str]:
    """Return the frames of an exception, or of the stack that ends in a frame, that say where it came from,
    outermost first: `file:line in name: code`. Those of another process count, where the exception has
    them as text."""
    steps = [] if frame is None else list(traceback.walk_stack(frame))[::-1]
    steps += traceback.walk_tb(None if error is None else error.__traceback__)
    found = list(traceback.StackSummary.extract(iter(steps), lookup_lines=False))
    for _ in range(MAX_CAUSES):
        if error is not None:
            with contextlib.suppress(Exception):
                text = _ESCAPE.sub("", str(error)[-MAX_TRACEBACK:])
                for file, line, name, code in _REMOTE_FRAME.findall(text):
                    found.append(traceback.FrameSummary(file, int(line), name, line=code))
            error = error.__cause__
    frames = []
    for step in (found[index] for index in telling_frames([step.filename for step in found])):
        code = ""
        with contextlib.suppress(Exception):  # where no descriptor is left to open the file with
            code = step.line
        frames.append(f"{step.filename}:{step.lineno} in {step.name}: {code}"[:MAX_FRAME])
    return frames


# ======================================================================================
# Process
#
# What all the runs of a process share: one lazy thread that writes the stacks when a promise is missed,
# and the hooks that tell of its end. A forked child does nothing to its parent's runs.
# ======================================================================================

_monotonic = time.monotonic
_getpid, _get_ident = os.getpid, _thread.get_ident

#: How long after a missed promise the stacks are written at the earliest, and how often that is looked for.
STACKS_AFTER_S, STACKS_POLL_S = 0.5, 1.0


class _Stacks:
    """Writes the stacks of all threads to a file when a run misses its promise. One thread looks for that,
    from the first promise on. `threading` does not know it, so it delays no exit. While it looks at the
    others it holds the GIL, and they stand still; while C code holds it, nothing is written."""

    def __init__(self) -> None:
        #: By path, when a run's file is due (monotonic), and the thread that promised.
        self._due: Dict[str, Tuple[float, int]] = {}
        self._has_thread = False

    def arm(self, path: str, due_mono: float, thread: int) -> None:
        """Have all stacks written to `path` soon after `due_mono`, unless armed anew before."""
        self.disarm(path)
        self._due[path] = due_mono, thread
        if due_mono < math.inf and not self._has_thread:
            with contextlib.suppress(OSError, RuntimeError):  # no thread can be started
                # Not in the thread: a child that was forked meanwhile would wait for its locks for ever.
                import faulthandler  # noqa: F401
                import tempfile

                tempfile.TemporaryFile().close()
                start_quiet_thread(self._watch)
                self._has_thread = True

    def disarm(self, path: str) -> None:
        """Write nothing to `path`, and remove what was written: the run went on, or has ended."""
        if self._due.pop(path, None) is None:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _watch(self) -> None:
        never = threading.Event()
        while not never.wait(STACKS_POLL_S):
            self.write_missed()

    def write_missed(self) -> None:
        """Write the stacks for every run that missed its promise."""
        import faulthandler
        import tempfile

        now = _monotonic()
        for path, (due_mono, thread) in list(self._due.items()):
            if due_mono > now or self._due.pop(path, None) is None:
                continue
            try:
                # Nothing else of Python runs until all is written to the local file.
                with tempfile.TemporaryFile() as local:
                    faulthandler.dump_traceback(local)
                    local.seek(0)
                    text = local.read()
                with os.fdopen(open_below(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                    file.write(f"Missed its promise in thread {thread:#018x}\n".encode() + text)
                if path in self._due:  # the run went on meanwhile
                    os.unlink(path)
            except OSError as error:
                log.debug("no stacks in %s: %s", path, error.strerror)


#: The signals that end a process, and its runs with it.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def _in_full(end: Callable[..., None], *arguments: Any) -> None:
    """Do what ends a run, and do it again where the handler of a signal raises in it, as torch's of SIGCHLD
    may: then what is left is done, and the exception goes on."""
    try:
        end(*arguments)
    except BaseException:
        end(*arguments)
        raise


class _Process:
    """What runs need of the process: its exit and its status, exceptions that nobody handles, signals, exec,
    the cells of a notebook. Each hook calls what stood there before. A forked child inherits them, and every
    run declines there by its pid."""

    def __init__(self) -> None:
        self._runs: List[weakref.ref[Run]] = []
        self.stacks = _Stacks()
        #: `sys.excepthook` with ours; None before the first run.
        self._excepthook: Any = None
        #: The end of a run whose program called `sys.exit`.
        self.exit: Optional[End] = None
        #: What was said, and need not be said again.
        self.said: Set[str] = set()
        self._cell_error = 0

    @property
    def runs(self) -> List[Run]:
        """The runs that are still there, in the order in which they were opened."""
        return [run for run in [ref() for ref in self._runs.copy()] if run is not None]

    def add(self, run: Run) -> None:
        self._runs.append(weakref.ref(run, self._runs.remove))
        self.exit = None  # whoever called it, somebody caught it
        if self._excepthook is None:
            self._install()
        for signum in ENDING_SIGNALS:
            # In other threads none can be set; None is a handler that is not Python's, and is kept.
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(signum, signal.getsignal(signum))

    def warn_once(self, what: str, message: str, *args: Any) -> None:
        """Log a warning, unless this process has logged one of this."""
        if what not in self.said:
            self.said.add(what)
            log.warning(message, *args)

    def _install(self) -> None:
        # It reads lines of code for the end: where no descriptor is left, nothing can be imported.
        import tokenize  # noqa: F401

        _hook(sys, "excepthook", self._on_uncaught)
        _hook(sys, "exit", self._on_sys_exit)
        _hook(threading, "excepthook", self._on_thread_exception)
        _hook(os, "execv", self._on_exec)
        _hook(os, "execve", self._on_exec)
        _hook(signal, "signal", self._on_signal_set)
        self._excepthook = sys.excepthook
        atexit.register(self._at_exit)
        os.register_at_fork(after_in_child=self._after_fork_in_child)
        with contextlib.suppress(Exception):  # IPython is not there, half imported, or another of that name
            sys.modules["IPython"].get_ipython().events.register("post_run_cell", self._after_cell)
            self._cell_error = id(getattr(sys, "last_value", None))

    def _after_fork_in_child(self) -> None:
        self.stacks = _Stacks()  # only the forking thread exists in the child
        for run in self.runs:
            run._window = math.nan, 0.0
        # With a handler in Python, a child that computes in C would outlive its SIGTERM.
        for signum in ENDING_SIGNALS:
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, signal.SIG_DFL)

    def _on_signal_set(self, real: Callable[..., Any], signalnum: int, handler: Any) -> Any:
        """Set ours in the place of the default action, and around a handler of SIGTERM."""
        if any(run._is_mine() for run in self.runs):
            if signalnum in ENDING_SIGNALS and handler == signal.SIG_DFL:
                handler = self._on_signal
            ours = getattr(handler, "func", handler) in (self._on_signal, self._on_users_signal)
            if signalnum == signal.SIGTERM and callable(handler) and not ours:
                handler = functools.partial(self._on_users_signal, handler)
        return real(signalnum, handler)

    def _on_users_signal(self, handler: Callable[..., Any], signum: int, frame: Any) -> Any:
        self._each(lambda run: run._note_signal(signum, frame))
        return handler(signum, frame)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if signal.getsignal(signum) != self._on_signal:
            # A handler that was installed later calls ours: whether the process ends is for it to say.
            self._each(lambda run: run._note_signal(signum, frame))
            return
        # A second signal meanwhile does all of this anew, on top of what is under way.
        self._each(lambda run: run._end_and_close(run._signal_end(signum, frame)))
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        if os.getpid() == 1:  # to which, in a container, the kernel does not deliver it
            os._exit(128 + signum)

    def _each(self, end: Callable[[Run], None]) -> None:
        for run in self.runs:
            _in_full(end, run)

    def _on_uncaught(self, real: Callable[..., Any], kind: Any, error: BaseException, trace: Any) -> Any:
        self._each(lambda run: run._end(run._end_of(error)))
        return real(kind, error, trace)

    def _on_thread_exception(self, real: Callable[..., Any], hooked: Any) -> Any:
        thread, error = _get_ident(), hooked.exc_value
        self._each(lambda run: run._end(run._end_of(error) if run._thread == thread else None))
        return real(hooked)

    def _on_sys_exit(self, real: Callable[..., Any], *status: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            with contextlib.suppress(Exception):  # the status may be any object
                self.exit = exit_end(status[0] if status else None, sys.exc_info()[1])
            for run in self.runs:
                run._window = math.nan, 0.0  # the next report shows that somebody caught it
        return real(*status)

    def _on_exec(self, real: Callable[..., Any], path: Any, argv: Any, *args: Any, **options: Any) -> Any:
        with contextlib.suppress(TypeError, ValueError):  # wrong arguments are for `exec` to refuse
            if os.access(path, os.X_OK):  # `execvp` tries one folder after the other
                program = printable(" ".join(map(os.fsdecode, argv)), 200)
                self._each(lambda run: run._end(End(FAILED, f"replaced by {program}")))
        return real(path, argv, *args, **options)

    def _at_exit(self) -> None:
        # Somebody may have replaced our excepthook, and not call it.
        error = None if sys.excepthook == self._excepthook else getattr(sys, "last_value", None)
        self._each(lambda run: run._end_and_close(run._end_of(error), self.exit, run._unreported("exited")))

    def _after_cell(self, result: Any) -> None:
        """End the runs of a cell that raised; of one that ended well no promise stays."""
        error, last = getattr(result, "error_in_exec", None), getattr(sys, "last_value", None)
        if error is None and id(last) != self._cell_error:
            error = last  # %run shows it, and goes on
        self._cell_error = id(last)
        thread = _get_ident()  # a run of another thread goes on between cells
        self._each(lambda run: run._after_cell(error) if run._thread == thread else None)


def _hook(module: Any, name: str, hook: Callable[..., Any]) -> None:
    """Have a hook called in the place of a module's function, which is its first argument."""
    real: Callable[..., Any] = getattr(module, name)

    @functools.wraps(real)
    def hooked(*args: Any, **options: Any) -> Any:
        return hook(real, *args, **options)

    setattr(module, name, hooked)


_process = _Process()

# ======================================================================================
# Run
#
# What a training script holds. A wrong argument raises where it stands; after the constructor has
# returned, no failure of a disk or a share reaches the training loop.
# ======================================================================================

#: The experiment of a run that was given none, as in Aim.
DEFAULT_EXPERIMENT = "default"
#: How long SQLite waits for those who read or write the index.
BUSY_S = 2.0


def default_name(run_hash: str) -> str:
    """Return the name of a run that was given none, as in Aim."""
    return f"Run: {run_hash}"


def _float_of(value: Any) -> Optional[float]:
    """Return a number as a float; None for anything else, be it the text of one, or too large."""
    try:
        return None if isinstance(value, (str, bytes, bytearray)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def checked_expect_s(value: Any) -> float:
    """Return a promise in seconds as a float. Raises ArgumentTypeError or ArgumentError."""
    number = None if isinstance(value, bool) else _float_of(value)
    if number is not None and 0 <= number <= MAX_EXPECT_S:
        return number
    kind = ArgumentTypeError if number is None else ArgumentError
    raise kind(f"expect_next_in must be 'auto' or from 0 to {MAX_EXPECT_S} seconds, not {brief(value)}")


class Rhythm:
    """Learns from the gaps between the reports of a run, and from nothing else, what may be promised:
    `expect_next_in="auto"`. Three times the longest gap that came lately, where "lately" is a hundred times
    as long as the gap itself: what takes a 70th of the time, such as a checkpoint or a validation, is
    expected for ever, and what came once is forgotten. At least a minute, at most a day, and half an hour
    until ten gaps are known."""

    gaps = 0
    seconds = _longest_s = 0.0

    def add(self, gap_s: float) -> None:
        """Take the time between two reports into account."""
        self.gaps += 1
        self.seconds += gap_s
        # One gap teaches no more than ten minutes, or ten times what was known: the job may stop overnight.
        learned_s = min(gap_s, max(10 * self._longest_s, 600.0))
        self._longest_s = max(self._longest_s - gap_s / 100, learned_s)

    @property
    def expect_s(self) -> float:
        """Within how many seconds the next report is promised."""
        unseen_s = 1800.0
        if self.gaps >= 10:
            # A gap longer than all before, as the first validation is, may be half as long as the run so
            # far. After an hour, a run that had none is the less likely to have one.
            unseen_s = min(self.seconds / 2, 1800.0 * 3600.0 / max(self.seconds, 3600.0))
        return min(max(60.0, 3 * self._longest_s, unseen_s), 86_400.0)


def checked_run_hash(value: Any) -> str:
    """Return a run hash that can stand in a file name. Raises ArgumentError."""
    if not isinstance(value, str) or not RUN_HASH.fullmatch(value):
        raise ArgumentError(f"run hash {brief(value)} must be 1 to 64 letters, digits or underscores")
    return value


#: A promise that is learned from the times between reports.
AUTO = "auto"
#: How many of the last lines of a program's output are kept, and how much of each.
OUTPUT_LINES, OUTPUT_LINE = 20, 300
#: What the `Run()` of a program sends to the `aimwatch exec` that holds its run: nobody dies of it.
HAND_OVER = signal.SIGURG
#: For how long a SIGTERM explains an end.
SIGNAL_S = 600.0
#: How long a record waits for another thread's before it goes ahead.
LOCK_WAIT_S = 2.0
#: How often a run looks whether its files are still there, and takes its lock again.
LOOK_S, LOCK_S = 1.0, 60.0
#: How long the lock on a run may be that of somebody who indexes it.
INDEXER_WAIT_S = BUSY_S + 1.0
MAX_STEP = 2**63
#: A longer record is refused, and a longer log message is cut so that it is none.
MAX_RECORD_BYTES, MAX_LOG_MESSAGE = 1 << 20, 1 << 16
#: How many bytes of messages wait for the watcher, and from how many on one is cut.
MAX_MESSAGES_BYTES, MAX_MESSAGE_LINE = 64 << 10, 16 << 10


def encode_line(record: Dict[str, Any]) -> bytes:
    """Return a record as a line of a log."""
    return to_json(record).encode("ascii") + b"\n"


def _log_method(level: int) -> Callable[..., None]:
    """Return the method of `Run` that records a message at a level."""

    def log_message(self: Run, msg: str, **params: Any) -> None:
        """Record a message; `params` are stored with it."""
        self._log_message(level, msg, params)

    return log_message


class Run:
    """A training run: reports progress, and tells how it ended.

    Arguments:
        run_hash: the run to resume, or the first characters of its hash (4 at least); None for a new one.
        repo: the folder that holds `.aim`, or `.aim` itself, as text, a path or a `Repo`; None: see
            `find_repo`.
        read_only: look at a run without writing; the run must exist.
        create: start a run of just this hash (1 to 64 letters, digits, underscores) where there is none, as
            for a job that is requeued under its own name.
        experiment: the experiment that the run belongs to.
        stacks: whether a process that misses its promise leaves the stacks of its threads for the
            alert; $AIMWATCH_STACKS=0 turns it off for all.
        not_failures: exceptions, as classes or by name, with which a run ends well; in any case
            `StopIteration`, `GeneratorExit` and optuna's `TrialPruned`.
        system_tracking_interval, log_system_params, capture_terminal_logs, force_resume: accepted
            so that scripts written for Aim run unchanged; without effect here.

    Raises ArgumentError for an impossible hash, RepoError where there is no such run or the repository
    cannot be used, RunBusyError where another process, or another object in this one, writes the run.
    """

    #: The process that may write the run; 0 for a run that is read, or closed.
    _pid = 0
    #: Why nothing is written, where it is for another process to do that, or for nobody any more.
    _inert = ""
    #: The end by a SIGTERM that a handler of the user's takes care of, and when that came (monotonic).
    _signal: Optional[End] = None
    _signal_mono = 0.0
    #: Exceptions with which a run ends well: a trial that is given up, a generator whose user has enough.
    _not_failures = frozenset(("StopIteration", "GeneratorExit", "TrialPruned"))
    #: In `progress`: how much of all is done, how much of it is one item, and since when (monotonic).
    _loop: Optional[Tuple[float, float, float]] = None
    #: When it is recorded again how much is done (monotonic).
    _part_at_mono = 0.0
    #: The promise that the check-in on disk covers, and until when (monotonic).
    _window: Tuple[Any, float] = (math.nan, 0.0)
    #: What the last report asked for, and what the phase promises.
    _asked: Any = 0
    _phase_s = 0.0

    def __init__(
        self,
        run_hash: Optional[str] = None,
        *,
        repo: Union[None, str, os.PathLike[str]] = None,
        read_only: bool = False,
        create: bool = False,
        experiment: Optional[str] = None,
        system_tracking_interval: Optional[Union[int, float]] = None,
        log_system_params: Optional[bool] = False,
        capture_terminal_logs: Optional[bool] = False,
        force_resume: Optional[bool] = False,
        stacks: bool = True,
        not_failures: Iterable[Union[str, type]] = (),
    ) -> None:
        run_hash_given = run_hash is not None
        run_hash = os.urandom(12).hex() if run_hash is None else checked_run_hash(run_hash)
        _checked_text("experiment", experiment or "")
        if isinstance(not_failures, (str, type)):
            raise ArgumentTypeError("not_failures must be several: not_failures=(TrialPruned,)")
        self._not_failures |= {getattr(item, "__name__", str(item)) for item in not_failures}
        must_exist = read_only or (run_hash_given and not create)
        paths = find_repo(None if repo is None else os.fsdecode(repo), create=not must_exist)
        if must_exist and not os.path.lexists(paths.run_log(run_hash)):
            way_out = f"'{command_line(paths.root)} runs' lists them; create=True starts a new one"
            hashes = list_runs(paths) if len(run_hash) >= 4 else []
            run_hash = find_by_prefix(run_hash, hashes, "run", f" in {paths.root}: {way_out}")
        self._stacks_on = stacks and os.environ.get("AIMWATCH_STACKS") != "0"
        self.hash, self.read_only, self._paths = run_hash, read_only, paths
        if read_only:
            return
        if must_exist:
            paths.create()
        workers = sys.modules.get("multiprocessing.process")
        if workers is not None and getattr(workers.current_process(), "_inheriting", False):
            self._inert = "the run was made while a worker imports the main module"
            return
        if run_hash_given or not self._join():
            self._open(run_hash_given, INDEXER_WAIT_S)
        if experiment is not None:
            self.experiment = experiment

    @classmethod
    def _to_read(cls, paths: RepoPaths, run_hash: str, read_only: bool = True, inert: str = "") -> Run:
        """Return a run that is only read, and its log when something is first asked of it."""
        run = cls.__new__(cls)
        run.hash, run.read_only, run._paths, run._inert = run_hash, read_only, paths, inert
        return run

    def __reduce__(self) -> Any:
        why = "the run was unpickled, and belongs to the process that pickled it"
        return Run._to_read, (self._paths, self.hash, self.read_only, why)

    def __copy__(self, _: Any = None) -> Run:
        return self

    __deepcopy__ = __copy__

    def _join(self) -> bool:
        """Go on with the run that `aimwatch exec` began for this program; False where there is none, or
        another of the program's processes has it. A second run of this process is another."""
        own, run_hash = self.hash, os.environ.get("AIMWATCH_RUN", "")
        repo = os.path.realpath(os.environ.get("AIMWATCH_REPO", ""))
        is_ours = RUN_HASH.fullmatch(run_hash) and repo == os.path.realpath(self._paths.root)
        if not is_ours or describe_rank().get("rank"):
            return False
        with contextlib.suppress(OSError, TypeError, OverflowError, RunBusyError):
            header = read_log(self._paths.run_log(run_hash), run_hash).header
            asks = header.get("exec") == header.get("pid") and header.get("host") == this_host()
            if asks:
                os.kill(header["pid"], HAND_OVER)
            self.hash = run_hash
            self._open(True, INDEXER_WAIT_S if asks else 0.0)
            self._track_reports = True
            del os.environ["AIMWATCH_RUN"]
            return True
        self.hash = own
        return False

    # ---------------------------------------------------------------- opening

    def __getattr__(self, name: str) -> Any:
        if name in ("log_artifact", "log_artifacts", "set_artifacts_uri"):
            return lambda *args, **options: warn_not_recorded(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<Run {self.hash} in {self._paths.root}>"

    @functools.cached_property
    def _state(self) -> RunState:
        """What the log says of a run that is only read; the writer puts its own in this place."""
        state, problem = load_run(self._paths, self.hash)
        if state is None and not self._inert:  # a worker may not see the repository
            raise RepoError(f"cannot read {problem or self._paths.run_log(self.hash) + ': it is empty'}")
        return state or RunState(self.hash)

    def _open(self, may_exist: bool, wait_s: float) -> None:
        self._state = RunState(self.hash)
        # Reentrant: the SIGTERM handler runs on top of whatever the main thread was doing.
        self._lock = threading.RLock()
        #: Until when what is on disk promises a report (monotonic).
        self._deadline = 0.0
        self._asked = 0
        #: What "auto" learned, and when (monotonic), NaN after anything else.
        self._rhythm, self._learned_mono = Rhythm(), math.nan
        #: In a program that `aimwatch exec` runs, `track` is a report until there is another.
        self._track_reports = False
        #: How the run ended, when that is recorded and reported.
        self._ended: Optional[End] = None
        #: The thread that reported last.
        self._thread = _get_ident()
        #: The time of the last record when a notebook's cell ended.
        self._idle_since = -1.0
        #: The metric series by name and context, and by what `track` was given where that tells which.
        self._by_key: Dict[Any, SeriesState] = {}
        #: Log lines since the last checkpoint.
        self._lines = 0
        self._looked_s, self._lock_at_mono = 0.0, _monotonic() + LOCK_S
        #: Log messages that could not be put into `news` yet.
        self._messages = b""
        #: An exception that was being handled when the run began is none of the run's.
        self._outer_error = sys.exc_info()[1]
        self._marker = FileLock(self._paths.marker(self.hash))
        try:
            with contextlib.ExitStack() as undo:
                self._take_marker(wait_s)
                undo.callback(self._marker.release)
                self._log = AppendFile(self._paths.run_log(self.hash), self._summary)
                undo.callback(self._log.close)
                names = self._adopt() if may_exist else []
                self._file = CheckInFile(self._paths.check_ins, self.hash, self._state.next_idx, names)
                for series in self._state.series.values():
                    self._by_key[series.name, context_key(series.context)] = series
                now = round(time.time(), 3)
                if self._state.created_at:
                    gone = dict.fromkeys(("signal", "progress", "rank", "world", "group"))
                    self._record({"resume": now, **gone, **describe_session()})
                    # An alert reads parts of the log, and must not take the first host for this one.
                    self._checkpoint()
                else:
                    about = {"format": LOG_FORMAT, "hash": self.hash, "created_at": now}
                    self._record({**about, **describe_session()})
                self._file.write(self._file.next_idx(), STARTING, 0)
                undo.pop_all()
        except OSError as error:
            raise RepoError(
                f"cannot write {error.filename or self._paths.root}: {error.strerror}: "
                "make it writable, or choose another folder with Run(repo=...) or $AIMWATCH_REPO"
            ) from None
        self._pid = os.getpid()
        _process.add(self)

    def _take_marker(self, wait_s: float) -> None:
        """Lock `pending/<hash>`, which says that this process writes the run."""
        locked = self._marker.acquire(wait_s)
        if locked is None:
            message = "%s has no record locks: a second writer of run %s would not be noticed"
            log.warning(message, self._paths.pending, self.hash)
        elif not locked:
            header = (load_run(self._paths, self.hash)[0] or self._state).header
            host = printable(str(header.get("host", "?")), 100)
            raise RunBusyError(
                f"run {self.hash} is being written by process {header.get('pid', '?')} on {host}"
                f"{', this one' * (header.get('pid') == os.getpid())}: close it there, or start another"
            )

    def _adopt(self) -> List[str]:
        """Go on where an earlier process left this run, and return the check-ins that are ours."""
        self._state = read_log(self._log.path, self.hash)
        problem = log_problem(self._state) if self._state.created_at else ""
        if problem:
            raise RepoError(f"cannot go on with run {self.hash}: {problem}")
        _process.stacks.disarm(self._paths.stack(self.hash))  # where an earlier process hung matters no more
        names = own_check_ins(self._paths, self.hash)
        newest = parse_check_in(names[-1]) if names else None
        self._state.next_idx = max(self._state.next_idx, newest.idx + 1 if newest else 1)
        return names if self._log.size else []

    # ---------------------------------------------------------------- progress

    def report_progress(self, *, expect_next_in: Union[int, float, str] = 0, block: bool = False) -> None:
        """Say that the run is alive and promise to say so again within `expect_next_in` seconds.

        Made for the innermost loop: a call that the check-in on disk already covers does not
        touch the disk. Never raises for a failing disk.

        Arguments:
            expect_next_in: seconds, int or float; 0 = no promise; "auto" = what the times between the
                reports so far let expect, see `Rhythm`.
            block: write a check-in in any case.

        Raises ArgumentTypeError for something that is no number, ArgumentError for NaN, negative
        values and more than ten years.
        """
        covered, until_mono = self._window
        if expect_next_in == covered and _monotonic() < until_mono and not block:
            self._thread = _get_ident()
            return
        is_auto = isinstance(expect_next_in, str) and expect_next_in == AUTO
        asked = AUTO if is_auto else checked_expect_s(expect_next_in)
        if self._may_write("report_progress"):
            self._asked, self._track_reports = asked, False
            self._report(asked, block)

    def _report(self, asked: Any, block: bool = False) -> None:
        with self._locked():
            now = _monotonic()
            self._thread = _get_ident()
            _process.exit = None  # whoever called `sys.exit`, somebody caught it
            if asked is AUTO:
                if not math.isnan(self._learned_mono):
                    self._rhythm.add(now - self._learned_mono)
                expect_s, self._learned_mono = self._phase_s or self._rhythm.expect_s, now
            else:
                expect_s, self._learned_mono = asked, math.nan
            # By how much the deadline on disk exceeds the one promised now; NaN: both are "none".
            over_s = self._deadline - (now + expect_s if expect_s else math.inf)
            until_mono = self._deadline - expect_s
            if block or not 0 <= over_s <= promise_margin_s(expect_s) + 1:
                until_mono = self._write_check_in(expect_s)
            # Calls that ask for the same return at once until then, or for a second where they teach.
            self._window = asked, min(until_mono, _monotonic() + 1.0) if asked is AUTO else until_mono

    def _write_check_in(self, expect_s: float) -> float:
        """Promise on disk a report within so many seconds; return until when that covers the next ones."""
        if self._ended is not None:
            self._reopen()
        now = _monotonic()
        if self._signal is not None and now - self._signal_mono > SIGNAL_S:
            self._signal = None
            self._record({"resume": round(time.time(), 3), "signal": None})
        self._look()
        written_s = math.ceil(expect_s + promise_margin_s(expect_s)) if expect_s else 0
        try:
            self._file.write(self._file.next_idx(), CHECK_IN, written_s)
        except OSError as error:
            message = "cannot check in below %s: %s"
            _process.warn_once(f"disk {self.hash}", message, self._paths.check_ins, error.strerror)
            return now + RETRY_S
        if self._ended is not None:  # meanwhile, by another thread
            return 0.0
        self._deadline = now + written_s if written_s else math.inf
        if self._stacks_on:
            due_mono = self._deadline + STACKS_AFTER_S
            _process.stacks.arm(self._paths.stack(self.hash), due_mono, self._thread)
        # Without a promise it is written again all the same, so that people see the run alive.
        return now + (written_s - expect_s if written_s else 30.0)

    def progress(
        self,
        items: Iterable[Any],
        *,
        total: Optional[int] = None,
        expect_next_in: Union[int, float, str] = AUTO,
    ) -> Iterator[Any]:
        """Report progress for each item of a loop, and how much of it is done where its length is known.
        Loops may be nested::

            for batch in run.progress(loader):
                train(batch)

        Arguments:
            total: the number of items, for what has no `len`.
            expect_next_in: as of `report_progress`.
        """
        with contextlib.suppress(Exception):  # the code of the items' class may fail in any way
            total = total or len(items)  # type: ignore[arg-type]
        outer = self._loop
        begin, share, began_mono = outer or (0.0, 1.0, _monotonic())
        try:
            for done, item in enumerate(items):
                self.report_progress(expect_next_in=expect_next_in)
                part = begin + share * done / total if total else begin
                self._loop = part, share / total if total else 0.0, began_mono
                self._note_part(part, began_mono)
                yield item
        finally:
            self._loop = outer
            if outer is None:
                self._note_part(0.0, -math.inf)

    def _note_part(self, part: float, began_mono: float) -> None:
        """Record how much of the work is done, when that is some more; 0: nobody knows."""
        now = _monotonic()
        if now >= self._part_at_mono and self._is_mine() and self.active:
            self._part_at_mono = now + min(max((now - began_mono) / 100, LOOK_S), 60.0)
            known = 0 < part < 1
            if known or self._state.header.get("progress"):
                progress = [round(part, 4), round(now - began_mono, 1)] if known else None
                self._record({"resume": round(time.time(), 3), "progress": progress})

    @contextlib.contextmanager
    def phase(self, name: str, *, expect: Union[int, float]) -> Iterator[None]:
        """Promise that a part of the work, such as a validation, takes at most `expect` seconds.

        Within it, a report with "auto" promises as much again, and nothing is learned of it. After it holds
        what was promised before::

            with run.phase("eval", expect=1800):
                evaluate(model)
        """
        expect_s, outer_s, asked = checked_expect_s(expect), self._phase_s, self._asked
        self._log_message(logging.DEBUG, f"phase {_checked_text('name', name)}", {"expect": expect_s})
        self._phase_s = expect_s
        self.report_progress(expect_next_in=expect_s)
        try:
            yield
        finally:
            self._phase_s, self._learned_mono = outer_s, math.nan
            if self.active:
                self.report_progress(expect_next_in=outer_s or asked)

    def report_successful_finish(self, *, block: bool = True) -> None:
        """Say that the run reached its end. `block` is Aim's; the report is always written."""
        if self._may_write("report_successful_finish"):
            if self._ended is not None and self._ended.flag == FAILED:
                self._reopen()
            _in_full(self._end, End(FINISHED))

    # ---------------------------------------------------------------- metrics

    def track(
        self,
        value: Any,
        name: Optional[str] = None,
        step: Optional[int] = None,
        epoch: Optional[float] = None,
        *,
        context: Optional[Dict[str, Any]] = None,
    ) -> None:
        """Record a point of a metric series, or of several; on return it survives a SIGKILL.

        Arguments:
            value: a number (int, float, bool, or anything whose `.item()` is one), or a dict of
                metric names to numbers. Aim's other objects, such as `Image`, are not recorded.
            name: the metric's name; left out where `value` is a dict.
            step: an integer of at most 64 bit; left out: one more than the series' highest.
            epoch: a number, or None.
            context: what tells series of one name apart, such as {"subset": "train"}.

        Raises ArgumentTypeError or ArgumentError for what cannot be recorded.
        """
        if isinstance(value, dict):
            if name is not None:
                raise ArgumentError("name must be left out when track() is given a dict of values")
            # All are checked before the first is recorded.
            points = [(_checked_text("metric name", key), _number(item, key)) for key, item in value.items()]
        else:
            metric = name if type(name) is str else _checked_text("metric name", name)
            points = [(metric, value if type(value) is float else _number(value, name))]
        if step is not None and (type(step) is not int or not -MAX_STEP <= step < MAX_STEP):
            step = _checked_step(step)
        if epoch is not None:
            given, epoch = epoch, _float_of(epoch)
            if epoch is None:
                raise ArgumentTypeError(f"epoch must be a number, not {brief(given)}")
        # What _is_mine asks, without its calls: this is a training loop's innermost business.
        if self._pid != _getpid() and not self._may_write("track"):
            return
        now = time.time()
        held = self._lock.acquire(True, LOCK_WAIT_S)
        try:
            if not 0 <= now - self._looked_s < LOOK_S:
                self._look()
                if self._track_reports and self._ended is None:
                    self._report(AUTO)
            for metric, number in points:
                if number is None:
                    continue
                try:
                    series = self._by_key[metric, tuple(context.items()) if context else ()]
                except (AttributeError, KeyError, TypeError):
                    series = self._declare(metric, context)
                at_step = step
                if at_step is None:
                    at_step = series.last_step + 1 if series.count else 0
                line = f"[{series.id},{at_step},{number!r},{now:.3f}]\n"
                if epoch is not None:
                    line = f"{line[:-2]},{epoch!r}]\n"
                if "n" in line:
                    line = re.sub("-?inf|nan", r'"\g<0>"', line)  # for which JSON has no numbers
                # The log first: a signal's handler that writes the state must not count a point too many.
                self._log.append(line.encode())
                series.add(at_step, number, now, epoch)
                self._state.last_time = now
                self._lines += 1
                if self._lines >= CHECKPOINT_LINES:
                    self._checkpoint()
        finally:
            if held:
                self._lock.release()

    def _declare(self, name: str, context: Optional[Dict[str, Any]]) -> SeriesState:
        if context is not None and not isinstance(context, dict):
            raise ArgumentTypeError(f"context of metric {brief(name)} must be a dict, not {brief(context)}")
        encoded = self._encode(context or {}, f"context of metric {brief(name)}")
        key = (name, context_key(encoded))
        if key not in self._by_key:
            series_id = next(reversed(self._state.series), 0) + 1
            self._record({"series": series_id, "name": name, "context": encoded})
            self._by_key[key] = self._state.series[series_id]
        # A context with anything else in it has no short cut: it may not hash, or be another each time.
        if all(type(item) in (str, int, bool) for item in (context or {}).values()):
            self._by_key[name, tuple(context.items()) if context else ()] = self._by_key[key]
        return self._by_key[key]

    def metrics(self) -> List[Metric]:
        """Return the metric series of the run, in the order in which they began."""
        return [Metric(self, series) for series in self._state.series.values()]

    def iter_metrics_info(self) -> Iterator[Tuple[str, Context, Run]]:
        """Yield name, context and run of each metric series, as in Aim."""
        for metric in self.metrics():
            yield metric.name, metric.context, self

    def get_metric(self, name: str, context: Optional[Dict[str, Any]] = None) -> Optional[Metric]:
        """Return one metric series, or None where the run has none of that name and context."""
        key = name, encode_value(context or {}, [])
        found = (item for item in self._state.series.values() if (item.name, item.context) == key)
        return next((Metric(self, series) for series in found), None)

    # ---------------------------------------------------------------- params

    def set(self, key: Any, value: Any, strict: bool = True) -> None:
        """Set a param. `run[...] = {...}` replaces all of them, `run["a", "b"] = v` one inside `a`.

        What JSON has no kind for is stored as text, with one warning. `strict` is Aim's.
        """
        path = _param_path(key)
        encoded = self._encode(value, f"param {'.'.join(path)!r}")
        if not path and not isinstance(encoded, dict):
            raise ArgumentTypeError(f"run[...] takes a dict, not {type(value).__name__}")
        if self._may_write("setting a param") and not self._record({"set": path, "value": encoded}):
            raise ArgumentError(f"no list element at param {path!r}: set the whole list")

    __setitem__ = set

    def __getitem__(self, key: Any) -> Any:
        return decode_value(self._state.param(_param_path(key)))

    def get(self, key: Any, default: Any = None, strict: bool = True) -> Any:
        """Return a param, or `default` where there is none. `strict` is Aim's."""
        try:
            return self[key]
        except KeyError:
            return default

    def __delitem__(self, key: Any) -> None:
        path = _param_path(key)
        self._state.param(path)
        if self._may_write("deleting a param"):
            self._record({"del": path})

    def _encode(self, value: Any, what: str) -> Any:
        odd: List[str] = []
        encoded = encode_value(value, odd)
        if odd:
            message = "%s holds %s, which JSON has no kind for: stored as text (said once a run)"
            kinds = ", ".join(sorted(set(odd)))
            _process.warn_once(f"odd {self.hash}", message, printable(what, 100), printable(kinds, 100))
        return encoded

    # ---------------------------------------------------------------- properties

    @property
    def name(self) -> str:
        """The run's name; `Run: <hash>` until one is set."""
        return str(self._state.props.get("name") or default_name(self.hash))

    @name.setter
    def name(self, value: str) -> None:
        self._set_props(name=_checked_text("name", value))

    @property
    def description(self) -> Optional[str]:
        """What the run is about, in the user's words."""
        return self._state.props.get("description")

    @description.setter
    def description(self, value: Optional[str]) -> None:
        self._set_props(description=value if value is None else _checked_text("description", value))

    @property
    def experiment(self) -> str:
        """The experiment that the run belongs to; `default` until one is set."""
        return str(self._state.props.get("experiment") or DEFAULT_EXPERIMENT)

    @experiment.setter
    def experiment(self, value: str) -> None:
        self._set_props(experiment=_checked_text("experiment", value))

    @property
    def archived(self) -> bool:
        """Whether the run is left out of queries that do not speak of `archived`."""
        return bool(self._state.props.get("archived"))

    @archived.setter
    def archived(self, value: bool) -> None:
        self._set_props(archived=bool(value))

    @property
    def tags(self) -> List[str]:
        """The run's tags, in the order in which they were added, as a copy."""
        return list(self._state.props.get("tags") or ())

    def add_tag(self, value: str) -> None:
        """Add a tag; one that is there already changes nothing."""
        if _checked_text("tag", value) not in self.tags:
            self._set_props(tags=[*self.tags, value])

    def remove_tag(self, tag_name: str) -> bool:
        """Remove a tag, and return whether it was there."""
        was_there = tag_name in self.tags
        if was_there:
            self._set_props(tags=[tag for tag in self.tags if tag != tag_name])
        return was_there

    @property
    def creation_time(self) -> float:
        """When the run was created, in seconds since the epoch."""
        return self._state.created_at

    @property
    def created_at(self) -> datetime.datetime:
        """When the run was created, as a naive datetime in UTC, as in Aim."""
        return utc_datetime(self._state.created_at)

    @property
    def end_time(self) -> Optional[float]:
        """When the run ended, in seconds since the epoch; None while it has not."""
        end = self._state.end
        return None if end is None else float(end["time"])

    @property
    def finalized_at(self) -> Optional[datetime.datetime]:
        """When the run ended, as a naive datetime in UTC; None while it has not."""
        end_s = self.end_time
        return None if end_s is None else utc_datetime(end_s)

    @property
    def duration(self) -> float:
        """Seconds from the run's creation to its end, or to now while it is active."""
        end_s = self.end_time
        return max(0.0, (time.time() if end_s is None else end_s) - self.creation_time)

    @property
    def active(self) -> bool:
        """True until the run has ended."""
        return self._state.end is None

    @property
    def props(self) -> Run:
        """What has the properties, in Aim: here the run itself."""
        return self

    def dataframe(self, include_props: bool = True, include_params: bool = True) -> Any:
        """Return properties and params as a pandas DataFrame of one row, as in Aim: a column for each param,
        such as `hparams.lr`. Raises AimwatchError where pandas is not installed."""
        try:
            import pandas  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError as error:
            raise AimwatchError(f"dataframe() needs pandas ({error}): install it, or use run[...]") from None
        row: Dict[str, Any] = {"hash": self.hash}
        if include_props:
            names = ("name", "description", "archived", "creation_time", "end_time", "active", "experiment")
            row.update({name: getattr(self, name) for name in names}, tags=json.dumps(self.tags))
        for path, value in param_items(self[...], "") if include_params and self[...] else ():
            row.setdefault(path, json.dumps(value) if isinstance(value, (dict, list)) else value)
        return pandas.DataFrame([row])

    def _set_props(self, **props: Any) -> None:
        if self._may_write(f"setting {', '.join(props)}"):
            self._record({"props": props})

    # ---------------------------------------------------------------- log messages

    log_debug, log_info, log_warning, log_error = map(
        _log_method, (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
    )

    def _log_message(self, level: int, msg: Any, params: Dict[str, Any]) -> None:
        if not self._may_write("log"):
            return
        message = str(msg)[:MAX_LOG_MESSAGE]
        record: Dict[str, Any] = {"log": level, "message": message, "time": round(time.time(), 3)}
        if params:
            record["params"] = self._encode(params, "what comes with a log message")
        self._record(record)
        with self._locked():
            if len(self._messages) < MAX_MESSAGES_BYTES:
                line = encode_line(record)
                short = {**record, "message": message[:1024], "params": {}}
                self._messages += line if len(line) <= MAX_MESSAGE_LINE else encode_line(short)
            self._write_messages()

    def _write_messages(self) -> None:
        """Append what waits to the file of which the watcher tells; it takes that file away. What a full file
        does not take is in the run's log alone; what a full disk does not take waits."""
        with contextlib.suppress(OSError):
            path = os.path.join(self._paths.news, self.hash)
            fd = open_below(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                room = os.fstat(fd).st_size + len(self._messages) <= MAX_MESSAGES_BYTES
                self._messages = self._messages[os.write(fd, self._messages) :] if room else b""
            finally:
                os.close(fd)

    # ---------------------------------------------------------------- records

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the run's lock, but wait for it with a bound: a thread that hangs in a write to a dead share
        must not hang SIGTERM with it."""
        held = self._lock.acquire(timeout=LOCK_WAIT_S)
        try:
            yield
        finally:
            if held:
                self._lock.release()

    def _record(self, record: Dict[str, Any]) -> bool:
        """Take a record into the state and the log; False, and no record, where it makes no sense."""
        line = encode_line(record)
        if len(line) > MAX_RECORD_BYTES:
            what = f"param {'.'.join(record['set'])!r}" if "set" in record else next(iter(record))
            raise ArgumentError(
                f"{printable(what, 80)} takes {len(line)} bytes, of at most {MAX_RECORD_BYTES}: "
                "set its parts one by one, or store it in a file, and its path here"
            )
        with self._locked():
            self._look()
            # From the line, so that the state shares nothing with what the caller holds.
            applied = self._state.apply(from_json(line))
            if applied:
                self._log.append(line)
                # A long line counts as many, so that what is read from a checkpoint on stays small.
                self._lines += 1 + len(line) // 1000
                if self._lines >= CHECKPOINT_LINES:
                    self._checkpoint()
            return applied

    def _summary(self) -> List[bytes]:
        """Return the lines with which the log is begun anew: what describes the run, and its whole state. Too
        long a line is left out; its readers read the records themselves."""
        lines = encode_line(self._state.header), encode_line(self._state.to_checkpoint())
        return [line for line in lines if len(line) <= MAX_LINE_BYTES]

    def _checkpoint(self) -> None:
        self._lines = 0
        for line in self._summary()[1:]:
            self._log.append(line)

    def _look(self) -> None:
        """See once a second whether the run's files are still where they were, and make them again where not.
        Never where there is no `.aim`: a share that is not mounted leaves an empty folder, and what was
        written below it would be hidden when the share comes back."""
        now_s = time.time()
        if not self._pid or 0 <= now_s - self._looked_s < LOOK_S:  # the clock may be set back, by a day
            return
        self._looked_s = now_s
        self._thread = _get_ident()
        try:
            if not (self._log.look() and self._marker.is_there()) and os.path.isdir(self._paths.aim):
                self._paths.create()
                self._log.look()
                # The check-in went with it: let the next report be written.
                self._window, self._deadline = (math.nan, 0.0), 0.0
            was_there = self._marker.is_there()
            if not was_there or _monotonic() >= self._lock_at_mono:
                # The lock is lost where a server did not hear of this machine for a while, or this process
                # opened the file and closed it, as to copy the repository. On NFS, to take it is a request.
                self._lock_at_mono = _monotonic() + LOCK_S
                if self._marker.acquire() is not False and not was_there and self._ended is None:
                    # An indexer that found the marker free, and removed it, wrote that the run died.
                    self._record({"resume": round(time.time(), 3)})
        except (OSError, AimwatchError) as error:
            log.debug("run %s: %s", self.hash, error)
        if self._messages:
            self._write_messages()

    # ---------------------------------------------------------------- the end

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        _in_full(self._end_and_close, self._end_of(error))

    def close(self) -> None:
        """End the run: `failed` where an exception is being handled, `finished` otherwise, unless
        its end was already reported. Calling it again does nothing."""
        if self._is_mine():
            error = sys.exc_info()[1]
            _in_full(self._end_and_close, self._end_of(None if error is self._outer_error else error))

    finalize = close

    def __del__(self) -> None:
        try:
            if self._is_mine():
                self._end_and_close(self._unreported("was dropped"))
        except Exception:
            pass  # at interpreter shutdown, what this needs may be gone

    def _after_cell(self, error: Optional[BaseException]) -> None:
        if self._is_mine() and self.active:
            if error is not None and (self._asked or self._state.last_time > self._idle_since):
                self._end(self._end_of(error))
            elif self._asked:
                self.report_progress()
            self._idle_since = self._state.last_time

    def _end_of(self, error: Optional[BaseException]) -> Optional[End]:
        """Return how an exception ends the run; None where there is none, or it is no failure."""
        if error is None or self._not_failures & {kind.__name__ for kind in type(error).__mro__}:
            return None
        if isinstance(error, SystemExit):
            return exit_end(error.code, error) or self._signal
        return End(FAILED, describe_exception(error), frames_of(error))

    def _unreported(self, what: str) -> Optional[End]:
        """Return how the run ends where nobody says so, and a promise or a signal says that it should not."""
        end = End(FAILED, f"{what} without reporting a successful finish")
        return self._signal or (end if self._asked else None)

    def _end_and_close(self, *ends: Optional[End]) -> None:
        """End the run as the first of these says, or well, and close it."""
        if self._is_mine():
            for end in (*ends, End(FINISHED)):
                self._end(end)
            self._close_files()

    def _signal_end(self, signum: int, frame: Optional[types.FrameType]) -> End:
        if self._thread != _get_ident():
            frame = sys._current_frames().get(self._thread, frame)
        return End(FAILED, f"terminated by {signal.Signals(signum).name}", frames_of(frame=frame))

    def _note_signal(self, signum: int, frame: Optional[types.FrameType]) -> None:
        """Note a signal that a handler of the user's takes care of, who may save, end the process, or not."""
        if self._is_mine() and self.active and self._signal is None:
            self._signal, self._signal_mono = self._signal_end(signum, frame), _monotonic()
            noted = {"reason": self._signal.reason, "frames": self._signal.frames}
            self._record({"resume": round(time.time(), 3), "signal": noted})

    def _end(self, end: Optional[End]) -> None:
        """Record how the run ended, in its log and then as a check-in. The first end counts."""
        if end is None or not self._is_mine() or self._ended is not None:
            return
        if self._signal is not None and end.reason != self._signal.reason:
            if end.flag == FINISHED:
                end = End(FINISHED, f"after {self._signal.reason.split()[-1]}")
            elif end.reason.startswith("exited with"):
                end = self._signal
            else:
                end = end._replace(reason=f"{self._signal.reason} ({end.reason})")
        # The clock may have been set back, and no run ends before it began.
        time_s = max(round(time.time(), 3), self._state.created_at, self._state.last_time)
        record: Dict[str, Any] = {"end": end.flag, "time": time_s, "idx": self._file.next_idx()}
        record.update((field, said) for field, said in end._asdict().items() if said and field != "flag")
        _process.stacks.disarm(self._paths.stack(self.hash))
        self._deadline, self._window = 0.0, (math.nan, 0.0)
        # The log first: who sees the check-in must find the reason.
        self._record(record)
        try:
            self._file.write(record["idx"], record["end"], 0)
        except OSError as error:
            log.warning("cannot report %s below %s: %s", record["end"], self._file.folder, error.strerror)
        self._ended = end

    def _reopen(self) -> None:
        """Take a reported end back: the run goes on training."""
        self._record({"resume": round(time.time(), 3)})
        self._ended = None

    def _close_files(self) -> None:
        with self._locked():
            if self._is_mine():
                self._looked_s = 0.0
                self._look()
                self._checkpoint()
                size = self._log.close()
                self._marker.release()
                self._pid, self._inert = 0, f"run {self.hash} was closed"
                # On some network file systems, nothing would keep two machines from writing the index at the
                # same time. And a run that has not ended is one with which another process goes on.
                if size >= 0 and self._ended is not None and not is_network(self._paths.own):
                    try_to_index(self._paths, [self.hash], 0.3)

    # ---------------------------------------------------------------- who may write

    def _is_mine(self) -> bool:
        """True in the process that opened the run, until it is closed."""
        return self._pid == os.getpid()

    def _takes_over(self) -> bool:
        """Go on with the run of a process that is gone, in the daemon that it left behind; not in a worker of
        `multiprocessing`, which is about to end."""
        if self._pid in (0, os.getpid()) or process_lives(self._state.header):
            return False
        workers = sys.modules.get("multiprocessing.process")
        if workers is not None and workers.parent_process() is not None:
            return False
        with contextlib.suppress(AimwatchError):
            if lock_state(self._paths.marker(self.hash)) != "held":
                self._open(True, 0.0)
        return self._is_mine()

    def _may_write(self, what: str) -> bool:
        """True where `what` may write. Raises AimwatchError for a run that was opened to read;
        says once why nothing is written for one that is closed or belongs to another process."""
        if self._is_mine() or self._takes_over():
            return True
        if self.read_only:
            raise AimwatchError(f"{what}: run {self.hash} is only read: Run({self.hash!r}) can write it")
        why = self._inert or f"run {self.hash} belongs to process {self._pid}, and this is a child of it"
        _process.warn_once(why, "%s is ignored: %s", what, why)
        return False


def report_progress(*, expect_next_in: Union[int, float, str] = 0, block: bool = False) -> None:
    """Report progress, as `Run.report_progress` does, for the newest run of the process: for code that has no
    `Run` at hand. Raises AimwatchError where no run is open."""
    run = next((run for run in reversed(_process.runs) if run._pid), None)
    if run is None:
        raise AimwatchError("report_progress: no run is open in this process: make one first, as run = Run()")
    run.report_progress(expect_next_in=expect_next_in, block=block)


#: Aim's objects that are no numbers. What stands for them here can be made of anything, and is not recorded.
AIM_OBJECTS = ("Audio", "Distribution", "Figure", "Image", "Text")
Audio, Distribution, Figure, Image, Text = (
    type(name, (), {"__init__": lambda self, *args, **options: None}) for name in AIM_OBJECTS
)


def warn_not_recorded(what: str) -> None:
    """Warn once a process that something is accepted for Aim's sake, and ignored."""
    why = "aimwatch records numbers, params and messages of a run (said once)"
    _process.warn_once(what, "%s is ignored: %s", what, why)


class Context(Dict[str, Any]):
    """The context of a metric series: a dict that Aim's scripts can ask for one."""

    to_dict = dict.copy


def _column(index: int) -> Any:
    """Return a property of `Metric`: an item of each of its points."""
    return property(lambda metric: [point[index] for point in metric._points])


class Metric:
    """One metric series of a run. What summarizes it is there at once; its points are read from
    the run's log when first asked for, and are sorted by step.

    `values`, `steps`, `epochs` (None where none was given) and `times` (seconds since the epoch)
    are lists of one length.
    """

    def __init__(self, run: Run, series: SeriesState) -> None:
        self.run = run
        self.name = series.name
        self.context = Context(decode_value(series.context))
        self.count, self.last = series.count, series.last
        self.min, self.max = series.min, series.max
        self.first_step, self.last_step = series.first_step, series.last_step
        self._id = series.id

    def __repr__(self) -> str:
        return f"<Metric {self.name!r} {self.context!r} of run {self.run.hash}: {self.count} points>"

    @functools.cached_property
    def _points(self) -> List[Tuple[int, float, Optional[float], float]]:
        path = self.run._paths.run_log(self.run.hash)
        try:
            return read_points(path, self._id)
        except OSError as error:
            raise RepoError(f"cannot read {path}: {error.strerror}") from None

    steps, values, epochs, times = map(_column, range(4))


def _checked_text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{what} must be a string, not {type(value).__name__}")
    return value


def _number(value: Any, name: Any) -> Optional[float]:
    """Return a value that a series can hold: a float, or an int of at most 53 bits. None, and a warning, for
    an object of Aim's that is no number."""
    found = value
    if getattr(getattr(value, "mask", None), "shape", None) == () and value.mask:
        return math.nan  # NumPy's masked: its `.item()` is what is behind the mask
    with contextlib.suppress(Exception):  # not a scalar, or of more than one element; refused below
        found = value.item()
    number = _float_of(found)
    if number is not None:
        return int(number) if isinstance(found, int) and abs(number) < 2**53 else number
    some = value[0] if isinstance(value, (list, tuple)) and value else value
    for kind in type(some).__mro__:
        if kind.__name__ in AIM_OBJECTS and str(kind.__module__).split(".")[0] in ("aim", __name__):
            warn_not_recorded(f"track({kind.__name__})")
            return None
    raise ArgumentTypeError(
        f"metric {brief(name)} cannot record {type(value).__name__} ({brief(value)}): track() takes one "
        "number, or a dict of names to numbers"
    )


def _checked_step(step: Any) -> int:
    is_whole = hasattr(step, "__index__") or (isinstance(step, float) and step.is_integer())
    if not is_whole or not -MAX_STEP <= int(step) < MAX_STEP:
        raise ArgumentError(f"step must be an integer of at most 64 bit, not {brief(step)}")
    return int(step)


def _param_path(key: Any) -> List[str]:
    if key is Ellipsis:
        return []
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if not isinstance(part, (str, int)):
            raise ArgumentTypeError(f"a param's key must be a string, an int or a tuple, not {brief(part)}")
    return [_text(part) for part in parts]


_EPOCH = datetime.datetime(1970, 1, 1)


def utc_datetime(epoch_s: float) -> datetime.datetime:
    """Return seconds since the epoch as a naive datetime in UTC."""
    return _EPOCH + datetime.timedelta(seconds=epoch_s)


# ======================================================================================
# Loops of frameworks
#
# Transformers, Lightning and Keras own the loop, and call back. None of them is imported: what is asked of
# their objects is what all versions have. No failure here reaches the training.
# ======================================================================================

#: Hooks at which nothing runs yet; those at which a training begins and ends; and those after which nothing
#: may come, unless a training goes on.
_EARLY_HOOKS = {"setup", "set_model", "set_params", "on_init_end"}
_BEGIN_HOOKS, _END_HOOKS = {"on_train_begin", "on_train_start"}, {"on_train_end", "on_fit_end", "teardown"}
_LAST_HOOKS = {*_END_HOOKS, "on_validation_end", "on_test_end", "on_predict_end", "on_evaluate", "on_predict"}
_SUBSET = re.compile(r"(train|val|valid|validation|eval|test)[_/](.+)")


def callback(
    run: Optional[Run] = None, expect_next_in: Union[int, float, str] = AUTO, **run_arguments: Any
) -> Any:
    """Return a callback for the trainers of Transformers and Lightning and for Keras' `fit`, which reports
    progress, tracks metrics and records params::

        Trainer(..., callbacks=[aimwatch.callback(experiment="resnet")])

    Arguments:
        run: the run; None: one is made when the training begins, in every rank that is known as one.
        expect_next_in: as of `Run.report_progress`.
        run_arguments: what the `Run` is made with.
    """
    if expect_next_in != AUTO:
        checked_expect_s(expect_next_in)
    # Where Lightning is there, it is one of its own, which need not be in a list.
    trainers: Any = (sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning"))
    bases = dict.fromkeys(module.Callback for module in trainers if hasattr(module, "Callback"))
    return type("Callback", (LoopCallback, *bases), {})(run, expect_next_in, run_arguments)


class LoopCallback:
    """What `callback` returns: every hook of the three frameworks, by whatever name, reports progress."""

    def __init__(self, run: Optional[Run], expect: Union[int, float, str], arguments: Dict[str, Any]) -> None:
        self.run = run
        self._given = run, expect, arguments
        self._training = False
        #: What Lightning logged last; Keras' model and the arguments of its `fit`, by hook; and the epoch.
        self._logged: Dict[str, float] = {}
        self._keras: Dict[str, Any] = {}
        self._epoch = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") or name in ("setup", "teardown", "set_model", "set_params"):
            return functools.partial(self._hook, name)
        return super().__getattribute__(name)

    def __reduce__(self) -> Any:
        run, expect, arguments = self._given
        return functools.partial(callback, run, expect, **arguments), ()

    def _hook(self, name: str, *args: Any, **options: Any) -> None:
        try:
            self._take(name, (*args, None, None), options)
        except Exception as error:  # whatever it is, the training goes on
            _process.warn_once("callback", "callback: %s: %s", name, describe_exception(error))

    def _take(self, name: str, args: Tuple[Any, ...], options: Dict[str, Any]) -> None:
        if hasattr(args[0], "is_global_zero"):
            rank_0, look = args[0].is_global_zero, self._look_at_lightning
        elif hasattr(args[1], "is_world_process_zero"):
            rank_0, look = args[1].is_world_process_zero, self._look_at_transformers
        else:
            rank_0, look = True, self._look_at_keras
        if name in ("set_model", "set_params"):
            self._keras[name] = args[0]
        if name in _EARLY_HOOKS or (name == "on_exception" and self.run is None):
            return
        if not rank_0 and not describe_rank():
            return  # nobody could tell the run of another rank from that of the first
        run = self.run = self.run or Run(**self._given[2])
        if name == "on_exception":
            self._training = False
            run._end(run._end_of(args[2]))
            return
        if name in _BEGIN_HOOKS:
            self._training = True
        elif name in _END_HOOKS:
            self._training = False
        if name not in _LAST_HOOKS or self._training:
            run.report_progress(expect_next_in=self._given[1])
        elif run.active:
            run.report_progress()
        logs, step, epoch, params = look(name, args, options)
        if name in _BEGIN_HOOKS:
            run["hparams"] = {**params, **(run.get("hparams") or {})}
        for key, value in logs.items():
            match = _SUBSET.fullmatch(key)
            context = {"subset": match[1] if match else "train" if self._training else "eval"}
            with contextlib.suppress(ArgumentError, ArgumentTypeError):  # what is no number
                run.track(value, match[2] if match else key, step, epoch, context=context)

    def _look_at_transformers(self, name: str, args: Tuple[Any, ...], options: Dict[str, Any]) -> Any:
        params = args[0].to_dict() if name in _BEGIN_HOOKS else {}
        return options.get("logs") or {}, args[1].global_step, args[1].epoch, params

    def _look_at_lightning(self, name: str, args: Tuple[Any, ...], options: Dict[str, Any]) -> Any:
        trainer, logs = args[0], {}
        logs_now = name == "on_train_batch_end" and trainer.global_step % trainer.log_every_n_steps == 0
        logs_now = logs_now or name in ("on_train_epoch_end", "on_validation_end", "on_test_end")
        if logs_now and not trainer.sanity_checking:
            # All that was ever logged is there: what did not change is not new.
            values = {key: float(value) for key, value in trainer.callback_metrics.items()}
            logs = {key: value for key, value in values.items() if self._logged.get(key) != value}
            self._logged = values
        params = dict(args[1].hparams) if name in _BEGIN_HOOKS else {}
        return logs, trainer.global_step, trainer.current_epoch, params

    def _look_at_keras(self, name: str, args: Tuple[Any, ...], options: Dict[str, Any]) -> Any:
        params, logs = dict(self._keras.get("set_params") or {}), {}
        if name in _BEGIN_HOOKS:
            with contextlib.suppress(AttributeError, KeyError):
                params["optimizer"] = self._keras["set_model"].optimizer.get_config()
        elif name == "on_epoch_begin":
            self._epoch = args[0]
        elif name == "on_epoch_end":
            logs = args[1]
        elif name == "on_test_end" and not self._training:
            logs = args[0]
        return logs or {}, self._epoch, self._epoch, params


# ======================================================================================
# Index
#
# `run_row` says in one shape what is known of a run: the index stores it, queries see it, tables and
# JSON show it. The index is a cache of the run logs: who writes it makes it anew where it is missing,
# damaged or of another version, and who cannot read it asks the logs instead.
# ======================================================================================

#: Counted up with every change of the tables or of what stands in them.
INDEX_VERSION = 7
#: How often also those pending runs are looked at that record nothing.
PROBE_S = 30.0
#: How much longer than it promised a run must have shown nothing new, where no lock says what that means.
DOUBT_S = 600.0
DIED = "its process is gone: killed, out of memory, or its node was lost"

# A row is stored as three JSON texts, since most questions want only one of them. A fact is a scalar of a
# run by which queries find it. No column of values has a type: a type's affinity would make '5' equal to 5.
_SCHEMA = f"""
BEGIN;
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, hash NOT NULL UNIQUE, created_at NOT NULL, archived NOT NULL, rank,
    log_size NOT NULL, head NOT NULL, params NOT NULL, metrics NOT NULL);
CREATE TABLE facts (path, value, run INTEGER, PRIMARY KEY (path, value, run)) WITHOUT ROWID;
CREATE INDEX facts_of_run ON facts (run);
CREATE TABLE doubts (hash PRIMARY KEY, seen NOT NULL, since NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {INDEX_VERSION};
COMMIT
"""
_STORED = "hash, created_at, archived, rank, log_size, head, params, metrics"

_METRIC_KEYS = ("series", *list(SeriesState.KINDS)[1:])
_SERIES_FIELDS = _METRIC_KEYS[3:]
_HEADER_FIELDS = ("host", "pid", "user", "job", "cwd", "commit", "stdout", "python", "rank", "world", "group")


def run_row(state: RunState) -> Dict[str, Any]:
    """Return what is known of a run, less its points and messages. Times are in seconds since the epoch;
    `name` and `end_time` are None where there is none."""
    props, end = state.props, state.end or {}
    tags, frames = props.get("tags"), end.get("frames") or end.get("output")
    argv, metrics = state.header.get("argv"), []
    for series in state.series.values():
        # Floats also of a live run's ints, so that a run reads the same whoever indexed it.
        values = [kind(getattr(series, field)) for field, kind in SeriesState.KINDS.items()]
        metrics.append({**dict(zip(_METRIC_KEYS, values)), "context": decode_value(series.context)})
    return {
        "hash": state.hash,
        "name": props.get("name") or None,
        "experiment": props.get("experiment") or DEFAULT_EXPERIMENT,
        "description": props.get("description"),
        "tags": list(tags) if isinstance(tags, list) else [],
        "archived": bool(props.get("archived")),
        "state": end.get("end", "running"),
        "reason": end.get("reason"),
        "frames": list(map(str, frames)) if isinstance(frames, list) else [],
        "created_at": state.created_at,
        "end_time": float(end["time"]) if end else None,
        "last_time": state.last_time,
        **{field: state.header.get(field) for field in _HEADER_FIELDS},
        "argv": list(map(str, argv)) if isinstance(argv, list) else None,
        "params": decode_value(state.params),
        "metrics": metrics,
        "log_size": state.log_size,
    }


def duration_s(row: Dict[str, Any]) -> float:
    """Return how long a run took, or has taken until now."""
    return float((time.time() if row["end_time"] is None else row["end_time"]) - row["created_at"])


#: The keys of a row, in the order in which it is shown.
ROW_FIELDS = tuple(run_row(RunState("")))
_HEAD_FIELDS = tuple(field for field in ROW_FIELDS if field not in ("params", "metrics", "log_size"))


class StoredRow(Dict[str, Any]):
    """A row as the index has it; each of its three texts is decoded when something in it is wanted."""

    __slots__ = ("_texts",)

    def __init__(self, *stored: Any) -> None:
        run_hash, created_at, archived, rank, log_size, *self._texts = stored
        super().__init__(hash=run_hash, created_at=created_at, rank=rank, log_size=log_size)
        self["archived"] = archived == 1

    def __missing__(self, key: str) -> Any:
        part = {"params": 1, "metrics": 2}.get(key, 0)
        try:
            value = json.loads(self._texts[part])
            self.update({key: value} if part else zip(_HEAD_FIELDS, value))
        except MALFORMED:
            raise IndexUnusable(f"the index holds no row for run {self['hash']}") from None
        return dict.__getitem__(self, key)


def stored_parts(row: Dict[str, Any]) -> Tuple[Any, ...]:
    """Return a row as the columns of `runs` hold it, and as `StoredRow` takes it."""
    head = [row[field] for field in _HEAD_FIELDS]
    # Archived runs, and ranks but the first, have columns for it: most queries leave them out.
    columns = row["hash"], row["created_at"], row["archived"], fact_value(row["rank"]), row["log_size"]
    return (*columns, *map(json.dumps, (head, row["params"], row["metrics"])))


def facts_of(row: Dict[str, Any]) -> Iterator[Tuple[str, Any]]:
    """Yield the facts of a run as (path, value): a field, a tag, a metric's last value, or a param. Queries
    are narrowed by them and then evaluated over the rows, so one too many costs time, as where the paths of
    two params are alike, and one too few would hide a run."""
    found = [(field, row[field]) for field in ("hash", "created_at", "experiment")]
    found += [("name", row["name"] or default_name(row["hash"])), ("active", row["end_time"] is None)]
    found += [("tag", tag) for tag in row["tags"]]
    found += [(f"metric {metric['name']}", metric["last"]) for metric in row["metrics"]]
    found += param_items(row["params"], "params")
    for path, value in found:
        # Whatever it is, so that people can ask which params and metrics there are.
        fact = fact_value(value)
        yield _storable(path), "" if fact is None else fact


def _storable(text: str) -> str:
    # A lone surrogate, legal in JSON, cannot be stored as UTF-8.
    return text.encode("utf-8", "backslashreplace").decode()


def fact_value(value: Any) -> Optional[Union[int, float, str]]:
    """Return what stands for a scalar in a fact: the start of a text, or a number that SQLite can store, else
    None. Equal scalars have equal facts, and the facts of numbers are in the order of the numbers."""
    if isinstance(value, str):
        return _storable(value[:100])
    if isinstance(value, (int, float)) and value == value:
        return min(max(value, -(2**62)), 2**62)
    return None


class IndexUnusable(AimwatchError):
    """The index is damaged or of another version: it is to be made anew."""


class IndexBusy(AimwatchError):
    """Another process writes the index; what was to be written keeps its marker for later."""


@contextlib.contextmanager
def connect(path: str, mode: str, busy_s: float) -> Iterator[sqlite3.Connection]:
    """Yield an SQLite file to read ("ro"), to write ("rw") or to make ("rwc"). Raises, in the place of
    SQLite's errors, IndexBusy, OSError for what a new index would not mend either, or IndexUnusable."""
    import sqlite3

    folder = os.path.dirname(path)
    if folder and os.stat(folder).st_mode & 0o022:
        # SQLite acts on what stands in files beside the index, and removes files that they name.
        why = f"others than its owner may write to {folder}: 'chmod go-w' it"
        raise PermissionError(errno.EACCES, why, path)
    # Not with `urllib.parse`: at exit, its import would have Python forget that Ctrl-C ended the program.
    escaped = re.sub(rb"[^\w/.-]", lambda match: b"%%%02x" % ord(match.group()), os.fsencode(path))
    uri = f"file:{escaped.decode()}?mode={mode}"
    try:
        with contextlib.closing(sqlite3.connect(uri, timeout=busy_s, isolation_level=None, uri=True)) as db:
            yield db
    except sqlite3.Error as error:
        if re.search("locked|busy", str(error)):
            raise IndexBusy(f"{path} is in use: try again later") from None
        if re.search("full|readonly|disk I/O|unable to open", str(error)):
            raise OSError(errno.EIO, str(error), path) from None
        raise IndexUnusable(f"{path}: {error}") from None


def index_run(db: sqlite3.Connection, run_hash: str, row: Optional[Dict[str, Any]]) -> None:
    """Write or replace one run, or take it out where there is no row, inside the caller's transaction."""
    # Made before anything is changed, since this may fail.
    parts, facts = (stored_parts(row), list(facts_of(row))) if row is not None else ((), [])
    db.execute("DELETE FROM facts WHERE run = (SELECT id FROM runs WHERE hash = ?)", (run_hash,))
    db.execute("DELETE FROM runs WHERE hash = ?", (run_hash,))
    if parts:
        marks = ", ".join("?" * len(parts))
        run_id = db.execute(f"INSERT INTO runs ({_STORED}) VALUES ({marks})", parts).lastrowid
        db.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?, ?)", [(*fact, run_id) for fact in facts])


def mark_pending(paths: RepoPaths, run_hash: str) -> None:
    """Give a run the marker that says that the index lacks some of it. Raises OSError."""
    # Never opened where it is there: this process may hold it locked, and would lose the lock.
    with contextlib.suppress(FileExistsError):
        os.close(open_below(paths.marker(run_hash), os.O_WRONLY | os.O_CREAT | os.O_EXCL))


@contextlib.contextmanager
def write_index(paths: RepoPaths, wait_s: float = 10.0, anew: bool = False) -> Iterator[sqlite3.Connection]:
    """Yield the index, to be written by nobody else until the block ends; readers need only SQLite's own
    locks. Raises IndexBusy after `wait_s`, OSError where it cannot be written, and IndexUnusable where it is
    found damaged; then an empty one has taken its place."""
    refuse_root(paths)
    with FileLock(paths.index_lock) as lock:
        if lock.acquire(wait_s) is False:
            raise IndexBusy(f"{paths.index} is being written by another process: try again later")
        if anew or not os.path.exists(paths.index):
            _make_anew(paths)
        try:
            with open_index(paths, "rw", min(wait_s, BUSY_S)) as db:
                yield db
        except IndexUnusable:
            _make_anew(paths)
            raise


@contextlib.contextmanager
def open_index(paths: RepoPaths, mode: str, busy_s: float) -> Iterator[sqlite3.Connection]:
    """Yield the index as it is. Raises IndexBusy, IndexUnusable or OSError, be it at the end."""
    identity = identity_of(paths.index)
    if not os.path.isfile(paths.index):  # a FIFO would hang SQLite
        raise IndexUnusable(f"{paths.index} is not a regular file")
    with connect(paths.index, mode, busy_s) as db:
        if db.execute("PRAGMA user_version").fetchone() != (INDEX_VERSION,):
            raise IndexUnusable(f"{paths.index} is of another version")
        yield db
    if not is_still(identity, paths.index):
        # Into the file that took its place, a run may have come that is pending no more.
        raise OSError(errno.ESTALE, "replaced meanwhile", paths.index)


def refuse_root(paths: RepoPaths) -> None:
    """Raise RepoError where root would leave files that the repository's owner could then not use."""
    uid = os.stat(paths.aim).st_uid
    if os.geteuid() == 0 != uid:
        owner = f"{paths.aim} belongs to {login_name(uid)}"
        raise RepoError(f"{owner}, who alone watches, indexes, and says who is notified")


def _make_anew(paths: RepoPaths) -> None:
    """Put an empty index in the place of what is there, with every run marked as pending. For the holder of
    the lock. Whatever cuts this short, no run is without its marker."""
    os.makedirs(paths.pending, exist_ok=True)
    for run_hash in list_runs(paths):
        mark_pending(paths, run_hash)
    unlink_below(paths.index)  # SQLite removes a journal beside an empty file
    with connect(paths.index, "rwc", BUSY_S) as db:
        db.executescript(_SCHEMA)


def list_runs(paths: RepoPaths) -> List[str]:
    """Return the hashes of all runs that have a log."""
    return [name[: -len(".jsonl")] for name in names_in(paths.runs, rf"{RUN_HASH.pattern}\.jsonl")]


def list_pending(paths: RepoPaths) -> List[str]:
    """Return the hashes that have a marker."""
    return names_in(paths.pending, RUN_HASH.pattern)


def log_sizes(paths: RepoPaths, hashes: Iterable[str]) -> Dict[str, int]:
    """Return the sizes of runs' logs, as the file system has them at hand, -1 for what is not there."""
    found = dict.fromkeys(hashes, -1)
    for run_hash in found:
        with contextlib.suppress(OSError):
            found[run_hash] = os.lstat(paths.run_log(run_hash)).st_size
    return found


def load_run(paths: RepoPaths, run_hash: str) -> Tuple[Optional[RunState], str]:
    """Return (state, what is wrong with the log or "")."""
    path = paths.run_log(run_hash)
    try:
        state = read_log(path, run_hash)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"{path}: {error.strerror}"
    problem = log_problem(state)
    if problem:
        return None, f"{path}: {problem}" if state.log_size else ""
    return state, ""


class Reindexer:
    """Brings the index up to date with the runs that have a marker in `pending`."""

    def __init__(self, paths: RepoPaths) -> None:
        self.paths = paths
        #: What could not be read.
        self.problems: List[str] = []
        #: The runs of which a watcher says that they are dead.
        self._known_dead: Set[str] = set()
        #: Sizes of the logs of pending runs, when `changed` looked last.
        self._sizes: Dict[str, int] = {}
        self._probe_mono = 0.0

    def run_all(self, rebuild: bool = False, wait_s: float = 10.0) -> List[str]:
        """Index every pending run, or with `rebuild` every run; return what could not be read. Raises as
        `run` does."""
        try:
            with write_index(self.paths, wait_s, anew=rebuild) as db:
                self._mark_lost(db)
            self.run(list_pending(self.paths), wait_s)
        except IndexUnusable:  # an empty one has taken its place
            self.problems.clear()
            self.run(list_pending(self.paths), wait_s)
        return self.problems

    def run(self, hashes: Sequence[str], wait_s: float = 10.0) -> None:
        """Index these runs in transactions of about 100 ms. Raises as `write_index` does; what was not
        committed keeps its marker."""
        left = deque(hashes)
        while left:
            with write_index(self.paths, wait_s) as db, contextlib.ExitStack() as locks:
                taken: Dict[str, bool] = {}
                deadline = _monotonic() + 0.1
                db.execute("BEGIN IMMEDIATE")
                while left and len(taken) < 200 and (not taken or _monotonic() < deadline):
                    run_hash = left.popleft()
                    taken[run_hash] = self._one(db, run_hash, locks)
                db.execute("COMMIT")
                # Only now, while the locks are held: a marker may go when the disk has the run.
                for run_hash in filter(taken.get, taken):
                    unlink_below(self.paths.marker(run_hash))

    def _one(self, db: sqlite3.Connection, run_hash: str, locks: contextlib.ExitStack) -> bool:
        """Index one run; True where its writer is gone and its marker can go after the commit."""
        marker = locks.enter_context(FileLock(self.paths.marker(run_hash), brief=True))
        try:
            gone = marker.acquire(create=False) is True
        except FileNotFoundError:
            return False  # another indexer was quicker
        except OSError as error:
            self.problems.append(f"{marker.path}: {error.strerror}")
            return False
        state, problem = load_run(self.paths, run_hash)
        if state is None:
            index_run(db, run_hash, None)
        else:
            known = db.execute("SELECT log_size FROM runs WHERE hash = ?", (run_hash,)).fetchone()
            try:
                if gone and state.end is None:
                    gone = self._is_dead(db, state) and finalize_dead(self.paths, state)
                if known != (state.log_size,):
                    index_run(db, run_hash, run_row(state))
            except MALFORMED as error:  # one log, whatever is in it, must not keep all the others out
                problem = f"{self.paths.run_log(run_hash)}: {type(error).__name__}: {error}"
        if problem:
            self.problems.append(problem)
        return gone and not problem

    def _is_dead(self, db: sqlite3.Connection, state: RunState) -> bool:
        """True where the free marker of a run that has not ended means that its process is gone, or where two
        passes that are far enough apart have seen nothing new of the run."""
        if free_means_dead(state.header, state.hash in self._known_dead):
            return True
        check_in, now = last_check_in(self.paths, state.hash), _monotonic()
        seen = f"{boot_id()} {check_in} {state.log_size}"
        found = db.execute("SELECT seen, since FROM doubts WHERE hash = ?", (state.hash,)).fetchone()
        if found is None or found[0] != seen:
            db.execute("INSERT OR REPLACE INTO doubts VALUES (?, ?, ?)", (state.hash, seen, now))
            return False
        return bool(now - found[1] >= (check_in.expect_next_in_s if check_in else 0) + DOUBT_S)

    def _mark_lost(self, db: sqlite3.Connection) -> None:
        """Give a marker to every run of whose log the index has another size, or none: an older index was put
        back, a log was brought here, or a cache of the file system showed an old size to the indexer."""
        # In this order, a run that comes or ends meanwhile is marked once too often at most.
        logs, pending = log_sizes(self.paths, list_runs(self.paths)), set(list_pending(self.paths))
        known = dict(db.execute("SELECT hash, log_size FROM runs"))
        for run_hash in (logs.keys() | known.keys()) - pending:
            if known.get(run_hash) != logs.get(run_hash):
                mark_pending(self.paths, run_hash)

    def note_dead(self, run_hash: str) -> None:
        """Take a watcher's word that a run is dead if its marker is free; `changed` returns it next."""
        self._known_dead.add(run_hash)
        self._sizes.pop(run_hash, None)

    def changed(self) -> List[str]:
        """Return the pending runs whose log has another size than when this was asked last and, now and then,
        all of them: a process that is killed leaves its log as it was."""
        if _monotonic() >= self._probe_mono:
            self._probe_mono = _monotonic() + PROBE_S
            self._sizes.clear()
        known, self._sizes = self._sizes, log_sizes(self.paths, list_pending(self.paths))
        return [run_hash for run_hash, size in self._sizes.items() if known.get(run_hash) != size]


def try_to_index(paths: RepoPaths, hashes: Sequence[str], wait_s: float) -> None:
    """Index some runs if that can be done now; their markers ask others to otherwise."""
    try:
        Reindexer(paths).run(hashes, wait_s)
    except Exception as error:  # whatever it is, the runs are in their logs, and a script may end
        log.debug("%d runs are left to reindex: %s", len(hashes), error)


def free_means_dead(header: Dict[str, Any], was_held: bool) -> bool:
    """True where the free marker of a run says that its process is gone: on many mounts, locks are seen on
    the machine alone that took them. `was_held`: whether the marker was seen locked from here."""
    here = this_host(), boot_id()
    is_here = (header.get("host"), header.get("boot", here[1])) == here
    # A process that lives has lost its lock, as one does that copies the repository.
    return (is_here or was_held) and not (is_here and process_lives(header))


def process_lives(header: Dict[str, Any]) -> bool:
    """True where the process that a log names is still there, as far as its pid namespace is this one's."""
    identity = header.get("pid_space"), header.get("pid_start")
    return None not in identity and identity == process_identity(header.get("pid"))


def last_check_in(paths: RepoPaths, run_hash: str) -> Optional[CheckIn]:
    """Return the check-in of a run that has the highest number, None for none. Raises OSError."""
    freshen(paths.check_ins)
    names = own_check_ins(paths, run_hash)
    return parse_check_in(names[-1]) if names else None


def end_of_dead(state: RunState) -> Dict[str, Any]:
    """Return how a run ended that did not say so: by the signal that a handler of the user's took care of."""
    signal = state.header.get("signal")
    return {"end": FAILED, "reason": DIED, **(signal if isinstance(signal, dict) else {})}


def finalize_dead(paths: RepoPaths, state: RunState) -> bool:
    """Record the end of a run whose process is gone, at its last sign of life. False where the log could not
    be written: the index may know of the end, but the marker must stay. The caller holds the run's marker,
    which makes it the log's only writer."""
    check_in = last_check_in(paths, state.hash)
    last, idx = max(state.last_time, state.created_at), state.next_idx - 1
    # What no log can hold is a mistake.
    if check_in is not None and float(check_in.utc) < MAX_TIME_S and check_in.idx < MAX_IDX:
        last, idx = max(last, float(check_in.utc)), max(idx, check_in.idx)
    end = {**end_of_dead(state), "time": last, "idx": idx}
    if check_in is not None and check_in.flag == FINISHED:  # which a full disk kept out of the log
        end["end"], end["reason"] = FINISHED, ""
    state.log_size = -1
    if not state.apply(end):
        return False  # what no reader would take must not be written again and again
    try:
        writer = AppendFile(paths.run_log(state.hash), list)
    except OSError:
        return False
    writer.append(encode_line(end))
    writer.append(encode_line(state.to_checkpoint()))
    # Before the marker goes: a power cut must not leave a run without an end that nobody looks at.
    writer.sync()
    state.log_size = writer.close()
    return state.log_size >= 0


# ======================================================================================
# Query language
#
# A query is one Python expression over `run` (and `metric`), parsed by `ast`, checked node by node and
# made into functions of a row; no text of it is ever executed. Python's meaning holds; what is missing
# is None, what is impossible ('a' > 3, None + 1, 1 / 0) is false as a comparison and None as a value.
# Times are datetimes in UTC, without a zone, as in Aim.
# ======================================================================================

#: In a longer query, terms could be nested so deeply that `ast.parse` overflows the C stack.
_MAX_CHARS = 10_000
#: How many levels the syntax tree may have: functions that call each other compile and evaluate it.
_MAX_DEPTH = 40
#: So many runs are too many to look at one by one, where another condition leaves fewer.
_MANY = 2000
#: With more narrowings, looking for the best takes longer than it saves; more values are not looked up.
_MOST_NARROWINGS, _MOST_VALUES = 8, 100
#: In the place of a value that is known only for a row.
_UNKNOWN = object()

#: How a comparison is written, and what decides it.
_COMPARISONS: Dict[type, Tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Eq: ("==", operator.eq), ast.NotEq: ("!=", operator.ne),
    ast.Is: ("==", operator.eq), ast.IsNot: ("!=", operator.ne),
    ast.Lt: ("<", operator.lt), ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt), ast.GtE: (">=", operator.ge),
    ast.In: ("in", lambda item, whole: item in whole),
    ast.NotIn: ("not in", lambda item, whole: item not in whole),
}  # fmt: skip
_MIRRORED = {"==": "==", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


def _of_numbers(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    # Nothing but a number can be added to 0. Of a text, `*` and `%` could make one that fills the memory.
    return lambda left, right: function(left + 0, right + 0)


def _affix(method: Callable[..., bool]) -> Callable[..., bool]:
    return lambda text, affix: method(text, tuple(affix) if isinstance(affix, list) else affix)


_OPERATORS: Dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: _of_numbers(operator.mul),
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: _of_numbers(operator.mod),
    # With floats: a whole number of any size could take hours to compute.
    ast.Pow: math.pow, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_METHODS: Dict[str, Callable[..., Any]] = {
    "startswith": _affix(str.startswith), "endswith": _affix(str.endswith),
    "lower": str.lower, "upper": str.upper,
}  # fmt: skip
_FUNCTIONS: Dict[str, Callable[..., Any]] = {
    "abs": abs, "bool": bool, "float": float, "int": int, "len": len, "max": max, "min": min, "round": round,
    "sum": sum,
}  # fmt: skip
_TIMES_MADE: Dict[str, Callable[..., Any]] = {
    "datetime": datetime.datetime, "timedelta": datetime.timedelta,
    "datetime.now": lambda: utc_datetime(time.time()), "datetime.utcnow": lambda: utc_datetime(time.time()),
}  # fmt: skip
#: Said of what Python, or the language, does not have.
_ADVICE = "write ==, and, or, not, in, startswith"
_TIME_PARTS = ("year", "month", "day", "hour", "minute", "second")


#: What a part of a query comes to for a row and, in a query over metrics, one of its metrics.
Evaluated = Callable[[Dict[str, Any], Any], Any]
#: A condition on `facts` and its parameters: a run without such a fact is not among the answers.
Narrowing = Tuple[str, List[Any]]


class _Value(NamedTuple):
    """What a part of the query stands for. `const` is its value where that is the same for every row. The
    index holds it in the facts at the path `fact`: the value itself ("value"), its seconds ("time"), or its
    elements ("member")."""

    of: Evaluated
    const: Any = _UNKNOWN
    fact: str = ""
    kind: str = "value"


def _constant(value: Any) -> _Value:
    return _Value(lambda row, metric: value, value)


def _source(text: str) -> str:
    # Parentheses let a query run over several lines; without them, CPython points at mistakes more closely.
    return f"({text}\n)" if "\n" in text else text.strip()


def _parse(text: str) -> ast.expr:
    if len(text) > _MAX_CHARS:
        raise QueryError(f"longer than {_MAX_CHARS:,} characters: ask in several queries", 1)
    try:
        tree = ast.parse(_source(text), mode="eval").body
    except SyntaxError as error:
        offset = (error.offset or len(_source(text))) - 1  # 0: at the end, something is missing
        reason = f"not a Python expression ({error.msg}): {_ADVICE}"
        raise _error_at(text, error.lineno or 1, offset, reason) from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise QueryError(f"cannot be read ({error or 'nested too deeply'})", 1) from None
    level: List[ast.AST] = [tree]
    for _ in range(_MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise QueryError(f"nested too deeply (more than {_MAX_DEPTH} levels): write it flatter", 1)
    return tree


def _error_at(text: str, line: int, offset: int, reason: str) -> QueryError:
    """Return an error at a place in what `_source` makes of a query."""
    if line == 1:
        offset += -1 if "\n" in text else len(text) - len(text.lstrip())
    return QueryError(reason, max(offset, 0) + 1, min(line, text.count("\n") + 1))


def _from_row(name: str, **more: Any) -> _Value:
    return _Value(lambda row, metric: row[name], **more)


_RUN_FIELDS: Dict[str, _Value] = {
    **{field: _from_row(field) for field in ("description", "archived", "end_time", "state", "reason")},
    **{field: _from_row(field) for field in ("host", "pid", "user", "job", "rank")},
    "hash": _from_row("hash", fact="hash"),
    "name": _Value(lambda row, metric: row["name"] or default_name(row["hash"]), fact="name"),
    "experiment": _from_row("experiment", fact="experiment"),
    "tags": _from_row("tags", fact="tag", kind="member"),
    "creation_time": _from_row("created_at", fact="created_at"),
    "created_at": _Value(lambda row, metric: utc_datetime(row["created_at"]), fact="created_at", kind="time"),
    "finalized_at": _Value(
        lambda row, metric: row["end_time"] and utc_datetime(row["end_time"]), kind="time"
    ),
    "active": _Value(lambda row, metric: row["end_time"] is None, fact="active"),
    "duration": _Value(lambda row, metric: duration_s(row)),
}


class Query:
    """A query over "run" or "metric" as functions of a row; "" is true for all. Raises QueryError."""

    def __init__(self, text: str, over: str = "run") -> None:
        self.text = text if text.strip() else "True"
        self.over = over
        #: What it speaks of: the fields of a run, and params as dotted paths.
        self.fields: Set[str] = set()
        self.params: List[str] = []
        #: How the index can leave out most runs for which it is false.
        self.narrowings: List[Narrowing] = []
        tree = _parse(self.text)
        #: The nodes that must all be true for the query to be true.
        self._conjuncts = {tree}
        if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And):
            self._conjuncts = set(tree.values)
        self.test = self.value(tree).of

    def matches(self, rows: Iterable[Dict[str, Any]]) -> Iterator[Tuple[Dict[str, Any], Any]]:
        """Yield the rows for which the query is true, with None, or with each metric for which it is.
        Archived runs and all ranks but the first are left out, unless the query speaks of them."""
        hidden_by = {"archived", "rank"} - self.fields
        for row in rows:
            if any(map(row.get, hidden_by)):
                continue
            for metric in row["metrics"] if self.over == "metric" else (None,):
                if self.test(row, metric):
                    yield row, metric

    def candidates(self, db: sqlite3.Connection) -> Iterator[StoredRow]:
        """Yield the rows of the runs for which the query may be true."""

        # Whether 10 runs or all have `lr == 0.1`, SQLite does not know: it is counted, up to a limit.
        def leaves_few(narrowing: Narrowing) -> bool:
            where, args = narrowing
            some = f"SELECT 1 FROM facts WHERE {where} LIMIT {_MANY}"
            return bool(db.execute(f"SELECT count(*) < {_MANY} FROM ({some})", args).fetchone()[0])

        possible = self.narrowings[:_MOST_NARROWINGS]
        chosen = list(filter(leaves_few, possible)) or possible
        ids = " INTERSECT ".join(f"SELECT run FROM facts WHERE {where}" for where, _ in chosen)
        args = [arg for _, args in chosen for arg in args]
        sql = f"SELECT {_STORED} FROM runs" + (f" WHERE id IN ({ids})" if ids else "")
        for parts in db.execute(sql, args):
            yield StoredRow(*parts)

    # ---------------------------------------------------------------- nodes of the syntax tree

    def comparison(self, node: ast.Compare) -> _Value:
        values = [self.value(operand) for operand in (node.left, *node.comparators)]
        pairs = [self.pair(node, op, *values[nth : nth + 2]) for nth, op in enumerate(node.ops)]
        if len(pairs) == 1:
            return pairs[0]
        return _Value(lambda row, metric: all(pair.of(row, metric) for pair in pairs))

    def pair(self, node: ast.expr, op: ast.cmpop, left: _Value, right: _Value) -> _Value:
        if isinstance(op, (ast.Is, ast.IsNot)) and right.const is not None:
            self.refuse(node, "'is' compares with None only: write ==")
        for value, const in ((left, right.const), (right, left.const)):
            if value.kind == "time" and isinstance(const, (str, int, float)):
                instead = "run.creation_time and run.end_time are seconds"
                self.refuse(node, f"a time compares with datetime(...) only: {instead}")
        sign, compare = _COMPARISONS[type(op)]
        self.narrow(node, left, sign, right.const)
        if sign in _MIRRORED:
            self.narrow(node, right, _MIRRORED[sign], left.const)
        elif sign == "in" and right.kind == "member" and isinstance(left.const, str):
            self.narrow(node, right._replace(kind="value"), "==", left.const)
        return self.operation(compare, left, right, impossible=sign in ("!=", "not in"))

    def narrow(self, node: ast.expr, value: _Value, sign: str, const: Any) -> None:
        """Note what holds of the facts of every run for which a comparison with a constant is true."""
        if value.kind == "time" and isinstance(const, datetime.datetime):
            const = (const - _EPOCH).total_seconds()  # a log has milliseconds, so no digits are lost
        is_list = isinstance(const, (list, dict))
        facts = [fact_value(item) for item in (const if is_list else [const])]
        possible = node in self._conjuncts and value.fact and value.kind != "member"
        if not possible or None in facts or not 0 < len(facts) <= _MOST_VALUES:
            return
        if is_list and sign == "in":
            where = f"IN ({', '.join('?' * len(facts))})"
        elif sign == "==" and not is_list:
            where = "= ?"
        elif sign in _MIRRORED and isinstance(const, (int, float)):
            # With "=": the facts of large numbers are alike. SQLite sorts texts after numbers.
            where = f"{sign[0]}= ?" + (" AND value < ''" if sign[0] == ">" else "")
        else:
            return
        self.narrowings.append((f"path = ? AND value {where}", [_storable(value.fact), *facts]))

    def value(self, node: ast.expr) -> _Value:
        if isinstance(node, (ast.Attribute, ast.Subscript, ast.Name)):
            value = self.chain(node)
            if value.fact == "active":  # true or false by itself
                self.narrow(node, value, "==", True)
            return value
        if isinstance(node, ast.Constant):
            if not isinstance(node.value, (str, int, float, type(None))):
                self.refuse(node, f"{node.value!r:.40} is not in the query language: write text or a number")
            return _constant(node.value)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return _constant([self.const(item) for item in node.elts])
        if isinstance(node, ast.Dict):
            keys = [key and self.const(key) for key in node.keys]
            if not all(isinstance(key, str) for key in keys):
                self.refuse(node, "the keys of a dict are texts")
            return _constant(dict(zip(keys, map(self.const, node.values))))
        if isinstance(node, ast.BoolOp):
            return self.decision(node, [self.value(operand).of for operand in node.values])
        if isinstance(node, ast.Compare):
            return self.comparison(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            operand = self.value(node.operand).of
            return _Value(lambda row, metric: not operand(row, metric))
        if isinstance(node, (ast.BinOp, ast.UnaryOp)):
            operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
            if type(node.op) not in _OPERATORS:
                self.refuse_kind(node, node.op)
            return self.operation(_OPERATORS[type(node.op)], *map(self.value, operands))
        return self.refuse_kind(node, node)

    def decision(self, node: ast.BoolOp, operands: List[Evaluated]) -> _Value:
        """Return `and` or `or`: as in Python, the first operand that decides, else the last."""
        decisive = isinstance(node.op, ast.Or)

        def of(row: Dict[str, Any], metric: Any) -> Any:
            for operand in operands:
                value = operand(row, metric)
                if bool(value) is decisive:
                    break
            return value

        return _Value(of)

    def operation(
        self, function: Callable[..., Any], *values: _Value, impossible: Optional[bool] = None
    ) -> _Value:
        """Return what a function makes of some values, or another value where that is impossible."""
        operands = [value.of for value in values]

        def of(row: Dict[str, Any], metric: Any) -> Any:
            try:
                return function(*[operand(row, metric) for operand in operands])
            except MALFORMED:
                return impossible

        return _Value(of) if _UNKNOWN in [value.const for value in values] else _constant(of({}, None))

    def call(self, node: ast.Call) -> _Value:
        function: Any = node.func
        owner, attribute = getattr(getattr(function, "value", None), "id", ""), getattr(function, "attr", "")
        name = getattr(function, "id", f"{owner}.{attribute}")
        if name in _TIMES_MADE:
            consts = [self.const(argument) for argument in node.args]
            named = {str(keyword.arg): self.const(keyword.value) for keyword in node.keywords}
            try:
                return _constant(_TIMES_MADE[name](*consts, **named))
            except (TypeError, ValueError, OverflowError) as error:
                self.refuse(node, f"no {name} can be made of this ({error})")
        if node.keywords:
            self.refuse(node, "arguments have no names here: write the values alone")
        values = [self.value(argument) for argument in node.args]
        if name in _FUNCTIONS and len(values) == 1:
            return self.operation(_FUNCTIONS[name], values[0])
        if attribute in _METHODS:
            if len(values) != (1 if attribute.endswith("with") else 0):
                self.refuse(node, f"wrong number of arguments for {attribute}()")
            return self.operation(_METHODS[attribute], self.value(function.value), *values)
        known = ", ".join((*_METHODS, *_FUNCTIONS, "datetime, timedelta"))
        return self.refuse(function, f"this call is not in the query language: it can call {known}")

    def chain(self, node: ast.expr) -> _Value:
        """Resolve `run.a["b"].c`: a name, then attributes and subscripts that are all constants."""
        names: List[Any] = []
        root, is_field = node, False
        while isinstance(root, (ast.Attribute, ast.Subscript)):
            is_field = isinstance(root, ast.Attribute)
            names[:0] = [root.attr] if isinstance(root, ast.Attribute) else self.subscript(root)
            root = root.value
        name = root.id if isinstance(root, ast.Name) else ""
        if name not in ("run", "metric"):
            if name:
                self.refuse(root, f"unknown name '{name}': write run.{name} for a param, '{name}' for text")
            self.refuse(node, "only run and metric have attributes: write run.name or the like")
        if name == "metric" and self.over == "run":
            self.refuse(root, "there is no metric in a query over runs: write run.metrics['loss', {}].last")
        if not names:
            self.refuse(node, f"'{name}' alone has no value: write {name}.name or the like")
        if name == "metric":
            return self.metric_value(node, names)
        return self.field(node, names) if is_field else self.param(names)

    def subscript(self, node: ast.Subscript) -> List[Any]:
        index: Any = node.slice
        if type(index).__name__ in ("Slice", "ExtSlice"):
            self.refuse_kind(node.value, index)
        # Before CPython 3.9 an ast.Index stands around the subscript.
        found = self.const(index.value if type(index).__name__ == "Index" else index)
        keys = found if isinstance(found, list) else [found]
        if any(isinstance(key, bool) or not isinstance(key, (str, int, dict)) for key in keys):
            self.refuse(node.value, "in [...] stands text or a whole number")
        return keys

    def param(self, names: List[Any]) -> _Value:
        keys = list(itertools.takewhile(lambda name: isinstance(name, str), names))
        self.params.append(".".join(keys))
        fact = ".".join(["params", *keys]) if keys == names else ""
        return _Value(_at(lambda row, metric: row["params"], names), fact=fact)

    def field(self, node: ast.expr, names: List[Any]) -> _Value:
        first, *rest = names
        if first == "metrics":
            return self.summary(node, rest)
        if first not in _RUN_FIELDS:
            return self.param(names)
        field = _RUN_FIELDS[first]
        self.fields.add(first)
        if not rest:
            return field
        if field.kind == "time" and rest in [[part] for part in _TIME_PARTS]:
            return self.operation(operator.attrgetter(rest[0]), field)
        if first == "tags":
            return _Value(_at(field.of, rest))
        return self.refuse(node, f"run.{first} has no '{rest[0]}' here")

    def summary(self, node: ast.expr, names: List[Any]) -> _Value:
        parts = [names[0], {}, names[1]] if len(names) == 2 else names
        if list(map(type, parts)) != [str, dict, str]:
            self.refuse(node, "write run.metrics['loss', {'subset': 'val'}].last")
        name, context, field = parts
        if field not in _SERIES_FIELDS:
            self.refuse(node, f"a metric has no '{field}' here, but {', '.join(_SERIES_FIELDS)}")

        def of(row: Dict[str, Any], metric: Any) -> Any:
            for item in row["metrics"]:
                if item["name"] == name and item["context"] == context:
                    return item[field]
            return None

        return _Value(of, fact=f"metric {name}" if field == "last" else "")

    def metric_value(self, node: ast.expr, names: List[Any]) -> _Value:
        first, *rest = names
        if first not in ("name", "context", *_SERIES_FIELDS) or (rest and first != "context"):
            known = ", ".join(("name", "context", *_SERIES_FIELDS))
            self.refuse(node, f"a metric has no '{names[-1]}' here, but {known}")
        return _Value(_at(lambda row, metric: metric, names))

    def const(self, node: ast.expr) -> Any:
        value = self.value(node).const
        if value is _UNKNOWN:
            self.refuse(node, "only a constant can stand here")
        return value

    def refuse_kind(self, node: ast.expr, what: ast.AST) -> NoReturn:
        self.refuse(node, f"no {type(what).__name__} in the query language: {_ADVICE}")

    def refuse(self, node: ast.expr, reason: str) -> NoReturn:
        # Offsets count bytes of UTF-8. Of `a.b.c` it is the last name that the reader should look at.
        line, offset = node.lineno, node.col_offset
        if isinstance(node, ast.Attribute):
            line = node.end_lineno or line
            offset = (node.end_col_offset or 0) - len(node.attr.encode("utf-8"))
        before = _source(self.text).split("\n")[line - 1].encode("utf-8")[:offset]
        raise _error_at(self.text, line, len(before.decode("utf-8", "ignore")), reason)


def _at(whole_of: Evaluated, keys: Sequence[Any]) -> Evaluated:
    """Return what stands at a path of keys and list positions; None where nothing does."""

    def of(row: Dict[str, Any], metric: Any) -> Any:
        value = whole_of(row, metric)
        try:
            for key in keys:
                value = value[str(key) if isinstance(value, dict) else key]
        except (TypeError, LookupError):
            return None
        return value

    return of


# ======================================================================================
# Repo
#
# Every run of a repository: found, listed, read, removed. An answer is the index plus what the runs
# have recorded since, so it never depends on the state of the index; only its speed does.
# ======================================================================================


class QueryResult(List[Run]):
    """The runs that a query found, newest first. Each reads its log when its hash is not enough."""

    def iter_runs(self) -> Iterator[Any]:
        """Return objects with a `.run`, as Aim's queries do."""
        return (types.SimpleNamespace(run=run) for run in self)


#: The rows of runs of which the index lacks something, None for a log that is gone or cannot be read.
Overlay = Dict[str, Optional[StoredRow]]


class Repo:
    """A repository: every run that was recorded in it.

    Arguments:
        path: the folder that holds `.aim`, or `.aim` itself; None: see `find_repo`.
        init: create it where it is missing.
        read_only: accepted for Aim's sake; reading never writes anything but the index.

    Raises RepoError where there is no repository.
    """

    def __init__(
        self, path: Optional[str] = None, *, read_only: Optional[bool] = None, init: bool = False
    ) -> None:
        self._paths = find_repo(None if path is None else os.fspath(path), create=init)
        self.path = self._paths.root
        #: Live runs are asked about again and again.
        self._pending_row = functools.lru_cache(1000)(self._read_row)

    def __fspath__(self) -> str:
        # So that Run(repo=...) takes it, as in Aim.
        return self.path

    @classmethod
    def from_path(cls, path: str, read_only: Optional[bool] = None, init: bool = False) -> Repo:
        """Return the repository at a path, as the constructor does."""
        return cls(path, read_only=read_only, init=init)

    @classmethod
    def default_repo(cls, init: bool = False) -> Repo:
        """Return the repository that `Run()` would use."""
        return cls(None, init=init)

    # ---------------------------------------------------------------- single runs

    def get_run(self, run_hash: str) -> Optional[Run]:
        """Return a run to read, or None where there is none of that hash."""
        if RUN_HASH.fullmatch(run_hash) and os.path.exists(self._paths.run_log(run_hash)):
            return Run._to_read(self._paths, run_hash)
        return None

    def find_run(self, text: str, others: Iterable[str] = ()) -> str:
        """Return the hash of the run that has this name, or whose hash starts with it; `others` are hashes of
        runs that have no log here, such as Aim's. Raises AimwatchError for none or several."""
        hashes = set(list_runs(self._paths)).union(others)
        named: List[str] = []
        if text and text not in hashes:
            query = f"run.archived in (True, False) and run.name == {text!r}"
            named = [row["hash"] for row in self.run_rows(query)]
        way_out = f" in {self.path}: '{command_line(self.path)} runs' lists them"
        return find_by_prefix(text, hashes, "run", way_out, named)

    def list_all_runs(self) -> List[str]:
        """Return the hashes of all runs, as in Aim."""
        return list_runs(self._paths)

    def iter_runs(self) -> Iterator[Run]:
        """Yield every run, archived ones and all ranks too, newest first."""
        return iter(self.query_runs("run.archived in (True, False) or run.rank"))

    def total_runs_count(self) -> int:
        """Return how many runs there are."""
        return len(list_runs(self._paths))

    def delete_run(self, run_hash: str) -> bool:
        """Remove a run with everything it recorded; True where there was one.

        Raises RunBusyError for a run that a process still writes.
        """
        paths = self._paths
        checked_run_hash(run_hash)
        with self._held(run_hash):
            found = os.path.exists(paths.run_log(run_hash))
            for folder in (paths.check_ins, paths.news, paths.mutes, paths.stacks, paths.runs):
                for name in names_in(folder, rf"{run_hash}([.-].*)?"):
                    unlink_below(os.path.join(folder, name))
        # The marker stays until the index has forgotten the run, now or when somebody reindexes.
        try_to_index(self._paths, [run_hash], 2.0)
        return found

    def close_run(self, run_hash: str) -> bool:
        """Declare a run ended whose process is gone, without notifying anybody: where it says nothing of
        its end, it failed, and what is left of its check-ins goes, so that it counts as stalled or newly
        failed no more. True where that changed something.

        Raises RunBusyError for a run that a process still writes, RepoError for none of that hash, or where
        nothing can be written.
        """
        path = self._paths.run_log(checked_run_hash(run_hash))
        if not os.path.exists(path):
            raise RepoError(f"no run {run_hash} in {self.path}: '{command_line(self.path)} runs' lists them")
        with self._held(run_hash):
            state = Run._to_read(self._paths, run_hash)._state
            newest = last_check_in(self._paths, run_hash)
            open_ended = state.end is None or newest is not None and newest.flag != FINISHED
            if state.end is None and not finalize_dead(self._paths, state):
                raise RepoError(f"cannot close {run_hash}: {path} cannot be written")
            for name in own_check_ins(self._paths, run_hash) if open_ended else ():
                unlink_below(os.path.join(self._paths.check_ins, name))
        try_to_index(self._paths, [run_hash], 2.0)
        return open_ended

    @contextlib.contextmanager
    def _held(self, run_hash: str) -> Iterator[None]:
        os.makedirs(self._paths.pending, exist_ok=True)
        with FileLock(self._paths.marker(run_hash), brief=True) as marker:
            if marker.acquire() is False:
                raise RunBusyError(f"run {run_hash} is being written by a process: end that first")
            yield

    # ---------------------------------------------------------------- queries

    def query_runs(self, q: str = "", *, report_mode: Any = None) -> QueryResult:
        """Return the runs for which a query is true, newest first; "" is true for all.

        Archived runs are left out unless the query speaks of `archived`, and of a group of ranks all but
        the first unless it speaks of `run.rank`. Raises QueryError, naming the column, for what the language
        does not have. `report_mode` is Aim's and has no effect.
        """
        return QueryResult(Run._to_read(self._paths, row["hash"]) for row in self.run_rows(q))

    def run_rows(self, q: str = "") -> List[StoredRow]:
        """Return the rows of the runs for which a query is true, newest first."""
        return [row for row, _ in self._answer(Query(q))]

    def query_metrics(self, q: str = "", *, report_mode: Any = None) -> List[Metric]:
        """Return the metric series for which a query over `run` and `metric` is true, those of the newest
        run first; `report_mode` is Aim's and has no effect."""
        return [
            Metric(Run._to_read(self._paths, row["hash"]), SeriesState.from_list(list(metric.values())))
            for row, metric in self.metric_rows(q)
        ]

    def metric_rows(self, q: str = "") -> List[Tuple[StoredRow, Dict[str, Any]]]:
        """Return the series for which a query is true, each with the row of its run."""
        return self._answer(Query(q, "metric"))

    def names(self) -> Tuple[Set[str], Set[str]]:
        """Return the dotted paths of the params of all runs, and the names of their metrics."""

        def all_paths(index: sqlite3.Connection, overlay: Overlay) -> Set[str]:
            found = {path for (path,) in index.execute("SELECT DISTINCT path FROM facts")}
            return found.union(path for row in overlay.values() if row for path, _ in facts_of(row))

        paths = self._ask(all_paths)
        params = {path[len("params.") :] for path in paths if path.startswith("params.")}
        params.update(param[: dot.start()] for param in list(params) for dot in re.finditer(r"\.", param))
        return params, {path[len("metric ") :] for path in paths if path.startswith("metric ")}

    def _answer(self, query: Query) -> List[Tuple[StoredRow, Any]]:
        """Return what a query finds, newest run first."""

        def select(index: sqlite3.Connection, overlay: Overlay) -> List[Any]:
            indexed = (row for row in query.candidates(index) if row["hash"] not in overlay)
            return list(query.matches(itertools.chain(filter(None, overlay.values()), indexed)))

        found: List[Any] = self._ask(select)
        found.sort(key=lambda pair: (pair[0]["created_at"], pair[0]["hash"]), reverse=True)
        return found

    def _ask(self, question: Callable[[sqlite3.Connection, Overlay], Any]) -> Any:
        """Return the answer to a question of the index and of what it lacks."""
        try:
            with open_index(self._paths, "ro", BUSY_S) as index:
                return question(index, self._overlay(index, list_pending(self._paths)))
        except IndexUnusable:
            with contextlib.suppress(AimwatchError, OSError), write_index(self._paths, 1.0, anew=True):
                pass  # for those who ask later
        except (IndexBusy, OSError):
            pass
        # Of an empty one, the logs alone answer.
        with connect("", "memory", BUSY_S) as index:
            index.executescript(_SCHEMA)
            return question(index, self._overlay(index, list_runs(self._paths)))

    def _overlay(self, index: sqlite3.Connection, hashes: List[str]) -> Overlay:
        sql = "SELECT 1 FROM runs WHERE hash = ? AND log_size = ?"
        found = log_sizes(self._paths, hashes).items()
        lacking = dict(item for item in found if not index.execute(sql, item).fetchone())
        if len(lacking) > 50:
            try_to_index(self._paths, list(lacking), 0.1)  # for the next who asks
        return {run_hash: self._pending_row(run_hash, size) for run_hash, size in lacking.items()}

    def _read_row(self, run_hash: str, size: int) -> Optional[StoredRow]:
        """Return the row of a run whose log has this size."""
        state, problem = load_run(self._paths, run_hash)
        if problem:
            log.warning("%s", problem)
        return StoredRow(*stored_parts(run_row(state))) if state else None

    def reindex(self, rebuild: bool = False) -> List[str]:
        """Bring the index up to date with every pending run, or build it anew; return what could
        not be read. Raises IndexBusy where another process holds the index for too long."""
        return Reindexer(self._paths).run_all(rebuild)


# ======================================================================================
# Notifiers: configuration
#
# config.json keeps Aim's format, and keeps whatever in it we do not know. Every change is made
# under a lock to the file as it then is, and replaces it in one step with mode 0600. No secret in
# it is ever shown.
# ======================================================================================

STALLED, RECOVERED, STARTED, LOG = "stalled", "recovered", "started", "log"
#: What the watcher says of itself or of the repository; goes to every notifier.
TROUBLE = "trouble"
#: The state of a run that is none of the others.
RUNNING = "running"


class Kind(NamedTuple):
    """A kind of event, or the state that it leaves a run in."""

    icon: str = ""
    #: The ANSI code of its colour on a terminal.
    colour: str = ""
    #: For how many seconds the check-in of a run that ended so is kept.
    keep_s: float = math.inf
    #: The line about such an event, as `fill_known` fills it.
    line: str = "{run.name} {event}|: {run.reason}"


_SILENT = "|: silent for {run.silent}, promised a check-in within {run.promised}"
#: In the order in which they stand in a message about several, and in a report.
KINDS: Dict[str, Kind] = {
    FAILED: Kind("❌", "31", keep_s=86400.0),
    STALLED: Kind("❗", "31", line="{run.name} stalled" + _SILENT + "|: {run.reason}"),
    TROUBLE: Kind("❗", line="aimwatch: {run.reason}"),
    LOG: Kind("📝", line="{run.name} logged {run.reason}|: {run.messages}"),
    RECOVERED: Kind("✅"),
    STARTED: Kind(),
    RUNNING: Kind(colour="32"),
    FINISHED: Kind("✅", "2", keep_s=600.0, line="{run.name} finished| {run.reason}"),
}
#: What a notifier may ask for, and what it gets where it does not ask.
EVENTS = (STALLED, FAILED, RECOVERED, STARTED, FINISHED, LOG)
DEFAULT_EVENTS = (STALLED, FAILED, RECOVERED)
CONFIG_LOCK_WAIT_S = 10.0
LOG_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
WORKPLACE_URL = "https://graph.facebook.com/v14.0"
#: The text that Aim puts into every new notifier, and that Aim's watcher needs there. It says
#: nothing of what happened, so ours is sent in its place.
AIM_DEFAULT_MESSAGE = "❗️ Something wrong with Run '{run.hash}'. Please check. ❗️"
#: What a message template may name: `message` is the default message, `run.silent` for how long nothing new
#: was seen, `run.process` whether the process is there, `run.messages` what a log event is about.
TEMPLATE_FIELDS = (
    *("event", "message", "repo", "time", "run.hash", "run.name", "run.experiment", "run.host", "run.pid"),
    *("run.job", "run.user", "run.rank", "run.stdout", "run.last_seen", "run.promised", "run.silent"),
    *("run.process", "run.reason", "run.frames", "run.output", "run.metrics", "run.progress", "run.messages"),
)
KNOWN_FIELDS = ", ".join("{%s}" % field for field in TEMPLATE_FIELDS)
_TEMPLATE_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.]*)\}")

#: What is known of an event, by the names that templates use. Its `id` names run, check-in and kind, so that
#: a second sight of the same event is the same event.
Facts = Dict[str, str]


class Notifier(NamedTuple):
    """One notifier as configured. `problem` says why it cannot be used, or is None."""

    id: str
    type: str
    enabled: bool
    arguments: Dict[str, Any]
    events: Tuple[str, ...]
    problem: Optional[str]
    #: What people call it, and a query: it hears only of the runs for which that is true.
    name: str = ""
    where: str = ""

    @property
    def shown_as(self) -> str:
        """What it is called where people read it: its name, or the beginning of a random ID."""
        return self.name or (self.id[:8] if len(self.id) == 36 else self.id)

    def wants(self, kind: str) -> bool:
        """True where events of this kind go to this notifier."""
        return kind == TROUBLE or kind in self.events

    def scrub(self, text: str) -> str:
        """Return `text` with every secret of this notifier, and every longer part of one, as asterisks."""
        secrets: List[str] = []
        fields = [field.name for field in NOTIFIER_FIELDS[self.type] if field.secret]
        with_texts(list(map(self.arguments.get, fields)), secrets.append)
        hidden = set(secrets)
        for secret in secrets:
            # The request line and library errors show the path without the host.
            path = secret.partition("://")[2].partition("/")[2] or secret
            hidden.update((path, *re.findall("[^/?&= ]{6,}", path)))
        for secret in sorted(hidden, key=len, reverse=True):
            text = text.replace(secret, "***") if len(secret) > 3 else text
        return text


def with_texts(value: Any, change: Callable[[str], Any]) -> Any:
    """Return a JSON value with what a function makes of every text in it, but for the names in objects."""
    if isinstance(value, dict):
        return {name: with_texts(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [with_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


# The checks return a value as it is used, and raise ConfigError with what the value must be. They take what
# config.json holds and what somebody typed, and show nothing of what may be a secret.


def a_text(pattern: str, problem: str, strip: bool = True, number: bool = False) -> Callable[[Any], Any]:
    """Return a check of text on a regular expression; `{}` in the problem stands for the text. With
    `number`, digits become an int."""

    def check(value: Any) -> Any:
        text = str(value).strip() if strip else str(value)
        if not re.fullmatch(pattern, text):
            raise ConfigError(problem.replace("{}", printable(repr(text), 60)))
        return int(text) if number and text.isdigit() else text

    return check


#: What stands in a mail address for the login name of who trains.
_USER = "{run.user}"
#: By how a mail connection is secured, the port where none is given.
MAIL_PORTS = {"starttls": 587, "tls": 465, "none": 25}
checked_ascii = a_text("[ -~]+", "must be one line of printable ASCII", strip=False)
checked_url = a_text(
    r"(?i:https?)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?([/?#][!-~]*)?",
    "must start with https:// or http:// and a host, and hold no user name, space or what is not ASCII",
)
#: A Workplace group ID; a number where it is one, since so Aim reads it.
checked_group = a_text("[A-Za-z0-9_.]{1,64}", "must be letters and digits, not {}", number=True)
checked_security = a_text("|".join(MAIL_PORTS), f"must be one of {', '.join(MAIL_PORTS)}, not {{}}")
checked_port = a_text("[1-9][0-9]{0,4}", "must be the number of a port, not {}", number=True)
checked_address = a_text(
    r"(?=[!-~]+\Z)[^@,;:<>\"()\[\]\\{}]+@[A-Za-z0-9.-]+", "must be a mail address, name@host, not {}"
)
checked_notifier_name = a_text(r"[\w.-]{1,40}", "must be of letters, digits, - . _, not {}")


def checked_headers(value: Any) -> Dict[str, str]:
    """Check HTTP headers: a dict, or text with one `Name: value` a line."""
    if isinstance(value, dict):
        value = "\n".join(f"{name}: {text}" for name, text in value.items())
    lines = filter(str.strip, str(value).splitlines())
    found = [re.fullmatch(r"\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+):([\t -~]+)", line) for line in lines]
    if not all(found):
        raise ConfigError("must be 'Name: value', of printable ASCII, on each line")
    return {header[1]: header[2].strip() for header in found if header}


def checked_body(value: Any) -> Any:
    """Check a JSON value whose texts are templates."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, (dict, list)):
        raise ConfigError('must be a JSON object or list, such as {"content": "{message}"}')
    return value


def checked_addresses(value: Any) -> List[str]:
    """Check mail addresses, in which `{run.user}` may stand: a list, or text with commas between them."""
    found = value if isinstance(value, list) else re.findall(r"[^,\s]+", str(value))
    for item in found:
        checked_address(str(item).replace(_USER, "user"))
    if not found:
        raise ConfigError("must be mail addresses with commas between them")
    return [str(item).strip() for item in found]


def recipients(notifier: Notifier, facts: Facts) -> List[str]:
    """Return the addresses that get a mail about an event. One with the user in it gets none where that is
    unknown, or is no name that a mail address can have."""
    user, addresses = facts.get("run.user", ""), notifier.arguments.get("to") or ()
    known = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", user)
    return [item.replace(_USER, user) for item in addresses if known or _USER not in item]


def checked_command(value: Any) -> List[str]:
    """Check a program and its arguments: a list, or text that is split as a shell does."""
    import shlex

    with contextlib.suppress(ValueError):
        value = shlex.split(value) if isinstance(value, str) else value
    words = list(map(str, value)) if isinstance(value, list) else []
    if not words or not os.path.isabs(words[0]):
        raise ConfigError("must be a program with its whole path, and its arguments, as a shell takes them")
    return words


def checked_query(value: Any) -> str:
    """Check a query over runs. Raises QueryError."""
    Query(str(value))
    return str(value).strip()


def check_template(value: Any) -> None:
    """Raise ConfigError where a message, or a text in a JSON value, names an unknown field."""
    for name in _TEMPLATE_FIELD.findall(str(value)):
        if name not in TEMPLATE_FIELDS:
            raise ConfigError(f"names {{{name}}}, which does not exist: use {KNOWN_FIELDS}")


class Field(NamedTuple):
    """One argument of a notifier type: its name in config.json, as a flag and for who is asked."""

    name: str
    flag: str
    prompt: str
    check: Callable[[Any], Any]
    secret: bool = False
    required: bool = False


_MESSAGE = Field("message", "message", "Message template (empty for the default)", str)
_URL = Field("url", "webhook-url", "Webhook URL", checked_url, secret=True, required=True)
_OWN_FIELDS: Dict[str, Tuple[Field, ...]] = {
    "slack": (_URL,),
    "workplace": (
        Field("group_id", "group-id", "Group ID", checked_group, required=True),
        Field("access_token", "access-token", "Access token", checked_ascii, secret=True, required=True),
        Field("base_url", "base-url", f"Graph API URL (empty: {WORKPLACE_URL})", checked_url, secret=True),
    ),
    "logger": (),
    "webhook": (
        _URL,
        Field("headers", "header", "HTTP header 'Name: value' (empty: none)", checked_headers, secret=True),
        Field("body", "body", "JSON to send, its texts filled in (empty: ours)", checked_body, secret=True),
    ),
    "email": (
        Field("host", "smtp-host", "Mail server", checked_ascii, required=True),
        Field("security", "security", "starttls, tls, none (empty: starttls)", checked_security),
        Field("port", "port", "Port (empty: 587, with tls 465, with none 25)", checked_port),
        Field("user", "user", "User name to log in (empty: no login)", checked_ascii),
        Field("password", "password", "Password (empty: none)", checked_ascii, secret=True),
        Field("sender", "from", "From", checked_address, required=True),
        Field("to", "to", "To, with commas between several", checked_addresses, required=True),
    ),
    "command": (
        Field("command", "command", "Program with whole path, and arguments", checked_command, required=True),
    ),
}
NOTIFIER_FIELDS = {kind: (*fields, _MESSAGE) for kind, fields in _OWN_FIELDS.items()}


def masked(kind: str, arguments: Dict[str, Any]) -> Dict[str, Any]:
    """Return a notifier's arguments as they may be shown. Of a type that we do not know, every
    value might be a secret."""
    public = {field.name for field in NOTIFIER_FIELDS.get(kind, ()) if not field.secret}
    shown = dict(arguments)
    for name in arguments.keys() - public:
        # Of an address with a user name in it nothing is shown.
        url = re.match(r"https?://[A-Za-z0-9.:\[\]-]+(?![^/?#])", str(arguments[name]))
        shown[name] = f"{url[0]}/***" if url else "***"
    return shown


def read_notifier(notifier_id: str, raw: Any) -> Notifier:
    """Return one entry of config.json as a Notifier; what is wrong with it is its `problem`."""
    entry = raw if isinstance(raw, dict) else {}
    kind, given, asked = str(entry.get("type")), entry.get("arguments"), entry.get("events", DEFAULT_EVENTS)
    arguments = {**given} if isinstance(given, dict) else {}
    asked = asked if isinstance(asked, (list, tuple)) else [asked]
    name, where = (str(entry.get(key) or "") for key in ("name", "where"))
    subject, problem = "", None
    try:
        if kind not in NOTIFIER_FIELDS:
            raise ConfigError(f"type {printable(repr(kind), 40)} is not one of {', '.join(NOTIFIER_FIELDS)}")
        if not all(event in EVENTS for event in asked):
            raise ConfigError(f"'events' must be a list of {', '.join(EVENTS)}")
        checked_query(where)
        for field in NOTIFIER_FIELDS[kind]:
            subject = f"argument {field.name!r} "
            if arguments.get(field.name) not in (None, ""):
                arguments[field.name] = field.check(arguments[field.name])
            elif field.required:
                raise ConfigError("is missing")
    except (ConfigError, QueryError) as error:
        problem = f"{subject}{error}"
    enabled, name = entry.get("status", "enabled") == "enabled", printable(name, 40)
    events = tuple(event for event in EVENTS if event in asked)
    return Notifier(notifier_id, kind, enabled, arguments, events, problem, name, where)


def read_config(paths: RepoPaths) -> Dict[str, Any]:
    """Return the content of config.json. Raises ConfigError where it is damaged or not to be trusted."""
    path = paths.config
    try:
        with open_regular(path) as file:
            raw, info = json.loads(file.read(MAX_LINE_BYTES)), os.fstat(file.fileno())
        raw["notifications"].setdefault("notifiers", {}).items()
    except FileNotFoundError:
        return {"notifications": {"version": "1.0", "log_level": 30, "notifiers": {}}}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except MALFORMED as error:
        raise ConfigError(
            f'{path} is not JSON like {{"notifications": {{"notifiers": {{}}}}}} ({error}): '
            "mend it, or move it away and add the notifiers again"
        ) from None
    # It says where everything goes, and what programs run as the one who watches. On some shares files
    # belong to another number than their user has.
    mine = info.st_uid in (0, os.geteuid()) or (os.geteuid() and os.access(path, os.W_OK))
    if info.st_mode & 0o022 or not mine:
        raise ConfigError(
            f"{path} is not used: it must be a file that belongs to you (or root) and that nobody else can "
            "write: chmod 600"
        )
    return raw  # type: ignore[no-any-return]


def read_notifiers(paths: RepoPaths) -> List[Notifier]:
    """Return every notifier, usable or not. Raises ConfigError like `read_config`."""
    entries = read_config(paths)["notifications"]["notifiers"]
    return [read_notifier(notifier_id, raw) for notifier_id, raw in entries.items()]


def find_notifier(text: str, raw: Dict[str, Any]) -> str:
    """Return the ID of the notifier that has this name, or whose ID starts so. Raises AimwatchError."""
    entries = raw["notifications"]["notifiers"]
    named = [key for key in entries if text and read_notifier(key, entries[key]).name == text]
    return find_by_prefix(text, entries, "notifier", f": '{command_line()} notifiers list' shows them", named)


@contextlib.contextmanager
def edit_config(paths: RepoPaths) -> Iterator[Dict[str, Any]]:
    """Yield the content of config.json to who changes it, and write it back, under a lock and in one step."""
    refuse_root(paths)
    try:
        os.makedirs(paths.notifications, exist_ok=True)
        with FileLock(paths.config_lock) as lock:
            if lock.acquire(wait_s=CONFIG_LOCK_WAIT_S) is False:
                raise ConfigError(f"{paths.config_lock} is locked: try again")
            freshen(paths.config)
            raw = read_config(paths)
            yield raw
            replace_file(paths.config, (json.dumps(raw, indent=4) + "\n").encode(), 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write {paths.config}: {error.strerror}") from None


# ======================================================================================
# Notifiers: messages
#
# From what is known of an event to the text that a person reads. Pure: no file, no socket. A
# template is filled by look-up alone, so that nothing in it or in a run's data is evaluated.
# ======================================================================================

MAX_MESSAGE = 3000
#: A field of more lines than this is cut.
MAX_FACT_LINES = 30
#: So many events stand in full in a message about several, where there is room for that.
FULL_EVENTS = 10
#: Otherwise so many have a line each, and the rest are counted.
BATCH_LINES = 20


def fill_template(template: str, facts: Facts) -> str:
    """Return `template` with every known {field} replaced; unknown ones stand as they are."""
    return _TEMPLATE_FIELD.sub(
        lambda field: facts.get(field[1], "") if field[1] in TEMPLATE_FIELDS else field[0], template
    )


def fill_known(template: str, facts: Facts) -> str:
    """Return `template` filled in, without the parts between its bars of which a field is not known."""
    parts = [part for part in template.split("|") if all(map(facts.get, _TEMPLATE_FIELD.findall(part)))]
    return fill_template(re.sub("^, ", "", "".join(parts)), facts)


def on_one_line(reason: str) -> str:
    """Return of a reason of several lines the first and the last, which say the most."""
    first, *more = reason.split("\n")
    return f"{first} ... {more[-1]}" if more else first


def summary(facts: Facts) -> str:
    """Return one line that says which run and what happened."""
    said = {
        **facts,
        "run.name": facts.get("run.name") or facts.get("run.hash", ""),
        "run.reason": on_one_line(facts.get("run.reason", "")),
        "run.messages": facts.get("run.messages", "").rpartition("\n")[2].strip(),
    }
    kind = KINDS.get(facts.get("event", ""), Kind())
    return f"{kind.icon} {fill_known(kind.line, said)}".strip()


def default_message(facts: Facts) -> str:
    """Return all that there is to say of one event: what, which run, where, since when."""
    stalled = facts.get("event") == STALLED
    hangs = stalled and facts.get("run.process") == "alive"
    stuck = hangs and not facts.get("run.frames")
    lines = [
        "{run.reason}" if facts.get("run.reason", "").count("\n") > 1 else "",
        "run {run.hash}|, experiment {run.experiment}",
        "on {run.host}|, process {run.pid}|, job {run.job}|, user {run.user}",
        "last seen {run.last_seen}" + ("|, {run.silent} ago" if facts.get("run.reason") == DIED else ""),
        "its output goes to {run.stdout}",
        "{run.messages}",
        "its process is still there: it hangs, or is slower than it promised" * hangs,
        "it left no stacks: no Python code can run in it, it cannot write them, or they are off" * stuck,
        "last metrics: {run.metrics}",
        "progress: {run.progress}",
        f"where it {'hangs' if stalled else 'failed'}, innermost last:\n{{run.frames}}",
        "its last output:\n{run.output}",
    ]
    known = [fill_known(line, facts) for line in lines] if facts.get("event") != TROUBLE else []
    return "\n".join(filter(None, [summary(facts), *known]))


def look_further(facts: Facts) -> str:
    """Return the line that says which command shows more, for who reads it somewhere else."""
    import shlex

    program, repo = map(shlex.quote, (os.path.abspath(__file__), facts.get("repo", "")))
    return f"look further: python3 {program} --repo {repo} {facts.get('look', 'status')}"


def speaks_for(template: Optional[str], facts: Facts) -> bool:
    """True where a user's template speaks for an event: for stalls and failures, as in Aim, and for
    everything where it names {event} or {message}. What it cannot mean is said in our words."""
    event, named = facts.get("event"), _TEMPLATE_FIELD.findall(template or "")
    if not template or template == AIM_DEFAULT_MESSAGE or event == TROUBLE:
        return False
    return event in (STALLED, FAILED) or "event" in named or "message" in named


def message_for(template: Optional[str], facts: Facts) -> str:
    """Return what one notifier says of one event."""
    facts = {"message": f"{default_message(facts)}\n{look_further(facts)}", **facts}
    return fill_template(str(template), facts) if speaks_for(template, facts) else facts["message"]


def message_for_batch(template: Optional[str], batch: Sequence[Facts], limit: int = MAX_MESSAGE) -> str:
    """Return one message of at most `limit` characters about all events of `batch`, the worst first, in its
    first line what happened; what had one cause is said once."""
    if len(batch) == 1:
        return shorten(message_for(template, batch[0]), limit)
    causes: Dict[Any, List[Facts]] = collections.defaultdict(list)
    order = [*KINDS, *(facts.get("event", "") for facts in batch)]
    for facts in sorted(batch, key=lambda facts: order.index(facts.get("event", ""))):
        names = facts.keys() & {"run.name", "run.experiment", "run.host"}
        short = {**facts, **{name: shorten(on_one_line(facts[name]), 60, "...") for name in names}}
        alone = len(batch) <= FULL_EVENTS and speaks_for(template, facts)
        causes[id(facts) if alone else _cause(facts)].append(short)
    groups = list(causes.values())
    shown = [facts for group in groups for facts in group]
    kinds = Counter(facts.get("event", "") for facts in shown)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    parts = [f"{_counted('events', shown)}: {counts}"] if len(groups) > 1 else []
    gap, left = "\n\n" if len(groups) <= FULL_EVENTS else "\n", len(batch)
    last = shorten(look_further({"repo": batch[0].get("repo", "")}), limit // 4, "...")
    for group in groups[:BATCH_LINES]:
        facts = _as_one(group)
        text = message_for(template, {**facts, "message": default_message(facts)})
        room = limit - len(gap.join([*parts, "", f"and {left} more", last]))
        if len(groups) > FULL_EVENTS or len(text) > room:
            text = shorten(summary(facts), 160, " ...") + fill_known("| ({run.hash})", facts)
        if len(text) > room:
            break
        parts.append(text)
        left -= len(group)
    return gap.join([*parts, *([f"and {left} more"] if left else []), last])


def _cause(facts: Facts) -> Any:
    """Return what events have in common that are said as one."""
    event = facts.get("event", "")
    if event in (LOG, TROUBLE) or "run.rank" in facts or "run.hash" not in facts:
        return id(facts)
    return event, facts.get({FAILED: "run.reason", STALLED: "run.frames"}.get(event, ""), "")


def _counted(noun: str, group: Sequence[Facts]) -> str:
    """Return how many there are, and where all of them ran: `7 runs in sweep on node7`."""
    return f"{len(group)} {fill_known(noun + '| in {run.experiment}| on {run.host}', _common(group))}"


def _common(group: Sequence[Facts]) -> Facts:
    return {name: text for name, text in group[0].items() if all(item.get(name) == text for item in group)}


def _as_one(group: Sequence[Facts]) -> Facts:
    """Return several events of one cause as one: what they have in common, how many there are, and which."""
    if len(group) == 1:
        return group[0]
    common, runs = _common(group), []
    for facts in group[:BATCH_LINES]:
        about = short_hash(facts["run.hash"]) if facts.get("run.name") else facts["run.hash"]
        about += "" if "run.host" in common else fill_known("| on {run.host}", facts)
        runs.append(f"{facts['run.name']} ({about})" if facts.get("run.name") else about)
    while len(", ".join(runs)) > 600:
        runs.pop()
    more = f" and {len(group) - len(runs)} more" if len(runs) < len(group) else ""
    return {**common, "run.name": _counted("runs", group), "run.hash": ", ".join(runs) + more}


#: What calls for somebody in one of the chats (`@all`, `<@&1>`, `<users/all>`), and what hides where a link
#: leads to (`[name](url)`, `<url|name>`).
_CALLS = re.compile(r"(?<!\w)@(?=[\w\[&!])|@(?=everyone|here|channel|all)|<(?=users/|\w+:)|\](?=[(\[:])")


def clean_facts(facts: Facts) -> Facts:
    """Return `facts` of a bounded size, without control characters, and with nothing that has a meaning in a
    chat: a zero-width space parts it."""
    return {
        name: "\n".join(
            _CALLS.sub("\\g<0>\u200b", printable(line, 1000)) for line in value.split("\n")[:MAX_FACT_LINES]
        )
        for name, value in facts.items()
    }


def shorten(text: str, limit: int = MAX_MESSAGE, mark: str = "\n...") -> str:
    """Return `text` cut to `limit` characters, never inside an escaped character."""
    if len(text) <= limit:
        return text
    return re.sub(r"&[a-z]*\Z", "", text[: limit - len(mark)]) + mark


# ======================================================================================
# Notifiers: transports
#
# One attempt to deliver one text, bounded as a whole in time and in bytes read, and a judgement of
# what came back that is a function of the answer alone. Redirects are never followed. Only a name
# server that is silent can make an attempt longer, and it delays the one notifier that asked it.
# ======================================================================================

ATTEMPT_S = 10.0
#: At least this long between two posts to one notifier.
MIN_POST_GAP_S = 1.0
MAX_ANSWER_BYTES = 1 << 16
#: The shortest limit among the chats for which one writes a body is Discord's.
MAX_BODY_MESSAGE = 2000
#: REFUSED: it is this message that the other side does not take.
SENT, RETRY, BROKEN, REFUSED = "sent", "retry", "broken", "refused"


class Outcome(NamedTuple):
    """What became of an attempt. `wait_s` is how long the other side asked us to wait."""

    kind: str
    detail: str
    wait_s: float = 0.0


def try_once(notifier: Notifier, send: Callable[[float], Outcome]) -> Outcome:
    """Try once to send something by a deadline, and return what came of it, in one line without secrets."""
    try:
        outcome = send(time.monotonic() + ATTEMPT_S)
    except Exception as error:  # by a function: a variable here would keep its traceback, and so the socket
        outcome = judge_error(error)
    return outcome._replace(detail=printable(notifier.scrub(" ".join(outcome.detail.split())), 200))


def judge_error(error: Exception) -> Outcome:
    """Judge an attempt that ended in an exception: networks heal, our own mistakes would end the same, and of
    what a mail server says 4xx is tried again and 5xx is not (RFC 5321 4.2.1)."""
    import http.client
    import smtplib

    reason = getattr(error, "reason", None)
    known = reason if isinstance(reason, Exception) else error
    codes = [code for code, _ in getattr(error, "recipients", {}).values()]
    codes = codes or [getattr(error, "smtp_code", 0)]
    # What is said of a login may quote it.
    said = codes[0] if isinstance(error, smtplib.SMTPAuthenticationError) else known
    heals = isinstance(error, (OSError, http.client.HTTPException, MemoryError))
    kind = RETRY if heals else REFUSED
    if all(500 <= code < 600 for code in codes):
        kind = REFUSED if isinstance(error, smtplib.SMTPDataError) else BROKEN
    return Outcome(kind, f"{type(known).__name__}: {said}")


def left_s(deadline_mono: float) -> float:
    """Return how much time is left. Raises TimeoutError where none is."""
    seconds = deadline_mono - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def bounded_socket(base: Any, deadline_mono: float) -> Any:
    """Return a class of sockets that receive nothing after a deadline, and not without end. A time-out bounds
    one operation, and a server that sends one byte a second never runs into it."""

    class Bounded(base):  # type: ignore[misc]
        received = 0

        def recv_into(self, *args: Any, **options: Any) -> Any:
            self.settimeout(left_s(deadline_mono))
            count = super().recv_into(*args, **options)
            self.received += count
            if self.received > 1 << 20:
                raise OSError(errno.EMSGSIZE, "the answer is longer than 1 MiB")
            return count

    return Bounded


def dial(address: Tuple[str, int], deadline_mono: float) -> Any:
    """Return a connected socket that ends with the attempt. Raises OSError."""
    import socket

    try:
        # An address of several that does not answer has its share of the time alone.
        several = len(socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
        with socket.create_connection(address, left_s(deadline_mono) / several) as link:
            bounded = bounded_socket(socket.socket, deadline_mono)(fileno=link.detach())
        bounded.settimeout(left_s(deadline_mono))
        return bounded
    except OSError as error:
        # Which of several servers it was is what people ask first.
        raise type(error)(*error.args[:-1], f"{error.strerror or error}: {address[0]}:{address[1]}") from None


def tls_context(deadline_mono: float) -> Any:
    """Return a TLS context that trusts the system's certificates, or those of the usual variables."""
    import ssl

    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    context = ssl.create_default_context(cafile=bundle or None)
    context.sslsocket_class = bounded_socket(ssl.SSLSocket, deadline_mono)
    return context


def post(
    kind: str, url: str, deadline_mono: float, payload: Any = None, headers: Optional[Dict[str, str]] = None
) -> Outcome:
    """POST `payload` to a URL as JSON, or GET it where there is none, and judge the answer. Proxies and CA
    bundles come from the usual variables. Raises OSError and http.client.HTTPException."""
    import urllib.request

    class Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
        def do_open(self, http_class: Any, req: Any, **http_conn_args: Any) -> Any:
            def connection(host: str, **options: Any) -> Any:
                made = http_class(host, **options)
                made._create_connection = lambda address, *_: dial(address, deadline_mono)
                return made

            return super().do_open(connection, req, **http_conn_args)

    data = None if payload is None else json.dumps(payload).encode()
    own = {"User-Agent": f"aimwatch/{__version__}", "Content-Type": "application/json; charset=utf-8"}
    request = urllib.request.Request(url, data, {**own, **(headers or {})})
    # Without urllib's handlers of errors and redirects, every answer is only an answer.
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler())
    # All certificates of the system are read only where they are needed.
    context: Any = url[:6].lower() == "https:" and tls_context(deadline_mono)
    opener.add_handler(Handler(context=context))
    with opener.open(request, timeout=ATTEMPT_S) as response:
        body = response.read(MAX_ANSWER_BYTES).decode("utf-8", "replace")
        return judge_answer(kind, response.status, body, response.headers.get("Retry-After", ""))


def judge_answer(kind: str, status: int, body: str, retry_after: str = "") -> Outcome:
    """Judge an HTTP answer to a notifier of some type, by its status and by what such a server says when it
    has taken a message (https://developers.facebook.com/docs/graph-api/guides/error-handling)."""
    said, found = body.strip(), json_object(body)
    text = f"HTTP {status}" + (f": {said}" if said else "")
    if kind == "slack":  # servers that speak its format may answer with JSON
        good = found is not None and not found.get("error") and False not in map(found.get, ("ok", "success"))
        taken = status == 200 and (said == "ok" or good)
    elif kind == "workplace":
        taken = status == 200 and bool((found or {}).get("id"))
    else:  # unless it is a page for people; not by its type: small servers call all that they answer HTML
        page = re.match(r"(?i)(<\?xml[^>]*>\s*)?<(!doctype|html|head|body|title)\b", said)
        taken = 200 <= status < 300 and not page
    if taken:
        return Outcome(SENT, text)
    if status in (429, 503):
        asked = re.fullmatch("[0-9]{1,9}", retry_after.strip())
        return Outcome(RETRY, text, min(float(asked[0]), 3600.0) if asked else 0.0)
    error = (found or {}).get("error") if kind == "workplace" and status < 500 else None
    if isinstance(error, dict):
        return Outcome(RETRY if error.get("code") in (1, 2, 4) else BROKEN, text)
    if 300 <= status < 400:
        return Outcome(BROKEN, f"HTTP {status}: redirected; give the final URL")
    if status in (401, 403, 404, 410) or "invalid_token" in said:
        return Outcome(BROKEN, text)
    if status in (400, 413, 422):
        return Outcome(REFUSED, text)
    if status < 300:
        text = f"HTTP {status} without what a {kind} server says (a proxy's or a portal's page?): {said}"
    return Outcome(RETRY, text)


def send_slack(notifier: Notifier, batch: Sequence[Facts], deadline_mono: float) -> Outcome:
    """Post one message to a Slack webhook (https://api.slack.com/messaging/webhooks)."""
    import html

    # https://api.slack.com/reference/surfaces/formatting#escaping
    safe = [{name: html.escape(value, quote=False) for name, value in facts.items()} for facts in batch]
    for facts in safe:
        for field in ("run.frames", "run.output"):
            if field in facts:
                facts[field] = "```\n{}\n```".format(facts[field].replace("```", "` ` `"))
    text = message_for_batch(notifier.arguments.get("message"), safe, MAX_MESSAGE - 4)
    text += "\n```" * (text.count("```") % 2)  # it was cut in the middle of a block
    return post("slack", notifier.arguments["url"], deadline_mono, {"text": text})


def send_workplace(notifier: Notifier, batch: Sequence[Facts], deadline_mono: float) -> Outcome:
    """Post one message to a Workplace group's feed."""
    arguments = notifier.arguments
    url = f"{(arguments.get('base_url') or WORKPLACE_URL).rstrip('/')}/{arguments['group_id']}/feed"
    headers = {"Authorization": f"Bearer {arguments['access_token']}"}
    text = message_for_batch(arguments.get("message"), batch)
    return post("workplace", url, deadline_mono, {"message": text}, headers)


def document(template: Optional[str], batch: Sequence[Facts]) -> Dict[str, Any]:
    """Return what webhooks and commands get: the message in `text`, and in `events` what is known of each."""
    events: List[Dict[str, Any]] = []
    for facts in batch[:100]:
        known: Dict[str, Any] = {key: facts[key] for key in ("id", "event", "time", "repo") if key in facts}
        events.append({**known, "run": {name[4:]: facts[name] for name in facts if name.startswith("run.")}})
    return {
        "version": 1,  # counted up when a field changes its meaning; new ones may come at any time
        "source": "aimwatch",
        "text": message_for_batch(template, batch),
        "events": events,
        "events_left_out": len(batch) - len(events),
    }


def send_webhook(notifier: Notifier, batch: Sequence[Facts], deadline_mono: float) -> Outcome:
    """Post the document, or the body that the user wrote, to any URL."""
    arguments = notifier.arguments
    if arguments.get("body"):
        # In a chat's own format, {message} is the text about the whole batch.
        text = message_for_batch(arguments.get("message"), batch, MAX_BODY_MESSAGE)
        facts = {**batch[0], "message": text}
        payload = with_texts(
            arguments["body"], lambda body: shorten(fill_template(body, facts), MAX_BODY_MESSAGE)
        )
    else:
        payload = document(arguments.get("message"), batch)
    return post("webhook", arguments["url"], deadline_mono, payload, arguments.get("headers"))


#: The programs that run for notifiers just now; held while one is started and noted there.
_programs: Set[int] = set()
_starting = threading.Lock()


def end_programs() -> None:
    """Kill the programs that run, when the watcher ends: nobody would do it after their time."""
    held = _starting.acquire(timeout=1.0)  # a share that hangs may hold up who starts one
    for pid in list(_programs):
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
    if held:
        _starting.release()


def send_command(notifier: Notifier, batch: Sequence[Facts], deadline_mono: float) -> Outcome:
    """Run a program, without a shell, with the document on its standard input."""
    import subprocess
    import tempfile

    argv = notifier.arguments["command"]
    # Files and no pipes: the program need not read, and what it leaves behind may hold both open.
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(json.dumps(document(notifier.arguments.get("message"), batch)).encode() + b"\n")
        stdin.seek(0)
        files: Dict[str, Any] = {"stdin": stdin, "stdout": subprocess.DEVNULL, "stderr": stderr}
        with _starting:
            # A session of its own, so that what it starts is ended with it.
            process = subprocess.Popen(argv, start_new_session=True, **files)
            _programs.add(process.pid)
        try:
            status = process.wait(max(0.0, deadline_mono - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Outcome(RETRY, "timed out")
        finally:
            _programs.discard(process.pid)
        stderr.seek(0)
        said = stderr.read(1000).decode("utf-8", "replace").strip()
    how = f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"
    return Outcome(RETRY if status else SENT, f"{argv[0]} {how}" + (f": {said}" if said else ""))


def mail_text(notifier: Notifier, batch: Sequence[Facts], to: Sequence[str]) -> str:
    """Return the mail about a batch of events (RFC 5322). Of the classes of `email`, these take a text as it
    is. The newer ones decode what looks like an encoded word in it, and so undo what `printable` did, up to
    forged headers (CVE-2024-6923)."""
    import email.utils
    from email.header import Header
    from email.mime.text import MIMEText

    text = message_for_batch(notifier.arguments.get("message"), batch, limit=50_000)
    mail = MIMEText(text, "plain", "utf-8")
    subject = printable(text.partition("\n")[0], 150)
    mail["Subject"] = Header(subject, "utf-8", header_name="Subject", maxlinelen=76).encode()
    mail["From"] = notifier.arguments["sender"]
    mail["To"] = ", ".join(to)
    mail["Date"] = email.utils.formatdate(localtime=True)
    mail["Message-ID"] = email.utils.make_msgid(domain=re.sub(r"[^A-Za-z0-9.-]", "-", this_host()))
    mail["Auto-Submitted"] = "auto-generated"  # by a program, so that no absence notice answers (RFC 3834)
    return mail.as_string()


def send_email(notifier: Notifier, batch: Sequence[Facts], deadline_mono: float) -> Outcome:
    """Hand one mail to a relay (RFC 6409)."""
    import smtplib

    arguments = notifier.arguments
    host, security = arguments["host"], arguments.get("security") or "starttls"
    to = recipients(notifier, batch[0])
    if not to:
        return Outcome(SENT, "no address is left for it, since its user is unknown")
    text = mail_text(notifier, batch, to)

    class Server(smtplib.SMTP):
        def _get_socket(self, host: str, port: int, timeout: float) -> Any:
            link = dial((host, port), deadline_mono)
            if security == "tls":
                link = tls_context(deadline_mono).wrap_socket(link, server_hostname=host)
            return link

    # Without a name of ours, it would ask the name server for one, which an air-gapped host lacks.
    ours = this_host() if "." in this_host() else "[127.0.0.1]"
    with contextlib.closing(Server(host, arguments.get("port") or MAIL_PORTS[security], ours)) as server:
        if security == "starttls":
            server.starttls(context=tls_context(deadline_mono))
        if arguments.get("user"):
            server.login(arguments["user"], arguments.get("password") or "")
        refused = server.sendmail(arguments["sender"], to, text)
        # Its answer is not waited for: the mail is accepted, and must not be sent again.
        with contextlib.suppress(OSError):
            server.putcmd("quit")
    # Sent again to some, it would reach the others twice.
    return Outcome(SENT, f"accepted by {host}" + (f", except for {', '.join(refused)}" if refused else ""))


def send_logger(notifier: Notifier, batch: Sequence[Facts], deadline_mono: float) -> Outcome:
    """Write every event to the log that the watcher writes."""
    for facts in batch:
        bad = facts.get("event") in (STALLED, FAILED, TROUBLE)
        text = message_for(notifier.arguments.get("message"), facts).replace("\u200b", "")  # see _CALLS
        log.log(logging.WARNING if bad else logging.INFO, "%s", text.replace("\n", "\n  "))
    return Outcome(SENT, "written to the log")


TRANSPORTS: Dict[str, Callable[[Notifier, Sequence[Facts], float], Outcome]] = {
    "slack": send_slack,
    "workplace": send_workplace,
    "logger": send_logger,
    "webhook": send_webhook,
    "email": send_email,
    "command": send_command,
}


#: What no server can object to: which run, whose it is, what happened, and numbers.
PLAIN_FIELDS = {"event", "id", "run.hash", "run.user", "run.silent", "run.promised", "time", "repo"}


def deliver(notifier: Notifier, batch: Sequence[Facts]) -> Outcome:
    """Try once to send `batch` to `notifier`; what the other side does not take, once more in our words, and
    in as few as possible."""
    send, safe = TRANSPORTS[notifier.type], [clean_facts(facts) for facts in batch]
    outcome = try_once(notifier, lambda deadline_mono: send(notifier, safe, deadline_mono))
    if outcome.kind != REFUSED:
        return outcome
    log.warning("notifier %s: %s; trying again in plain words", notifier.shown_as, outcome.detail)
    time.sleep(MIN_POST_GAP_S)
    plain = notifier._replace(arguments={**notifier.arguments, "message": ""})
    few = [
        {name: text for name, text in facts.items() if name in PLAIN_FIELDS or facts.get("event") == TROUBLE}
        for facts in safe
    ]
    outcome = try_once(plain, lambda deadline_mono: send(plain, few, deadline_mono))
    return outcome._replace(kind=BROKEN) if outcome.kind == REFUSED else outcome


def back_off_s(failures: int, random: float) -> float:
    """Return how long to wait after failures in a row; `random` in [0, 1) spreads who failed together."""
    return min(300.0, 2.0 ** min(failures - 1, 20)) * (0.75 + random / 2)


# ======================================================================================
# Outbox
#
# Every event is on disk, with the notifiers that must hear of it, before anything is sent, and
# every delivery after it was made. Killed at any instruction, the watcher finds here what is still
# to be sent, and what was sent already. One line holds an event for all its notifiers, so that no
# kill comes between two of them. Each notifier has a thread that asks what waits for it.
# ======================================================================================


def event_record(facts: Facts, notifier_ids: Sequence[str]) -> Dict[str, Any]:
    """Return the record of an event in the outbox."""
    return {"event": facts["id"], "to": notifier_ids, "facts": facts}


def trouble(event_id: str, repo: str, reason: str, **more: str) -> Facts:
    """Return an event about the watch itself."""
    return {"id": event_id, "event": TROUBLE, "run.reason": reason, "repo": repo, **more}


def _outbox_line(record: Dict[str, Any]) -> bytes:
    return to_json({**record, "time": round(time.time(), 3)}).encode("ascii") + b"\n"


#: Above this size, the outbox is rewritten without what nobody can ask for, if that is half of it.
COMPACT_BYTES = 1 << 20


class Outbox:
    """The events of a repository and who was notified of them, in a file.

    Safe for use by several threads; who asks what waits does not wait for a disk. Raises OSError where
    the file cannot be read, or unless `read_only` be opened.
    """

    def __init__(self, path: str, read_only: bool = False) -> None:
        self.path = path
        #: The ids of all events that were put here.
        self.known: Set[str] = set()
        #: What is still to be sent: by its id, the event and the notifiers for which it waits.
        self._waiting: Dict[str, Tuple[Facts, Set[str]]] = {}
        #: The notifiers that do not work: why, and since when (UTC seconds).
        self.broken: Dict[str, Tuple[str, float]] = {}
        #: Held while the file is written, as long as the disk takes. Who reads goes over a copy instead.
        self._writing = threading.Lock()
        with contextlib.suppress(FileNotFoundError), open_regular(path) as file:
            for line, _ in read_lines(file):
                self.apply(json_object(line) or {})
        #: None where nothing is to be written, as after the end: what was sent then is sent again.
        self._file = None if read_only else AppendFile(path, self._lines)

    def apply(self, record: Dict[str, Any]) -> None:
        """Take in one record without writing it; a foreign one is skipped."""
        with contextlib.suppress(*MALFORMED):
            if "event" in record:
                event_id, ids = str(record["event"]), set(map(str, record["to"]))
                self.known.add(event_id)
                if ids:
                    facts = {name: str(value) for name, value in record["facts"].items()}
                    self._waiting[event_id] = ({**facts, "id": event_id}, ids)
            elif "sent" in record:
                for event_id in self._waiting.keys() & set(record["sent"]):
                    ids = self._waiting[event_id][1]
                    ids.discard(record["to"])
                    if not ids:
                        del self._waiting[event_id]
                self.broken.pop(record["to"], None)
            elif record.get("reason"):
                self.broken[str(record["broken"])] = (str(record["reason"]), float(record["since"]))
            else:
                self.broken.pop(record.get("broken", ""), None)

    def waiting_for(self, notifier_id: str) -> List[Facts]:
        """Return what is still to be sent to a notifier, the oldest first."""
        return [event for event, ids in list(self._waiting.values()) if notifier_id in ids]

    def _lines(self) -> List[bytes]:
        """Return what a file must say at least."""
        records: List[Dict[str, Any]] = [{"begun": "what came before is only summarized"}]
        done = sorted(self.known - self._waiting.keys())
        records += [{"event": event_id, "to": []} for event_id in done]
        records += [event_record(event, sorted(ids)) for event, ids in list(self._waiting.values())]
        for notifier_id, (reason, since) in self.broken.items():
            records.append({"broken": notifier_id, "reason": reason, "since": since})
        return [_outbox_line(record) for record in records]

    def write(self, records: Sequence[Dict[str, Any]] = ()) -> None:
        """Write records, in one write that reaches the disk, and try again to write what it refused, or what
        lost its file. Where it refuses, lines wait in memory, and events are sent all the same."""
        with self._writing:
            if self._file is not None:
                self._file.look()
                if records:
                    self._file.append(b"".join(map(_outbox_line, records)))
                    self._file.sync()
            # Only now, since what is known here is sent at once; and before the file is made anew of it.
            for record in records:
                self.apply(record)

    def forget_notifiers(self, keep: Set[str]) -> None:
        """Give up what waits for notifiers that were removed: to them it counts as sent."""
        gone = self.broken.keys() | {one for _, ids in list(self._waiting.values()) for one in list(ids)}
        self.write([{"sent": [x["id"] for x in self.waiting_for(one)], "to": one} for one in gone - keep])

    def compact(self) -> None:
        """Rewrite the file, where it has grown, with what still waits and who does not work. What was sent
        is not asked for again."""
        with self._writing:
            file = self._file
            if file is None or file.size < COMPACT_BYTES or len(self.known) < 2 * len(self._waiting):
                return
            self.known = set(self._waiting)
            try:
                replace_file(self.path, b"".join(self._lines()))
                # Where the new one cannot be opened, the old one finds later that its file is gone.
                self._file = AppendFile(self.path, self._lines)
                file.close()
            except OSError as error:
                log.warning("cannot shorten %s: %s", self.path, error.strerror)

    def close(self) -> None:
        """Close the file."""
        with self._writing:
            if self._file is not None:
                self._file.close()
                self._file = None


#: After a post that was sent, what comes is collected for so long, so that a power cut that takes a while to
#: be noticed is a handful of messages.
COLLECT_S = 3.0
#: A notifier that was tried in vain for so long counts as one that does not work.
OUTAGE_S = 900.0
#: A notifier whose address or token is refused is tried again this often, and when it is changed.
BROKEN_RETRY_S = 3600.0


class NotifierThread(threading.Thread):
    """Sends one notifier what waits for it in the outbox: what hangs here delays no other notifier.

    There is one for each notifier id, and it lasts as long as the watcher, so that nothing is sent twice
    at the same time, whatever becomes of the configuration meanwhile.
    """

    def __init__(self, notifier: Notifier, dispatcher: Dispatcher) -> None:
        super().__init__(name=f"aimwatch-{notifier.type}", daemon=True)
        self.id = notifier.id
        self._dispatcher = dispatcher
        #: Set where it is to look into the outbox, and where it is to end after the attempt in flight.
        self.woken, self.stopping = threading.Event(), False
        #: As what it was last tried, how many attempts in a row have failed, since when, until when it rests.
        self._tried, self.failures, self._failed_mono, self._rests_until = notifier, 0, 0.0, -math.inf

    def batch(self) -> List[Facts]:
        """Return what is to be sent in the next message."""
        notifier = self._dispatcher.usable.get(self.id)
        waiting = self._dispatcher.outbox.waiting_for(self.id)
        if notifier is None or not waiting:
            return []
        to = recipients(notifier, waiting[0])  # each user hears of their own alone
        return [event for event in waiting if recipients(notifier, event) == to]

    def run(self) -> None:
        while True:
            self.woken.clear()
            if self.stopping:
                return
            notifier, batch = self._dispatcher.usable.get(self.id, self._tried), self.batch()
            if notifier is not self._tried:
                self._tried, self.failures, self._rests_until = notifier, 0, -math.inf
            left_s = self._rests_until - time.monotonic()
            if batch and left_s <= 0:
                try:
                    rest_s = self._send(notifier, batch)
                except Exception as error:  # a thread that died of it would take every later alert with it
                    log.error("notifier %s: %s; trying again", notifier.shown_as, type(error).__name__)
                    rest_s = MIN_POST_GAP_S
                self._rests_until = time.monotonic() + rest_s
            else:
                self.woken.wait(left_s if batch else None)

    def _send(self, notifier: Notifier, batch: List[Facts]) -> float:
        """Send `batch` in one message, and return how long to rest."""
        name = f"{notifier.type} {notifier.shown_as}"
        outcome = deliver(notifier, batch)
        kind, reason, broken = outcome.kind, outcome.detail, self._dispatcher.outbox.broken
        if kind == SENT:
            if notifier.type != "logger":  # whose messages say it themselves
                log.info("notifier %s was sent %s: %s", name, plural(len(batch), "event"), reason)
            self.failures = 0
            self._dispatcher.note(self.id, "", {"sent": [event["id"] for event in batch], "to": self.id})
            return 0.0 if notifier.type == "logger" else COLLECT_S
        if notifier is not self._dispatcher.usable.get(self.id):
            return MIN_POST_GAP_S  # as it is configured now, it has not been tried
        self.failures += 1
        if self.failures == 1:
            self._failed_mono = _monotonic()
        if self.failures == 1 or (kind == BROKEN and self.id not in broken):
            kept = "what waits is kept until it is mended; see 'notifiers list'"
            log.warning("notifier %s: %s; %s", name, reason, kept if kind == BROKEN else "trying again")
        if kind == BROKEN:
            self._dispatcher.note(self.id, reason)
            return BROKEN_RETRY_S
        if _monotonic() - self._failed_mono >= OUTAGE_S and self.id not in broken:
            self._dispatcher.note(self.id, f"tried in vain for {human_s(OUTAGE_S)}: {reason}")
        return max(back_off_s(self.failures, os.urandom(1)[0] / 256), outcome.wait_s, MIN_POST_GAP_S)


class Dispatcher:
    """Puts events into the outbox for the notifiers that want them, and follows changes of config.json."""

    def __init__(self, paths: RepoPaths, outbox: Outbox) -> None:
        self._paths = paths
        self.outbox = outbox
        #: What the configuration in force was read from, and what was said of one that is not.
        self._stamp: Any = None
        self._complaint = ""
        #: The enabled notifiers, by id. Those with a problem are not used, and what they must hear of waits.
        self._notifiers: Dict[str, Notifier] = {}
        self.usable: Dict[str, Notifier] = {}
        self._threads: Dict[str, NotifierThread] = {}
        #: From which level on people hear of log messages.
        self.log_level = logging.WARNING

    def load(self) -> None:
        """Read the configuration. Raises ConfigError; what was in force stays in force."""
        stamp = file_stamp(self._paths.config)
        notifiers = read_notifiers(self._paths)
        level = read_config(self._paths)["notifications"].get("log_level")
        self.log_level = level if isinstance(level, int) else logging.WARNING
        self._stamp, self._complaint = stamp, ""
        enabled = [item for item in notifiers if item.enabled]
        if all(item.problem for item in enabled):  # rather than nobody
            enabled.append(Notifier("logger", "logger", True, {}, DEFAULT_EVENTS, None))
        before, self._notifiers = self._notifiers, {item.id: item for item in enabled}
        self.outbox.forget_notifiers({*self._notifiers, *(item.id for item in notifiers)})
        for item in enabled:
            was = before.get(item.id)
            if item.problem:
                log.error("notifier %s %s; it is not used", item.shown_as, item.problem)
                self.note(item.id, printable(item.problem, 300))
            elif (was and was.problem) or not self.outbox.waiting_for(item.id):
                self.note(item.id, "")
        self.usable = {item.id: item for item in enabled if not item.problem}
        self._start_threads()
        self._wake()

    def _start_threads(self) -> None:
        for one in self.usable.keys() - self._threads.keys():
            with contextlib.suppress(RuntimeError):  # the user has too many: tried again at each poll
                thread = NotifierThread(self.usable[one], self)
                thread.start()
                self._threads[one] = thread

    def reload_if_changed(self) -> None:
        """Take up a changed configuration; of a broken one that is said once, and the last good one kept."""
        stamp = file_stamp(self._paths.config)
        if stamp != self._stamp:
            try:
                if stamp is None:  # an editor may be about to write it anew
                    raise ConfigError(f"{self._paths.config} is gone")
                self.load()
                log.info("notifiers reloaded: %s", self.describe())
            except ConfigError as error:
                if str(error) != self._complaint:
                    log.error("%s; the last good configuration stays in force", error)
                self._complaint = str(error)
        self._start_threads()

    def describe(self) -> str:
        """Return who is notified, for people: `slack 5c42d699, logger`."""
        return ", ".join(x.type if x.id == x.type else f"{x.type} {x.shown_as}" for x in self.usable.values())

    def wanted(self, kind: str) -> bool:
        """True where some notifier wants events of this kind."""
        return any(item.wants(kind) for item in self._notifiers.values())

    def notify(self, events: Sequence[Facts]) -> None:
        """Put those of some events that are new into the outbox, for good, for all notifiers that want them,
        and have them sent."""
        new = {event["id"]: event for event in events if event["id"] not in self.outbox.known}
        self.outbox.write([event_record(event, self._who_hears(event)) for event in new.values()])
        self._wake()

    def _who_hears(self, event: Facts) -> List[str]:
        """Return the ids of the notifiers that want an event, and whose `where` is true of its run. Where
        nobody can tell, it is for all: rather one message too many."""
        items = [item for item in self._notifiers.values() if item.wants(event["event"])]
        state = RUNNING if event["event"] == LOG else event.get("run.state")
        if state and any(item.where for item in items):
            with contextlib.suppress(Exception):  # whatever the run wrote
                run = RunState(event["run.hash"])
                with contextlib.suppress(FileNotFoundError):  # Aim's
                    run = skim_log(self._paths, event["run.hash"])
                row = {**run_row(run), "state": state}
                asked = [item for item in items if item.where and not item.problem]
                no = [item for item in asked if not Query(item.where).test(row, None)]
                items = [item for item in items if item not in no]
        return [item.id for item in items]

    def _wake(self) -> None:
        for thread in list(self._threads.values()):
            thread.woken.set()

    def alarm(self, event: Facts) -> None:
        """Send every notifier an event that cannot be put into the outbox, since the disk does not answer."""
        self.outbox.apply(event_record(event, list(self.usable)))
        self._wake()

    def note(self, notifier_id: str, problem: str, *also: Dict[str, Any]) -> None:
        """Record why a notifier does not work, or "" where it does, and `also` other records; notify the
        others, once, when it ceases to work, and when it works again."""
        # All who read the folder read this. A word such as invalid_token helps; the rest of an answer is
        # kept in the log of who watches.
        problem = re.sub(r"(HTTP \d+): (?![a-z_]{1,30}$).*", r"\1", problem)
        known, since = self.outbox.broken.get(notifier_id, ("", round(time.time(), 3)))
        records, item = [*also], self._notifiers.get(notifier_id)
        if problem != known:
            records.append({"broken": notifier_id, "reason": problem, "since": since})
        if item is not None and bool(problem) != bool(known):
            what = f"does not work: {problem}; what waits for it is kept until it is mended"
            reason = printable(f"notifier {item.type} {item.shown_as} {what if problem else 'works again'}")
            event_id = f"{BROKEN}-{notifier_id}-{time.time():.3f}"
            event = trouble(event_id, self._paths.root, reason, look="notifiers list")
            records.append(event_record(event, [one for one in self._notifiers if one != item.id]))
        if records:
            self.outbox.write(records)
            self._wake()

    def is_behind(self) -> bool:
        """True until everything was sent or tried once."""
        return any(thread.batch() and not thread.failures for thread in self._threads.values())

    def stop(self, limit_s: float) -> None:
        """End the threads; what is in flight for longer than `limit_s` seconds is sent again."""
        deadline = time.monotonic() + limit_s
        for thread in self._threads.values():
            thread.stopping = True
        self._wake()
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        end_programs()


# ======================================================================================
# Watcher: which runs are silent
#
# Whether a run is stalled is a function of what was seen, of how long the watcher has looked, and
# of the grace; no clock of another machine takes part. Pure: no file, no clock. A poll costs one
# listing and what changed since the last.
# ======================================================================================

#: The state in which a check-in's flag leaves its run.
FLAG_STATES = {STARTING: RUNNING, CHECK_IN: RUNNING, FINISHED: FINISHED, FAILED: FAILED}
#: The states in which a run's process should be there.
LIVE = (RUNNING, STALLED)


def bounded(value: Any) -> float:
    """Return a number of seconds from watcher.json; 0 for anything that no watcher has written there."""
    return float(value) if type(value) in (int, float) and 0 <= value <= 1e10 else 0.0


#: A gap of more than this, and nobody is accused until the watcher has looked for another while. A listing
#: that takes longer was no looking: it waited for the file system.
GAP_S, HOLD_S = 10.0, 30.0


class LookingClock:
    """Seconds for which the watcher has been looking at the repository.

    Advances only while it looks: what exceeds the time that a step can honestly take was a gap
    (the process suspended, the machine asleep, the share gone), and a gap is nobody's silence.
    """

    def __init__(self, grace_s: float) -> None:
        self.total_s = 0.0
        self.hold_until_s = 0.0
        self._hold_s = min(grace_s, HOLD_S)
        self._last_mono = math.inf

    def look(self, now_mono: float, at_most_s: float) -> bool:
        """Count the time since the last call; False where what exceeds `at_most_s` was a gap."""
        passed = max(0.0, now_mono - self._last_mono)
        self._last_mono = now_mono
        self.total_s += min(passed, at_most_s)
        self.gap(passed - at_most_s)
        return passed <= at_most_s

    def gap(self, seconds: float) -> None:
        """Note that the watcher did not look for that long: who could not read could often not be written
        to, so nobody is accused for a while."""
        if seconds > GAP_S:
            self.hold_until_s = self.total_s + self._hold_s


#: So many stalls within so long, and a run flaps: it gets more grace until it has not stalled for long.
FLAP_STALLS, FLAP_WINDOW_S, FLAP_GRACE_S, FLAP_LASTS_S = 3, 3600.0, 900.0, 3 * 3600.0
#: A live run's marker is looked at when nothing new came from it for so long, and then so often. Its process
#: is gone where the marker was free so long ago, and is now.
QUIET_S, MARKER_EVERY_S, CONFIRM_S = 5.0, 10.0, 5.0
#: A marker that says nothing is looked at this often.
SILENT_MARKER_EVERY_S = 120.0


class WatchedRun:
    """What the watcher knows of one run; times in `_s` are on its looking clock."""

    def __init__(self, check_in: CheckIn, name: str, now_s: float, now_utc: float) -> None:
        self.hash = check_in.run_hash
        #: When it stalled, the newest last. The last of a flapping run: when it last was silent too long.
        self.stalls: List[float] = []
        #: Which rank of which group it is, once that was read.
        self.member: Optional[Member] = None
        #: When its marker is to be looked at, whether it was ever found locked, which at first sight too says
        #: that locks are seen here, and since when it was free: nothing where a check-in came later.
        self.look_s, self.was_held, self.free_s = now_s, False, -1.0
        self.take(check_in, name, now_s, now_utc)

    def take(self, check_in: CheckIn, name: str, now_s: float, now_utc: float) -> None:
        """Note a newer check-in, seen now, and the state that it means."""
        _, self.idx, flag, self.utc, self.promise_s = check_in
        self.state, self.name = FLAG_STATES[flag], name
        self.since_s, self.since_utc = now_s, now_utc or float(self.utc)

    def flaps_at(self, at_s: float) -> bool:
        """True from the third stall within an hour until it has not stalled for long."""
        return len(self.stalls) == FLAP_STALLS and at_s - self.stalls[-1] < FLAP_LASTS_S

    def note_stall(self, now_s: float) -> str:
        """Note that it is stalled now; return what its earlier stalls add to the message."""
        self.state, flaps = STALLED, self.flaps_at(now_s)
        earlier = [at_s for at_s in self.stalls[: FLAP_STALLS - 1] if flaps or now_s - at_s < FLAP_WINDOW_S]
        self.stalls = [*earlier, now_s]
        lasts, grace = human_s(FLAP_LASTS_S), human_s(FLAP_GRACE_S)
        text = f"it flaps: until it has not stalled for {lasts}, you hear of it {grace} later"
        return text if self.flaps_at(now_s) else ""

    def note_marker(self, state: str, now_s: float) -> bool:
        """Note what its marker looks like now; True where nobody holds it, now and a while ago."""
        self.was_held = self.was_held or state == "held"
        if state not in ("free", "absent"):
            self.free_s, self.look_s = -1.0, max(self.look_s, now_s + MARKER_EVERY_S)
            return False
        if self.free_s < self.since_s:
            self.free_s = now_s
        self.look_s = self.free_s + CONFIRM_S
        return now_s >= self.look_s

    def to_list(self) -> List[Any]:
        """Return what watcher.json keeps."""
        numbers = [round(number, 3) for number in (self.since_s, self.since_utc, self.free_s, *self.stalls)]
        return [self.name, *numbers[:2], self.state, self.was_held, *numbers[2:]]

    @classmethod
    def from_list(cls, values: List[Any]) -> WatchedRun:
        """Read back what `to_list` gave. Raises what is MALFORMED for most other things."""
        name, since_s, since_utc, state, was_held, free_s, *stalls = values
        check_in = parse_check_in(name)
        if check_in is None or state not in KINDS:
            raise ValueError(f"{name!r}, {state!r}: not a run")
        watched = cls(check_in, name, float(since_s), float(since_utc))
        watched.state, watched.was_held, watched.free_s = state, bool(was_held), float(free_s)
        watched.stalls = [float(at_s) for at_s in stalls]
        return watched


class Change(NamedTuple):
    """A change to alert: of which run, what, after how many seconds of silence, from what state, and
    what else there is to say of it."""

    kind: str
    run: WatchedRun
    silent_s: float
    old_state: Optional[str]
    #: Why it failed, where its log does not say; or what else there is to say.
    note: str = ""
    suffix: str = ""
    #: Of a group of ranks: the run that stands for all.
    visible: str = ""


def changes_to_alert(
    run: WatchedRun, old_state: Optional[str], silent_s: float, note: str = "", suffix: str = ""
) -> List[Change]:
    """Return what is alerted when a run has come into its state, or begins anew in it."""
    kinds = [RECOVERED] if old_state in (STALLED, FAILED) else []
    if run.state in (STALLED, FAILED):
        kinds = [run.state]
    elif run.state == RUNNING:
        kinds = kinds or [STARTED]
    elif old_state != FINISHED:
        kinds.append(FINISHED)
    return [Change(kind, run, silent_s, old_state, note, suffix) for kind in kinds]


class RunTable:
    """The state of every run, from listings of `check_ins`."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.runs: Dict[str, WatchedRun] = {}
        #: Names that state nothing, for the caller to say so once.
        self.reported: List[str] = []
        self.names: Set[str] = set()
        self._missing: Set[str] = set()
        #: No run is overdue before this moment.
        self.next_s = math.inf

    def restore(self, watched: WatchedRun) -> None:
        """Take in what an earlier watcher knew."""
        self.runs[watched.hash] = watched
        self.names.add(watched.name)
        self.next_s = -math.inf

    def deadline_s(self, watched: WatchedRun) -> float:
        """Return when, on the looking clock, a run's silence is too long; never for no promise."""
        if watched.state != RUNNING or not watched.promise_s:
            return math.inf
        deadline_s = watched.since_s + watched.promise_s + self.grace_s
        if watched.flaps_at(deadline_s):
            deadline_s += FLAP_GRACE_S
        # What may be dead is not called stalled.
        return max(deadline_s, watched.free_s + 2 * CONFIRM_S if watched.free_s >= watched.since_s else 0.0)

    def take(self, listing: Iterable[str], now_s: float, now_utc: float) -> List[Change]:
        """Compare a listing with the last one and return what changed. `now_utc`: when a new name in it came
        (UTC seconds), for people, or 0 where nobody was looking then."""
        names = set(listing)
        fresh = names - self.names
        self.names = names
        changes: List[Change] = []
        for name in sorted(fresh, reverse=True):  # of several names of one run, the newest first
            check_in = parse_check_in(name)
            if check_in is None or check_in.flag not in FLAG_STATES:
                if check_in is None or check_in.flag not in AIM_ONLY_FLAGS:
                    self.reported.append(name)
                continue
            run = check_in.run_hash
            watched, old_state, silent_s = self.runs.get(run), None, 0.0
            # Numbers begin anew where the check-in with the higher one is gone.
            if watched is not None and check_in.idx <= watched.idx and watched.name in names:
                continue
            if watched is None:
                watched = self.runs[run] = WatchedRun(check_in, name, now_s, now_utc)
            else:
                old_state, silent_s = watched.state, now_s - watched.since_s
                watched.take(check_in, name, now_s, now_utc)
                watched.look_s = max(watched.look_s, now_s + QUIET_S)
            if now_s + watched.promise_s < self.next_s:
                self.next_s = min(self.next_s, self.deadline_s(watched))
            # Nearly every new name is a heartbeat of a running run: what that costs is what a poll costs.
            if old_state != RUNNING or check_in.flag != CHECK_IN:
                changes += changes_to_alert(watched, old_state, silent_s)
                watched.member = None  # another process may have gone on with it
                if watched.state in (FINISHED, FAILED):
                    watched.stalls = []
        return changes

    def forget_missing(self) -> None:
        """Forget the runs whose check-in is not there, nor was at the last call, as after `close`. A single
        listing may miss one that is just being renamed."""
        missing = {run for run, watched in self.runs.items() if watched.name not in self.names}
        for run in missing & self._missing:
            del self.runs[run]
        self._missing = missing

    def overdue(self, now_s: float) -> List[Change]:
        """Return the runs whose silence became too long by `now_s`; they are stalled now."""
        changes: List[Change] = []
        if now_s >= self.next_s:
            for watched in self.runs.values():
                if self.deadline_s(watched) <= now_s and watched.name in self.names:
                    note = watched.note_stall(now_s)
                    changes.append(Change(STALLED, watched, now_s - watched.since_s, RUNNING, note))
            self.next_s = min(map(self.deadline_s, self.runs.values()), default=math.inf)
        return changes

    def to_look_at(self, now_s: float) -> List[WatchedRun]:
        """Return the live runs of which the marker is to be looked at now, the longest due first."""
        # Also before one is called stalled, unless its marker says nothing.
        soon_s = now_s + MARKER_EVERY_S * (now_s >= self.next_s)
        soon = [item for item in self.runs.values() if item.look_s <= soon_s and item.state in LIVE]
        due = [item for item in soon if item.look_s <= now_s or self.deadline_s(item) <= now_s]
        return sorted(due, key=lambda watched: watched.look_s)

    def suspects(self) -> bool:
        """True where a live run's marker was free at the last look, and may be so by chance."""
        return any(item.state in LIVE and item.free_s >= item.since_s for item in self.runs.values())


#: How often at most people are reminded of a stalled run.
MAX_REMINDERS = 10


def reminders(runs: Iterable[WatchedRun], last_s: float, now_s: float, every_s: float) -> Iterator[Change]:
    """Yield the reminder of each stalled run that became due after `last_s`, the newest alone."""
    for watched in runs:
        if watched.state == STALLED and watched.stalls:
            since_s = watched.stalls[-1]
            before, number = (min(int((at_s - since_s) / every_s), MAX_REMINDERS) for at_s in (last_s, now_s))
            if before < number:
                note, suffix = f"reminder {number} of at most {MAX_REMINDERS}", f"-reminder-{number}"
                yield Change(STALLED, watched, now_s - watched.since_s, STALLED, note, suffix)


# ======================================================================================
# Watcher: what an alert says
#
# What is read of a run when there is something to say of it: its log, its lock, its stacks, its
# messages. Every read is bounded, and none follows a link.
# ======================================================================================


def describe_metrics(state: RunState) -> str:
    """Return the newest metrics of a run: `loss=0.12 (step 400, subset=train), ...`."""
    shown = []
    for series in sorted(state.series.values(), key=lambda item: -item.last_time)[:5]:
        if series.count:
            context = "".join(f", {key}={value}" for key, value in sorted(series.context.items()))
            shown.append(f"{series.name}={series.last:.6g} (step {series.last_step}{context})")
    return printable(", ".join(shown))


def describe_progress(state: RunState) -> str:
    """Return how much of a run is done: `45 %, about 2 h left`; "" where nobody knows."""
    try:
        part, elapsed_s = map(float, state.header["progress"])
        left_s = elapsed_s * (1 - part) / part
        units = [unit_s for unit_s in (86400, 3600, 60, 1) if left_s >= 1.5 * unit_s]
        return f"{part:.0%}, about {human_s(round(left_s / units[0]) * units[0])} left".replace("%", " %")
    except MALFORMED:
        return ""


def run_facts(paths: RepoPaths, run_hash: str) -> Facts:
    """Return what a run's own log says of it, as message fields; the hash alone for Aim's runs."""
    facts = {"run.hash": run_hash, "run.name": run_hash, "repo": paths.root}
    try:
        state = skim_log(paths, run_hash)
    except OSError:
        return facts
    known = {**state.header, **state.props}
    for field in ("name", "experiment", "host", "pid", "job", "user", "stdout", "rank", "world", "group"):
        if known.get(field) not in (None, ""):
            facts[f"run.{field}"] = printable(str(known[field]), 300 if field == "stdout" else 100)
    facts["look"] = f"show {run_hash}"
    facts["run.metrics"] = describe_metrics(state)
    facts["run.progress"] = describe_progress(state)
    end = state.header.get("signal") if state.end is None else state.end
    if state.end is not None:
        facts["run.state"] = state.end["end"]
    if isinstance(end, dict):
        reason = str(end.get("reason") or "").split("\n")
        if state.end is None:
            reason = [reason[0].replace("terminated by", "it got")]
        facts["run.reason"] = "\n".join(printable(line) for line in reason[:MAX_FACT_LINES])
        for field, most, width in (("frames", 6, 200), ("output", OUTPUT_LINES, OUTPUT_LINE)):
            lines = end.get(field)
            if isinstance(lines, list):
                facts[f"run.{field}"] = "\n".join(f"  {printable(str(one), width)}" for one in lines[-most:])
    return facts


def main_stack(paths: RepoPaths, run_hash: str) -> List[Tuple[str, str, str]]:
    """Return the file, line and function of each frame of the thread in which a run hangs, outermost first,
    from what its process left when it missed its promise; [] where it left nothing."""
    try:
        text = read_bounded(paths.stack(run_hash), 1 << 20).decode("utf-8", "replace")
    except OSError:
        return []
    thread = re.escape(text.partition("\n")[0].rpartition(" ")[2])
    found = re.search(rf"hread {thread} .*\(most recent call first\):\n((?:  .*\n)*)", text)
    stack = found[1] if found else ""
    return re.findall(r'^  File "(.*)", line ([0-9?]+) in (.*)$', stack, re.MULTILINE)[::-1]


def hanging_frames(paths: RepoPaths, run_hash: str) -> str:
    """Return the frames that say where a run's thread hangs, outermost first."""
    frames = main_stack(paths, run_hash)
    told = (frames[index] for index in telling_frames([file for file, _, _ in frames]))
    return "\n".join(f"  {printable(f'{file}:{line} in {name}', 200)}" for file, line, name in told)


def change_facts(paths: RepoPaths, change: Change) -> Facts:
    """Return the message fields for one change of a run's state."""
    watched = change.run
    facts = run_facts(paths, watched.hash)
    facts["event"], facts["run.state"] = change.kind, watched.state
    facts["run.last_seen"] = iso_time(watched.since_utc, "seconds")
    facts["run.promised"] = human_s(watched.promise_s) if watched.promise_s else ""
    facts["run.silent"] = human_s(change.silent_s)
    if change.kind == STALLED or change.suffix:
        facts["run.reason"] = "; ".join(filter(None, (facts.get("run.reason"), change.note)))
    elif change.kind == FAILED:
        facts["run.reason"] = change.note or facts.get("run.reason", "")
    if change.kind == STALLED:
        if lock_state(paths.marker(watched.hash)) == "held":
            facts["run.process"] = "alive"
        facts["run.frames"] = hanging_frames(paths, watched.hash)
    if change.visible:
        if not change.suffix:
            facts["run.reason"], facts["run.silent"] = change.note, ""
        visible = run_facts(paths, change.visible)
        for field in ("run.hash", "run.name", "run.metrics", "look"):
            facts[field] = visible.get(field, "")
    if change.kind == RECOVERED:
        how = "finished" if watched.state == FINISHED else "checked in again"
        after = "it had failed" if change.old_state == FAILED else f"{human_s(change.silent_s)} of silence"
        facts["run.reason"] = change.note or f"{how} after {after}"
        facts["run.frames"] = facts["run.output"] = ""
    return facts


def message_line(message: Dict[str, Any], at: str = "") -> str:
    """Return a log message on one line, with its time (`at`: in other words)."""
    level = logging.getLevelName(message["log"])
    params = f" {json.dumps(message['params'])}" if message.get("params") else ""
    return printable(f"{at or local_time(message['time'])} {level} {message['message']}{params}", 1000)


def message_facts(paths: RepoPaths, run_hash: str, messages: Sequence[Dict[str, Any]]) -> Facts:
    """Return the message fields for an event about log messages, of which the last are quoted."""
    lines = [f"  {message_line(item, iso_time(item['time'], 'seconds'))}" for item in messages[-10:]]
    if len(messages) > len(lines):
        lines.insert(0, "  ...")
    said = {"event": LOG, "run.reason": plural(len(messages), "message"), "run.messages": "\n".join(lines)}
    return {**run_facts(paths, run_hash), **said, "run.frames": "", "run.output": ""}


# ======================================================================================
# Watcher: groups of ranks
#
# Where one process of a distributed job hangs or dies, the others wait for it, and then fail. Their
# changes are alerted as one, the roll call: which rank was the first, and where, and what the others do.
# ======================================================================================

#: How long the first change of a group waits for those of the others.
ROLL_CALL_S = 30.0
#: What a rank that waits for the others has as its innermost function.
_WAITS = re.compile("(?i)wait|barrier|synchronize|all|reduce|gather|scatter|broadcast|send|recv")


class Member(NamedTuple):
    """Which rank of which group a run is, "" for none."""

    group: str = ""
    rank: int = 0
    host: str = ""


def where_it_hangs(paths: RepoPaths, run_hash: str) -> str:
    """Return the innermost place in the user's own files where a run hangs, with the innermost function that
    it has called from there: `train.py:88 main (all_reduce)`."""
    frames = main_stack(paths, run_hash)
    if not frames:
        return "an unknown place (no stack)"
    own = next((frame for frame in reversed(frames) if not _LIBRARY.search(frame[0])), frames[0])
    called = f" ({frames[-1][2]})" if own is not frames[-1] else ""
    return printable(f"{os.path.basename(own[0])}:{own[1]} {own[2]}{called}", 200)


class Groups:
    """Which runs belong together, and what has become of them that is not alerted yet."""

    def __init__(self, paths: RepoPaths, wait_s: float) -> None:
        self.paths = paths
        self._wait_s = wait_s
        #: By kind of change and group, as watcher.json keeps it: since when it waits for the others, and what
        #: was noted of which runs.
        self.waiting: Dict[str, Tuple[float, Dict[str, str]]] = {}

    def member(self, watched: WatchedRun) -> Member:
        """Return which rank a run is of."""
        if watched.member is None:
            watched.member = Member()
            with contextlib.suppress(OSError, *MALFORMED):  # of most runs, no rank is known
                header = skim_log(self.paths, watched.hash).header
                host = printable(str(header.get("host")), 100)
                watched.member = Member(str(header["group"]), int(header["rank"]), host)
        return watched.member

    def by_group(self, runs: Dict[str, WatchedRun]) -> Dict[str, Dict[int, WatchedRun]]:
        """Return by group and rank the runs that have not finished, the newest of each rank."""
        found: Dict[str, Dict[int, WatchedRun]] = collections.defaultdict(dict)
        for watched in sorted(runs.values(), key=lambda watched: watched.since_s):
            if watched.state != FINISHED and self.member(watched).group:
                found[self.member(watched).group][self.member(watched).rank] = watched
        return {group: dict(sorted(members.items())) for group, members in found.items()}

    def whole(self, some: Set[str], runs: Dict[str, WatchedRun]) -> Set[str]:
        """Return some runs and all that are in a group with one of them."""
        groups = {self.member(runs[run]).group for run in some & runs.keys()} - {""}
        members = self.by_group(runs) if groups else {}
        return some.union(watched.hash for group in groups for watched in members.get(group, {}).values())

    def gather(self, changes: Sequence[Change], runs: Dict[str, WatchedRun], now_s: float) -> List[Change]:
        """Return what is to be alerted now: of the changes of ranks, one for each group when all that take
        part in it are there, or have been waited for."""
        alerted, spoken = [], set()
        of_ranks = self.waiting or any(self.member(change.run).group for change in changes)
        groups = self.by_group(runs) if of_ranks else {}
        for change in changes:
            member = self.member(change.run)
            key, members = f"{change.kind} {member.group}", groups.get(member.group, {})
            if not member.group:
                alerted.append(change)
            elif change.kind in (STALLED, FAILED) and not change.suffix:
                self.waiting.setdefault(key, (now_s, {}))[1][change.run.hash] = change.note
            elif key not in spoken and self._speaks(change, member, members):
                spoken.add(key)
                visible = members.get(0, change.run).hash
                alerted.append(change._replace(visible=visible))
        for key, (since_s, notes) in list(self.waiting.items()):
            kind, _, group = key.partition(" ")
            members = groups.get(group, {})
            running = [watched for watched in members.values() if watched.state == RUNNING]
            hang = [watched for watched in running if os.path.exists(self.paths.stack(watched.hash))]
            others = [watched for watched in members.values() if watched.state in LIVE]
            if kind == STALLED:
                others = [watched for watched in running if watched not in hang]
            if others and now_s - since_s < self._wait_s:
                continue
            del self.waiting[key]
            parts = [watched for watched in members.values() if watched.hash in notes]
            if kind == STALLED:
                stalled = [watched for watched in members.values() if watched.state == STALLED]
                # Where some had stalled before, that the group stalls was alerted then.
                parts = stalled + hang if stalled and all(one in parts for one in stalled) else []
            if parts:
                first, text = self._say_stalled(parts) if kind == STALLED else self._say_failed(parts, notes)
                text += self._say_of_others([watched for watched in members.values() if watched not in parts])
                visible = members.get(0, first).hash
                alerted.append(Change(kind, first, now_s - first.since_s, RUNNING, text, visible=visible))
        return alerted

    def _speaks(self, change: Change, member: Member, members: Dict[int, WatchedRun]) -> bool:
        """Return whether a change of a rank is alerted that is neither a new stall nor a new failure."""
        if change.kind == RECOVERED and change.old_state == STALLED:
            if change.run.hash in self.waiting.get(f"{STALLED} {member.group}", (0.0, {}))[1]:
                return False  # that it had stalled was not alerted either
            return all(watched.state != STALLED for watched in members.values())
        return member.rank == 0 or change.kind not in (STARTED, FINISHED)

    def _say_of_others(self, others: List[WatchedRun]) -> str:
        text = ""
        for state in dict.fromkeys(watched.state for watched in others):
            ranks = self._name(watched for watched in others if watched.state == state)
            text += f"; {ranks} " + ("still running" if state == RUNNING else f"{state} before")
        return text

    def _name(self, runs: Iterable[WatchedRun]) -> str:
        """Return `rank 3`, or `ranks 0-2 and 4-7`."""
        ranks, texts = sorted(self.member(watched).rank for watched in runs), []
        for _, group in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
            row = [str(rank) for _, rank in group]
            texts += [f"{row[0]}-{row[-1]}"] if len(row) > 2 else row
        named = " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))
        return f"{'rank' if named.isdigit() else 'ranks'} {named}"

    def _say_stalled(self, parts: List[WatchedRun]) -> Tuple[WatchedRun, str]:
        places: Dict[str, List[WatchedRun]] = {}
        for watched in sorted(parts, key=lambda watched: watched.since_s):
            places.setdefault(where_it_hangs(self.paths, watched.hash), []).append(watched)
        # The one that stopped is where the fewest are, not in a function that waits, and silent the longest.
        order = sorted(places, key=lambda place: (len(places[place]), bool(_WAITS.search(place))))
        first = places[order[0]].pop(0)
        at = time.strftime("%H:%M:%S", time.localtime(first.since_utc))
        if len(parts) > len(places) == 1:
            why = "none differs: the network or a device is the likelier cause"
            return first, f"{self._name(parts)} are in {order[0]} (since {at}); {why}"
        text = f"{self._name([first])} on {self.member(first).host} stopped first ({at}), in {order[0]}"
        for place in filter(places.get, order):
            waits = "wait" if len(places[place]) > 1 else "waits"
            text += f"; {self._name(places[place])} {waits} in {place}"
        return first, text

    def _say_failed(self, parts: List[WatchedRun], notes: Dict[str, str]) -> Tuple[WatchedRun, str]:
        why, when = dict(notes), dict.fromkeys(notes, 0.0)
        for watched in parts:
            with contextlib.suppress(OSError):
                end = skim_log(self.paths, watched.hash).end or {}
                why[watched.hash] = printable(str(end.get("reason") or notes[watched.hash]))
                when[watched.hash] = float(end.get("time") or 0.0)
        # A launcher ends the others with SIGTERM when one has failed.
        order = {run: (why[run].startswith("terminated by"), when[run]) for run in why}
        first, *others = sorted(parts, key=lambda one: order[one.hash])
        text = f"{self._name([first])} on {self.member(first).host}: {why[first.hash]}"
        for reason in dict.fromkeys(why[one.hash] for one in others):
            ranks = self._name(one for one in others if why[one.hash] == reason)
            text += f"; then {ranks}: {shorten(reason, 200, '...')}"
        return first, text


# ======================================================================================
# Watcher: the process
#
# take -> judge -> facts -> watcher.json -> outbox -> notifiers. What was seen and what is to be alerted
# of it are saved in one step, so that a watcher killed at any instruction loses no alert and repeats
# none: the next one finds both, or sees the same change again.
# ======================================================================================


def read_mutes(paths: RepoPaths) -> List[Tuple[str, int, str]]:
    """Return of each mute the run, its end (UTC seconds) and its file, the last last. Raises OSError."""
    found = []
    for name in names_in(paths.mutes, r"[A-Za-z0-9_]{1,64}-[0-9]{1,12}"):
        run, until = name.split("-")
        found.append((run, int(until), os.path.join(paths.mutes, name)))
    return sorted(found, key=lambda mute: mute[1])


def read_acks(paths: RepoPaths) -> Set[str]:
    """Return the names of the files in `mutes` that say that somebody has taken on a run; none where the
    folder cannot be read. They are named `<check-in>-<state>`, so that one is over as soon as either changes;
    whose file it is, that is who."""
    with contextlib.suppress(OSError):
        return set(names_in(paths.mutes, rf".+-({STALLED}|{FAILED})"))
    return set()


def read_watcher_file(paths: RepoPaths) -> Dict[str, Any]:
    """Return the content of watcher.json; {} where it is missing or damaged."""
    with contextlib.suppress(OSError):
        return json_object(read_bounded(paths.watcher, 64 << 20)) or {}
    return {}


def saved_runs(saved: Dict[str, Any]) -> Iterator[WatchedRun]:
    """Yield the runs that watcher.json knows."""
    runs = saved.get("runs")
    for values in runs if isinstance(runs, list) else ():
        with contextlib.suppress(*MALFORMED):
            yield WatchedRun.from_list(values)


DEFAULT_GRACE_S, DEFAULT_POLL_INTERVAL_S = 100.0, 1.0
#: watcher.json is written when its last writing was this many times its own cost ago.
SAVE_COST_FACTOR, MAX_SAVE_INTERVAL_S = 100.0, 10.0
#: What ends the name of a run's messages that the watcher took, until their alert is recorded.
TAKEN = ".taken"


class Watcher:
    """Watches one repository and alerts; `clock`, `utc` and `wait` are arguments for tests. With `seize`,
    also where another watcher holds the lock, which is taken for dead.

    Raises RepoError where another watcher holds the repository or its files cannot be written,
    ConfigError where the notifiers cannot be read.
    """

    def __init__(
        self,
        paths: RepoPaths,
        grace_s: float = DEFAULT_GRACE_S,
        poll_interval_s: float = DEFAULT_POLL_INTERVAL_S,
        once: bool = False,
        remind_every_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        utc: Callable[[], float] = time.time,
        wait: Callable[[float], Any] = time.sleep,
        seize: bool = False,
    ) -> None:
        self.paths = paths
        self.table = RunTable(grace_s)
        self.looking = LookingClock(grace_s)
        self.groups = Groups(paths, 0.0 if once else ROLL_CALL_S)
        self.poll_interval_s = poll_interval_s
        self._once = once
        self._remind_every_s = remind_every_s
        self._clock, self._utc, self._wait = clock, utc, wait
        #: What tells it from all others in watcher.json.
        self._id = {"host": this_host(), "boot": boot_id(), "pid": os.getpid(), "started_at": round(utc(), 3)}
        #: True once it watches no more.
        self.closed = False
        #: What tells the last watcher.json that this watcher wrote from one of another.
        self._saved_as: Any = None
        #: Of each muted run, the state that it had when it was muted, which is what people know.
        self._muted: Dict[str, str] = {}
        #: What is to be alerted and is not in the outbox yet.
        self._events: List[Facts] = []
        self._warn_once = functools.lru_cache(1000)(functools.partial(log.warning, "%s"))
        #: Called with each run that was found to have ended without a check-in that says so.
        self.on_dead: Callable[[str], None] = lambda run: None
        #: How many looks succeeded, and why the last one did not.
        self.looks, self.trouble = 0, ""
        self._reminded_s = self._swept_s = 0.0
        #: When watcher.json is written again at the earliest, and how long after the last time.
        self._save_mono, self._save_pause_s = -math.inf, 0.0
        self._lock = FileLock(paths.watcher_lock, flock=True)
        refuse_root(paths)
        try:
            paths.create()
            frozen = self._take_lock(seize)
            self._first = not os.path.exists(paths.watcher) and not os.path.exists(paths.outbox)
            self.outbox = Outbox(paths.outbox)
            self.dispatcher = Dispatcher(paths, self.outbox)
            self._restore()
            if frozen:
                reason = f"{frozen} holds the watch of {paths.root} and does not look: taken over from it"
                log.warning("%s", reason)
                self._events.append(trouble(f"seized-{utc():.2f}", paths.root, reason))
                # Where that cannot be written, the other one would not step down when it comes back.
                if not self._save(now=True):
                    raise RepoError(f"{paths.watcher} cannot be written, so that nobody can take over")
            self.dispatcher.load()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise RepoError(f"cannot use {error.filename or paths.own}: {error.strerror}") from None
            raise

    def _take_lock(self, seize: bool) -> str:
        """Take the lock; return who holds it where it is seized."""
        path, frozen = self.paths.watcher_lock, ""
        locked = self._lock.acquire(0.3)  # `status` takes it for a moment
        saved = read_watcher_file(self.paths)
        # Aim's watcher takes the other kind of lock alone.
        who = "Aim's watcher" if lock_state(path) == "free" else describe_watcher(saved)
        busy = f"{who} already watches {self.paths.root}"
        if locked is False and seize and lock_state(path) == "held":
            frozen = who
        elif locked is False:
            raise WatcherBusyError(busy)
        elif (locked is None or is_elsewhere(saved)) and SeenAt(self.paths).moves(self._wait):
            raise WatcherBusyError(f"{busy}, though its lock is not seen on this machine")
        with contextlib.suppress(OSError):
            owner = login_name(os.lstat(f"{path}.softlock").st_uid)
            may = "may watch too; remove it if that has ended"
            log.warning("%s.softlock is there: Aim's watcher (of user %s) %s", path, owner, may)
        return frozen

    def _restore(self) -> None:
        """Go on where the last watcher stopped; its looking counts, the time between does not."""
        saved, looking = read_watcher_file(self.paths), self.looking
        same_boot = saved.get("boot") == boot_id()
        try:
            looking.total_s = self._reminded_s = float(saved["looked_s"])
            looking.hold_until_s = float(saved["hold_until_s"])
            between_s = max(0.0, self._clock() - float(saved["mono"])) if same_boot else math.inf
            for watched in saved_runs(saved):
                watched.was_held = watched.was_held and same_boot
                self.table.restore(watched)
            self._muted = dict(saved["muted"])
            self._events = [{**item} for item in saved["events"]]
            for key, (since_s, notes) in dict(saved["groups"]).items():
                self.groups.waiting[key] = float(since_s), dict(notes)
        except MALFORMED:  # missing or damaged: of what it saw, the outbox knows what was alerted
            between_s = 0.0
        if not self._once:
            looking.gap(between_s)
        elif between_s < math.inf:
            looking.total_s += between_s

    def poll(self) -> None:
        """Look once, and alert what changed. Never raises for a repository that cannot be read, and
        WatcherBusyError where another watcher has taken over."""
        self._step_down()
        if not self._lock.held:
            with contextlib.suppress(OSError):
                self._lock.acquire()  # somebody who seemed dead held it
        before = self._clock()
        # Where somebody may be accused, not from a cache.
        if self.looking.total_s + self.poll_interval_s + 1 >= self.table.next_s:
            freshen(self.paths.check_ins)
        try:
            listing = list_below(self.paths.check_ins)
        except OSError as error:
            if not self.trouble:
                log.error("cannot list %s: %s", error.filename or self.paths.check_ins, error.strerror)
            self.trouble = error.strerror or type(error).__name__
            return
        if self.trouble:
            log.warning("%s can be read again", self.paths.check_ins)
            self.trouble = ""
        arrived = self.looking.look(before, self.poll_interval_s + 1) and self.looks > 0
        listed_s = self.looking.total_s
        self.looking.look(self._clock(), GAP_S)
        self.dispatcher.reload_if_changed()
        self._send()  # what the last watcher, or an error, left
        now_s, first, self._first = self.looking.total_s, self._first, False
        changes = self.table.take(listing, now_s, self._utc() if arrived else 0.0)
        if first:
            changes = []  # what was there before is no news
            for watched in self.table.runs.values():
                if watched.state in LIVE and lock_state(self.paths.marker(watched.hash)) != "held":
                    self._find_end(watched, now_s)
        if now_s >= self.looking.hold_until_s:
            changes += self._find_dead(now_s)
            changes += self.table.overdue(listed_s)
            if self._remind_every_s:
                runs = self.table.runs.values()
                changes += reminders(runs, self._reminded_s, now_s, self._remind_every_s)
            self._reminded_s = now_s
        for name in self.table.reported:
            shown = printable(repr(name), 120)
            self._warn_once(f"{self.paths.check_ins}: ignoring {shown}: not a check-in")
        self.table.reported.clear()
        muted = self.groups.whole(self._read_mutes(), self.table.runs)
        wanted = [item for item in self._unmuted(changes, muted) if self.dispatcher.wanted(item.kind)]
        if any(item.suffix for item in wanted):  # what was alerted before, unless somebody has taken it on
            acks = read_acks(self.paths)
            wanted = [x for x in wanted if not x.suffix or f"{x.run.name}-{x.run.state}" not in acks]
        alerted = self.groups.gather(wanted, self.table.runs, now_s)
        self._events = list(map(self._event, alerted))
        taken = self._take_messages(first, muted)
        self._send()
        for path, size in taken:
            # A run may have opened the file before it was taken, and written to it after it was read.
            with contextlib.suppress(OSError):
                if os.lstat(path).st_size <= size or size == MAX_MESSAGES_BYTES:
                    unlink_below(path)
        self._sweep()
        self.outbox.write()
        self.looking.look(self._clock(), GAP_S)
        self._save()
        self.looks += 1

    def _step_down(self) -> None:
        """Raise WatcherBusyError where watcher.json is another watcher's: that took this one for dead, or
        neither sees the other's lock."""
        found = file_stamp(self.paths.watcher)
        if self._saved_as in (None, found) or found is None:
            return
        saved = read_watcher_file(self.paths)
        if saved and not saved.get("ended") and not self._id.items() <= saved.items():
            raise WatcherBusyError(f"{describe_watcher(saved)} watches {self.paths.root} now")
        self._saved_as = found

    def _find_dead(self, now_s: float) -> List[Change]:
        """Return what has become of those runs that are due and that nobody writes any more."""
        changes, deadline = [], self._clock() + 0.05
        for watched in self.table.to_look_at(now_s):
            marker = lock_state(self.paths.marker(watched.hash))
            if marker == "absent" and not os.path.exists(self.paths.run_log(watched.hash)):  # Aim's
                watched.look_s, marker = now_s + SILENT_MARKER_EVERY_S, "unknown"
            if watched.note_marker(marker, now_s) and watched.name in self.table.names:
                changes += self._find_end(watched, now_s, marker == "free")
                if watched.state in LIVE:  # as where locks are seen on one machine alone
                    watched.free_s, watched.look_s = -1.0, now_s + SILENT_MARKER_EVERY_S
            if self._clock() >= deadline:
                break  # the others come first in the next poll
        return changes

    def _find_end(self, watched: WatchedRun, now_s: float, may_be_dead: bool = False) -> List[Change]:
        """Return what has become of a run, as its log says; that says also what its free marker means."""
        end = None
        with contextlib.suppress(OSError):  # Aim's run, or a share that is away
            state = skim_log(self.paths, watched.hash)
            end = state.end
            if end is None and may_be_dead and free_means_dead(state.header, watched.was_held):
                end = end_of_dead(state)
        if end is None:
            return []
        self.on_dead(watched.hash)
        old_state, watched.state, watched.stalls = watched.state, end["end"], []
        reason = printable(str(end.get("reason") or ""))
        return changes_to_alert(watched, old_state, now_s - watched.since_s, reason)

    def _unmuted(self, changes: Sequence[Change], muted: Set[str]) -> List[Change]:
        """Return of `changes` those that are to be alerted now: for the runs whose mute has ended, what
        became of them in the meantime instead."""
        runs = self.table.runs
        old_states = {change.run.hash: change.old_state or RUNNING for change in reversed(changes)}
        for run in muted & runs.keys() - self._muted.keys():
            self._muted[run] = old_states.get(run, runs[run].state)
        alerted = [change for change in changes if change.run.hash not in self._muted]
        for run in self._muted.keys() - muted:
            known, watched = self._muted.pop(run), runs.get(run)
            # Of a stall or a failure people may know, and are reminded.
            if watched is None or known == watched.state == RUNNING:
                continue
            silent_s, suffix = self.looking.total_s - watched.since_s, f"-muted-{self._utc():.3f}"
            alerted += changes_to_alert(watched, known, silent_s, "it was muted until now", suffix)
        return alerted

    def _read_mutes(self) -> Set[str]:
        """Return the runs that are muted now, and remove the files of mutes that are over."""
        try:
            mutes = read_mutes(self.paths)
        except OSError:
            return set(self._muted)  # a folder that cannot be read ends no mute
        now = self._utc()
        remove_all(file for _, until, file in mutes if until <= now)
        return {run for run, until, _ in mutes if until > now}

    def _take_messages(self, first: bool, muted: Set[str]) -> List[Tuple[str, int]]:
        """Make events of what runs logged since the last poll, but not at first sight. Return the files that
        were taken, with how much was read of each; they are removed when the events are in the outbox."""
        taken, names = [], []
        with contextlib.suppress(OSError):
            names = names_in(self.paths.news, rf"[A-Za-z0-9_]{{1,64}}({re.escape(TAKEN)})?")
        wanted, level = self.dispatcher.wanted(LOG) and not first, self.dispatcher.log_level
        for run in sorted({name.partition(".")[0] for name in names}):
            path = os.path.join(self.paths.news, run)
            try:
                if run + TAKEN not in names:
                    with folder_of(path) as (folder, name):
                        os.rename(name, name + TAKEN, src_dir_fd=folder, dst_dir_fd=folder)
                data = read_bounded(path + TAKEN, MAX_MESSAGES_BYTES)
            except OSError:
                continue  # the share is away, perhaps: tried again at the next poll
            taken.append((path + TAKEN, len(data)))
            found = filter(None, map(parse_message, data.splitlines(keepends=True)))
            messages = [message for message in found if message["log"] >= level]
            if messages and wanted and run not in muted:
                event_id = f"{run}-{len(data)}-{messages[-1]['time']:.3f}-{LOG}"
                self._events.append(self._dated(event_id, message_facts(self.paths, run, messages)))
        return taken

    def _send(self) -> None:
        """Put the events into the outbox, and wake who sends them."""
        if self._events:
            # Before the outbox has them: killed in between, the next watcher finds them here.
            self._save(now=True)
            self.dispatcher.notify(self._events)
            self._events = []

    def _event(self, change: Change) -> Facts:
        run = change.run
        # Changes of one check-in and kind are one event, unless a suffix parts them; `utc` tells two lives of
        # a run apart whose numbers begin anew.
        event_id = f"{run.hash}-{run.idx}-{run.utc}-{change.kind}{change.suffix}"
        try:
            facts = change_facts(self.paths, change)
        except Exception as error:  # whatever the run wrote, that it failed must be alerted
            log.error("run %s: %s: its alert says little", run.hash, type(error).__name__)
            facts = {"event": change.kind, "run.hash": run.hash}
        return self._dated(event_id, facts)

    def _dated(self, event_id: str, facts: Facts) -> Facts:
        known = {name: value for name, value in facts.items() if value}
        return {**known, "id": event_id, "time": iso_time(self._utc(), "seconds")}

    def _sweep(self) -> None:
        """Shorten the outbox, and remove check-ins of our runs that ended and were alerted a while ago."""
        now_s = self.looking.total_s
        if now_s - self._swept_s < 60.0 and not self._once:
            return
        self._swept_s = now_s
        self.table.forget_missing()
        if self._save(now=True):  # what is alerted is known from watcher.json alone from here on
            self.outbox.compact()
        runs = self.table.runs.values()
        acks = {f"{item.name}-{item.state}" for item in runs}
        remove_all(os.path.join(self.paths.mutes, name) for name in read_acks(self.paths) - acks)
        over = [item.hash for item in runs if now_s - item.since_s > KINDS[item.state].keep_s]
        ended = {run for run in over if os.path.exists(self.paths.run_log(run))}
        remove_all(map(self.paths.stack, ended))
        names = [name for name in self.table.names if name.partition("-")[0] in ended]
        remove_all(os.path.join(self.paths.check_ins, name) for name in names)

    def _save(self, now: bool = False, ended: bool = False) -> bool:
        """Write watcher.json, at a rate that its own cost bounds; True where that was done."""
        begun = self._clock()
        if begun < self._save_mono and not now:
            return False
        content = {
            **self._id,
            "ended": ended,
            "seen_at": round(self._utc(), 3),
            "mono": round(begun, 3),
            "save_interval_s": round(max(self.poll_interval_s, self._save_pause_s), 3),
            "once": self._once,
            "looked_s": round(self.looking.total_s, 3),
            "hold_until_s": round(self.looking.hold_until_s, 3),
            "muted": self._muted,
            "events": self._events,
            "groups": self.groups.waiting,
            "runs": [watched.to_list() for watched in self.table.runs.values()],
        }
        # As the file says; what this one costs counts from the next on.
        self._save_mono = begun + self._save_pause_s
        try:
            replace_file(self.paths.watcher, to_json(content).encode("ascii"))
            self._saved_as = file_stamp(self.paths.watcher)
        except OSError as error:
            self._warn_once(f"cannot write {self.paths.watcher}: {error.strerror}")
            return False
        self._save_pause_s = min((self._clock() - begun) * SAVE_COST_FACTOR, MAX_SAVE_INTERVAL_S)
        return True

    def close(self) -> None:
        """Save what was seen, give what is being sent a moment, and release the repository."""
        self.closed = True
        # After an error in a look the next watcher must see anew what that found; or another watches now.
        if not sys.exc_info()[0]:
            self._save(now=True, ended=True)
        self.dispatcher.stop(1.0)
        self.outbox.close()
        self._lock.release()

    def counts(self) -> Counter[str]:
        """Return how many runs are in each state."""
        return Counter(watched.state for watched in self.table.runs.values())


def is_elsewhere(saved: Dict[str, Any]) -> bool:
    """True where the last watcher is on another machine, whose locks may not be seen, and has not ended."""
    is_over = saved.get("ended") or saved.get("once") or not saved.get("pid")
    return not is_over and saved.get("host") != this_host()


#: A standby takes over from a watcher that has not looked for so long, and three intervals.
FROZEN_S = 120.0
#: How long is looked whether another watcher looks, beside two of its intervals, and at most.
LOOK_ON_S, MAX_LOOK_ON_S = 3.0, 60.0


class SeenAt:
    """Sees whether another watcher looks: whether the `seen_at` that it writes changes. Its clock says
    nothing of that, and on many mounts its lock does not either."""

    def __init__(self, paths: RepoPaths) -> None:
        self._paths = paths
        #: watcher.json as it was when that changed last.
        self._saved: Dict[str, Any] = {}
        self._since_mono = time.monotonic()

    def look(self, fresh: bool = True) -> Any:
        """Return what has changed when it looks again."""
        if fresh:
            freshen(self._paths.watcher)
        saved = read_watcher_file(self._paths)
        if saved.get("seen_at") not in (None, self._saved.get("seen_at")):
            self._saved, self._since_mono = saved, time.monotonic()
        return self._saved.get("seen_at")

    def intervals_s(self, count: int) -> float:
        """Return how long so many of its intervals take."""
        return count * (bounded(self._saved.get("save_interval_s")) or DEFAULT_POLL_INTERVAL_S)

    def moves(self, wait: Callable[[float], Any] = time.sleep) -> bool:
        """Look for two intervals whether it changes."""
        first = self.look()
        for _ in range(round(4 * min(self.intervals_s(2) + LOOK_ON_S, MAX_LOOK_ON_S))):
            wait(0.25)
            if self.look() != first:
                return True
        return False

    def is_frozen(self, fresh: bool = True) -> bool:
        """True where it has not changed for so long that its watcher is taken for dead."""
        self.look(fresh)
        looked = bool(self._saved) and not self._saved.get("ended")
        return looked and time.monotonic() - self._since_mono > FROZEN_S + self.intervals_s(3)


def describe_watcher(saved: Dict[str, Any]) -> str:
    """Return who the last watcher is, for people."""
    if not saved.get("pid"):
        return "another watcher"
    pid, host = printable(str(saved["pid"]), 20), printable(str(saved.get("host")), 100)
    return f"process {pid} on {host} (since {local_time(bounded(saved.get('started_at')))})"


# ======================================================================================
# Who watches the watcher
#
# Signs of life for those who would notice if the watcher itself died: systemd, and a dead-man's switch
# somewhere on the network; and an alarm for a watcher that does not see the repository. None of them
# can delay a poll.
# ======================================================================================


def sd_notify(text: str) -> None:
    """Tell systemd about this process, where it asked for that (sd_notify(3))."""
    import socket

    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in ("/", "@"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.setblocking(False)
            link.sendto(text.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


#: How often it is asked whether the watcher still sees the repository.
SIGHT_CHECK_S = 1.5


def watch_sight(watcher: Watcher, wait: Callable[[float], Any] = time.sleep) -> None:
    """Alert, once, when the watcher does not see the repository for a while: the share is away, or the look
    does not come back. What it alerts is in no outbox, since that lies on the share."""
    limit, root = math.ceil((HOLD_S + watcher.poll_interval_s) / SIGHT_CHECK_S), watcher.paths.root
    # How many checks have found no new look. While the process was stopped there was none.
    looks, blind_checks = watcher.looks, 0
    while not watcher.closed:
        wait(SIGHT_CHECK_S)
        was_blind, blind_checks = blind_checks >= limit, blind_checks + 1
        if watcher.looks != looks:
            looks, blind_checks = watcher.looks, 0
        if was_blind and not blind_checks:
            what = "can be read again; its runs are watched"
        elif blind_checks == limit:
            why = watcher.trouble or "the look does not come back: the file system hangs, or is very slow"
            what = f"cannot be read for {human_s(HOLD_S)} ({why}): no run in it is watched until it can"
        else:
            continue
        reason = f"the repository {root} {what}"
        log.error("%s", reason)
        watcher.dispatcher.alarm(trouble(f"sight-{time.time():.2f}", root, reason))


def ping(url: str, was_failing: bool = False) -> bool:
    """GET a URL behind which a dead-man's switch waits. Return whether that failed; the log says when it
    begins to fail, and when it works again."""
    notifier = Notifier("ping", "webhook", True, {"url": url}, (), None)
    outcome = try_once(notifier, lambda until: post("webhook", url, until))
    if (outcome.kind != SENT) != was_failing:
        state = "is reached again" if was_failing else "cannot be reached"
        log.warning("the ping URL %s: %s", state, outcome.detail)
    return outcome.kind != SENT


def ping_when(due: threading.Event, url: str) -> None:
    """Ping each time that `due` is set, in a thread of its own: no server delays a poll."""
    failing = False
    while due.wait():
        due.clear()
        failing = ping(url, failing)


# ======================================================================================
# Reindex thread
#
# Runs beside the poll and keeps the index up to date, one run at a time. It never waits for the
# index, so that whoever else wants it comes first, and its troubles never reach the watch.
# ======================================================================================

#: How often the thread looks for runs that recorded something; it rests so many times as long as it worked.
REINDEX_INTERVAL_S, REINDEX_REST_FACTOR = 5.0, 20.0


def keep_indexed(reindexer: Reindexer, stop: threading.Event) -> None:
    """Index pending runs until `stop` is set, in a thread of its own."""
    warn_once = functools.lru_cache(1000)(functools.partial(log.warning, "%s"))
    while not stop.is_set():
        begun = time.monotonic()
        try:
            for run_hash in reindexer.changed():
                if stop.is_set():
                    return
                reindexer.run([run_hash], wait_s=0.0)
        except (IndexBusy, IndexUnusable):
            pass  # somebody else indexes, or an empty index is there now; look again later
        except Exception as error:
            warn_once(f"reindexing: {type(error).__name__}: {error}")
        for problem in reindexer.problems:
            warn_once(problem)
        reindexer.problems.clear()
        stop.wait(max(REINDEX_INTERVAL_S, (time.monotonic() - begun) * REINDEX_REST_FACTOR))


# ======================================================================================
# Runs without code
#
# `aimwatch exec -- command` runs any program as a run. Bytes, terminal, signals and exit status are the
# program's own: what is done for the run is done beside it, by a thread that may fail or hang.
# ======================================================================================

#: Two signals of a kind within this time are one, sent to `exec` and to the program.
SAME_SIGNAL_S = 0.5
FORWARDED = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}
FORWARDED |= {signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT}


class Program:
    """A program that runs as if its user had started it, and the copying of what it writes.

    It stays in the session and group of this process, and in its terminal: the kernel sends it what is typed
    there, and Ctrl-Z stops all of them. What it writes goes through a terminal where standard output is one.
    """

    def __init__(self) -> None:
        self.pid, self.wrote_mono = 0, -math.inf
        #: As Popen gives it; the errno where its output could not be written; the last of that.
        self.status, self.unwritten, self.output = 0, 0, b""
        #: By where output comes from: where it goes, and what of it was read and is not written.
        self.targets: Dict[int, int] = {}
        self._waiting: Dict[int, memoryview] = {}

    def start(self, argv: Sequence[str], environ: Dict[str, str]) -> None:
        """Start it with this environment. Raises OSError."""
        import subprocess
        import tty

        ends: Dict[int, int] = {}
        # Of two pipes to one file, the order of what is written would be lost.
        is_one = os.path.sameopenfile(1, 2) or (os.isatty(1) and os.isatty(2))
        for fd in (1,) if is_one else (1, 2):
            source, ends[fd] = os.openpty() if os.isatty(fd) else os.pipe()
            self.targets[source] = fd
            if os.isatty(fd):  # which does itself what is to be done with what is written to it
                tty.setraw(ends[fd])
        self._fit()
        how: Dict[str, Any] = {"env": environ, "stdout": ends[1], "stderr": ends.get(2, ends[1])}
        try:
            self._process = subprocess.Popen(argv, close_fds=False, **how)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            # As every shell does, a script without `#!` is given to `sh`.
            self._process = subprocess.Popen(["/bin/sh", *argv], close_fds=False, **how)
        finally:
            for fd in ends.values():
                os.close(fd)
        self.pid = self._process.pid

    def _fit(self) -> None:
        """Give the program's terminal the size of the one that shows what is written to it."""
        import termios

        for source, target in self.targets.items():
            with contextlib.suppress(OSError):  # a pipe has no size
                size = fcntl.ioctl(target, termios.TIOCGWINSZ, bytes(8))
                fcntl.ioctl(source, termios.TIOCSWINSZ, size)

    def copy(self, others: Sequence[int], wait_s: Optional[float]) -> List[int]:
        """Copy what can be copied without waiting for more, once there is any or one of `others` can be read.
        Return the descriptors that were ready."""
        import select

        full = {target: source for source, target in self.targets.items() if self._waiting.get(source)}
        sources = self.targets.keys() - full.values()
        readable, writable, _ = select.select([*others, *sources], list(full), [], wait_s)
        for source in sources.intersection(readable):
            data = b""
            with contextlib.suppress(OSError):  # so ends a terminal that nobody has open any more
                data = os.read(source, 1 << 16)
            if data:
                self.wrote_mono = _monotonic()
                self.output = (self.output + data)[-(1 << 14) :]
                self._waiting[source] = memoryview(data)
            else:
                os.close(source)
                del self.targets[source]
        for target in writable:
            source = full[target]
            try:
                while self._waiting[source] and select.select([], [target], [], 0)[1]:
                    # A pipe takes so much without blocking, so that signals need not wait for its reader.
                    written = os.write(target, self._waiting[source][: select.PIPE_BUF])
                    self._waiting[source] = self._waiting[source][written:]
            except BlockingIOError:  # another program made it non-blocking, and filled it
                pass
            except OSError as error:
                os.close(source)  # which the program notices when it writes on
                del self.targets[source], self._waiting[source]
                if error.errno != errno.EPIPE:
                    self.unwritten = error.errno or errno.EIO
        return readable + writable

    def wait(self, caught: int, caught_by_exec: int, on_hand_over: Callable[[], None]) -> None:
        """Copy, and pass on the signals that only `exec` caught, until the program has ended and its output
        is written. Both descriptors give the numbers of signals, one a byte."""
        due: Dict[int, float] = {}
        seen: Dict[int, float] = {}
        while self._process.poll() is None:
            wait_s = max(0.0, min(due.values()) - _monotonic()) if due else None
            ready = self.copy([caught, caught_by_exec], wait_s)
            now = _monotonic()
            for number in os.read(caught, 4096) if caught in ready else b"":
                if number == HAND_OVER:
                    on_hand_over()
                elif number == signal.SIGWINCH:
                    self._fit()
                    due[number] = now  # it may have asked for the size before it was right
                else:
                    seen[number] = now
            for number in os.read(caught_by_exec, 4096) if caught_by_exec in ready else b"":
                due.setdefault(number, now + SAME_SIGNAL_S)
            for number in [number for number, at in due.items() if at <= now]:
                if seen.get(number, -math.inf) < due.pop(number) - 2 * SAME_SIGNAL_S:
                    self._process.send_signal(number)
        self.status = self._process.returncode
        while self.targets and self.copy([], None if any(self._waiting.values()) else 0.0):
            pass


def last_lines(output: bytes) -> List[str]:
    """Return the last lines that are not empty, as a terminal would show them, for people to read."""
    text = _ESCAPE.sub("", output.decode("utf-8", "replace"))
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [printable(line, OUTPUT_LINE) for line in lines if line.strip()][-OUTPUT_LINES:]


def cpu_seconds(program: int) -> float:
    """Return the processor time that a process, and all that it started, has used; 0 without /proc."""
    children: Dict[int, List[int]] = {}
    used: Dict[int, int] = {}
    for name in names_in("/proc", "[0-9]+"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
            fields = process_stat(name)
            children.setdefault(int(fields[1]), []).append(int(name))
            used[int(name)] = sum(map(int, fields[11:15]))  # also of its children that have ended
    found = [program]
    for pid in found:
        found += children.get(pid, ())
    return sum(used.get(pid, 0) for pid in found) / os.sysconf("SC_CLK_TCK")


def count_oom_kills() -> int:
    """Return how many processes of this control group were killed for want of memory, as far as is known."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = read_bounded("/proc/self/cgroup", 1 << 16).decode().rpartition("0::")[2].strip()
        events = read_bounded(f"/sys/fs/cgroup{group}/memory.events", 1 << 16)
        return int(dict(map(bytes.split, events.splitlines()))[b"oom_kill"])
    return 0


def program_end(status: int, oom_kills: int, unwritten: int = 0) -> Tuple[int, str]:
    """Return the exit code of a program as a shell gives it, and why it failed; "" where it did not.
    `status`: as Popen gives it, for a signal its number, negative.
    `oom_kills`: how many processes were killed meanwhile since memory ran out, as far as is known.
    `unwritten`: the errno where its output could not be written; it may have ended without noticing."""
    code, reason = status, f"exited with status {status}" if status else ""
    if status < 0:
        # Of the real-time signals only the first and the last have a name.
        name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
        code, reason = 128 - status, f"was killed by {name}"
    if code and oom_kills:
        reason += f" (out of memory: the oom_kill count of its control group rose by {oom_kills})"
    elif code == 128 + signal.SIGKILL:
        reason += " (out of memory?)"
    if unwritten:
        reason += f"{'; ' * bool(reason)}its output could not be written: {os.strerror(unwritten)}"
    return code or int(bool(unwritten)), reason


class ProgramReporter(threading.Thread):
    """Holds the run of a program while that does not hold it itself: reports progress when the program
    writes or computes, and how it ended. In a thread, since a share that hangs must not keep the program
    from its bytes and signals."""

    def __init__(self, program: Program, open_run: Callable[[], Run], expect: Union[float, str]) -> None:
        import queue

        super().__init__(daemon=True)
        self.program, self._open_run, self._expect = program, open_run, expect
        #: How long the program is silent before its processor time is asked for.
        self._cpu_after_s = min(15.0, float(expect) / 4) if expect and expect != AUTO else 15.0
        #: How the program ended, or None: it asks for its run.
        self.said: Any = queue.SimpleQueue()
        self._opened = threading.Event()
        self._run: Any = None
        self._holds, self._free_looks = False, 0
        self._alive_mono, self._cpu, self._cpu_mono = 0.0, 0.0, _monotonic()

    def environ(self) -> Dict[str, str]:
        """Open the run, and return what lets the program join it; {} where it does not open."""
        self.start()
        self._opened.wait(1.0)
        run = self._run
        return {"AIMWATCH_RUN": run.hash, "AIMWATCH_REPO": run._paths.root} if run is not None else {}

    def finish(self, end: End) -> None:
        """Say how the program ended, and wait until that is recorded, but not for ever."""
        self.said.put(end)
        self.join(10.0)

    def run(self) -> None:
        import queue

        try:
            self._take()
        except Exception as error:  # whatever it is, the program runs
            what = error if isinstance(error, AimwatchError) else describe_exception(error)
            log.warning("exec: the program runs, and nobody watches it: %s", what)
            return
        finally:
            self._opened.set()
        end = None
        while end is None:
            try:
                end, asked = self.said.get(timeout=1.0), True
            except queue.Empty:
                asked = False
            with contextlib.suppress(AimwatchError, OSError):
                if end is None:
                    self._look(asked)
                else:
                    self._finish(end)

    def _take(self) -> None:
        self._run = self._open_run()
        self._holds, self._alive_mono = True, _monotonic()
        self._run.report_progress(expect_next_in=self._expect)

    def _look(self, asked: bool) -> None:
        if not self._holds:
            is_free = lock_state(self._run._marker.path) in ("free", "absent")
            self._free_looks = self._free_looks + 1 if is_free else 0
            if self._free_looks > 1:  # one that has just let it go may be about to exit
                self._take()
        elif asked:
            self._run._close_files()
            self._holds, self._free_looks = False, 0
        elif self._is_alive(_monotonic()):
            self._run.report_progress(expect_next_in=self._expect)

    def _is_alive(self, now: float) -> bool:
        if self.program.wrote_mono > self._alive_mono:
            self._alive_mono = now
            return True
        if now - max(self._alive_mono, self._cpu_mono) < self._cpu_after_s:
            return False
        before, before_mono = self._cpu, self._cpu_mono
        self._cpu, self._cpu_mono = cpu_seconds(self.program.pid), now
        return self._cpu - before > 0.05 * (now - before_mono)

    def _finish(self, how: End) -> None:
        if not self._holds:
            end = read_log(self._run._log.path, self._run.hash).end
            said = end is not None and (end["end"] == FAILED or how.flag == FINISHED)
            if said or lock_state(self._run._marker.path) == "held":
                return  # by what the program left behind
            self._take()
        self._run._end(how)
        self._run.close()


def run_program(argv: Sequence[str], open_run: Callable[[], Run], expect: Union[float, str]) -> int:
    """Run a program as the run that `open_run` returns, and return its exit code.

    Another process does this, so that the program, its output and its run do not need this one. That process
    gets the signals, too, that all processes of a job are sent; those that it does not get are passed on.
    """
    caught_by_exec = catch(number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN)
    result, tells = os.pipe()
    if os.fork() == 0:
        try:
            keep_program(argv, ProgramReporter(Program(), open_run, expect), caught_by_exec, tells)
        finally:
            os._exit(1)
    os.close(tells)
    code = os.read(result, 1)
    return code[0] if code else 128 + signal.SIGKILL


def catch(numbers: Iterable[int]) -> int:
    """Catch signals; return a descriptor that gives the number of each that came, one a byte."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return reader


def keep_program(argv: Sequence[str], reporter: ProgramReporter, caught_by_exec: int, tells: int) -> None:
    """Run a program to its end, write its exit code to `tells`, and copy what it left behind writes."""
    program = reporter.program
    caught = catch([signal.SIGCHLD, signal.SIGWINCH, HAND_OVER])
    kills_before = count_oom_kills()
    try:
        program.start(argv, {**os.environ, **reporter.environ()})
    except OSError as error:
        is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        code, reason = 127 if is_missing else 126, f"cannot start: {error.strerror}"
    else:
        program.wait(caught, caught_by_exec, lambda: reporter.said.put(None))
        kills = count_oom_kills() - kills_before
        code, reason = program_end(program.status, kills, program.unwritten)
    if not program.pid or program.unwritten:
        log.error("exec: %s: %s", argv[0], reason)
    lines = last_lines(program.output)
    reporter.finish(End(FAILED, reason, output=lines) if reason else End(FINISHED))
    with contextlib.suppress(OSError):  # `exec` was killed
        os.write(tells, bytes([code]))
    while program.targets:  # what it left behind may write on
        program.copy([], None)


# ======================================================================================
# The page
#
# `up`: what status, runs and show say, for browsers and for a cluster's monitoring. GET and HEAD alone,
# and nothing is changed by them. `html` is the one place where a value becomes HTML. Charts are SVG, made
# here from the smallest and the largest value of each pixel column. No page needs JavaScript.
# ======================================================================================

#: How many runs and charts a page shows, and how many runs are compared.
PAGE_RUNS, PAGE_CHARTS, MOST_COMPARED = 100, 12, 20
#: Marks states by shape, so that nobody depends on colours.
_SHAPES = {FAILED: "\u2716", STALLED: "\u25b2", RUNNING: "\u25cf", FINISHED: "\u2713"}
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})


class Html(str):
    """Text that is HTML: made by `html`."""


def html(template: str, *values: Any) -> Html:
    """Return a template of HTML whose `{}` are filled with values, which are text.

    A list is its items, None is nothing, Html stays what it is. What would hide or reorder text is shown
    as an escape. Attributes stand in double quotes.
    """
    return Html(template.format(*map(_escaped, values)))


def _escaped(value: Any) -> str:
    if value is None or isinstance(value, Html):
        return value or ""
    if isinstance(value, (list, tuple)):
        return "".join(map(_escaped, value))
    text = _CONTROL.sub(lambda at: at[0] if at[0] in "\n\t" else f"\\x{ord(at[0]):02x}", str(value))
    return text.translate(_ESCAPES)


def each(template: str, rows: Iterable[Sequence[Any]]) -> List[Html]:
    """Return the template filled with each row of values."""
    return [html(template, *row) for row in rows]


def badge(state: str) -> Html:
    """Return a state as word and shape."""
    return html('<span class="state {}">{} {}</span>', state, _SHAPES.get(state, "\u25cb"), state)


def cell_text(value: Any) -> Any:
    """Return a value as a cell shows it: a long text may break anywhere, and the rest of it is its title."""
    if isinstance(value, Html) or not isinstance(value, str) or len(value) <= 30:
        return value
    cut = value if len(value) <= 300 else f"{value[:300]}\u2026"
    return html('<span class="text" title="{}">{}</span>', value, cut)


def grid(names: Sequence[str], rows: Sequence[Sequence[Any]], heads: Sequence[Any] = ()) -> Html:
    """Return a table, which a narrow screen shows as cards."""
    head = each('<th scope="col">{}</th>', zip(map(cell_text, heads or names)))
    cells = [each('<td data-name="{}">{}</td>', zip(names, map(cell_text, row))) for row in rows]
    lines = each("<tr>{}</tr>", zip(cells))
    table = '<div class="wide"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    return html(table, head, lines) if rows else html('<p class="none">none</p>')


def page_of(title: str, top: str, about: str, parts: Dict[str, Any]) -> str:
    """Return a whole page: its parts, HTML or text, by their titles; `top` is the way to the first page."""
    sections = []
    for name, part in parts.items():
        shown_as = html("<pre>{}</pre>", part) if type(part) is str else part
        if part:
            sections.append(html('<section id="{}"><h2>{}</h2>{}</section>', name, name, shown_as))
    return html(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{} \u00b7 aimwatch</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        '<style>{}</style></head><body><header><a href="{}">aimwatch</a> {}<output></output></header>'
        '<main>{}</main><script>{}</script></body></html>\n',
        title, Html(PAGE_CSS), top, about, sections, Html(PAGE_JS),
    )  # fmt: skip


class Ask:
    """The parameters of a URL."""

    def __init__(self, query: str) -> None:
        import urllib.parse

        self._encode = urllib.parse.urlencode
        self.pairs = urllib.parse.parse_qsl(query)
        self.one = collections.defaultdict(str, self.pairs)

    def number(self, name: str) -> Optional[float]:
        """Return a parameter as a finite number, or None."""
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(self.one[name])):
                return number
        return None

    def to(self, path: str = "", **changes: Any) -> str:
        """Return the address of `path` with these parameters, changed; None takes one away."""
        pairs = [pair for pair in self.pairs if pair[0] not in changes]
        pairs += [(name, value) for name, value in changes.items() if value is not None]
        return f"{path}?{self._encode(pairs)}"

    def pages(self, name: str, items: Sequence[Any], size: int) -> Tuple[Sequence[Any], Html]:
        """Return the page of items that is asked for, and links to those beside it, if there are any."""
        last = max(1, -(-len(items) // size))
        page = max(1, min(last, int(self.number(name) or 1)))
        near = sorted({1, max(1, page - 1), min(last, page + 1), last} - {page})
        links = each('<a href="{}">page {}</a> ', [(self.to("", **{name: nth}), nth) for nth in near])
        text = html(", page {} of {} {}", page, last, links) if last > 1 else Html()
        return items[(page - 1) * size : page * size], text


# -------------------------------------------------------------------------- points and charts


def point_columns(points: List[List[Any]]) -> Dict[str, Any]:
    """Return points, which are parsed lines of a log, as columns. Raises one of MALFORMED."""
    import array

    steps, values, times = ([float(point[at]) for point in points] for at in (1, 2, 3))
    epochs = [float(point[4]) if len(point) > 4 else math.nan for point in points]
    columns = {"step": steps, "value": values, "time": times, "epoch": epochs}
    return {name: array.array("d", column) for name, column in columns.items()}


#: How many bytes of a log are taken in at once.
MAX_TAKEN = 4 * MAX_LOG_MESSAGE


class LogFollower:
    """The points and messages of a log that grows: what was read is not read again."""

    def __init__(self, path: str) -> None:
        self._path, self._lock = path, threading.Lock()
        self._identity, self._offset = (0, 0), 0
        #: By series, the columns of its points as they came.
        self.points: Dict[int, Dict[str, Any]] = {}
        self.messages: deque[Dict[str, Any]] = deque(maxlen=500)

    def read(self) -> LogFollower:
        """Take in what was appended. Raises OSError."""
        with self._lock, open_regular(self._path) as file:
            identity, size = identity_of(file.fileno()), os.fstat(file.fileno()).st_size
            if self._identity != identity or size < self._offset:
                self._identity, self._offset = identity, 0
                self.points, self.messages = {}, deque(maxlen=500)
            while True:
                file.seek(self._offset)
                data = file.read(MAX_TAKEN)
                end = data.rfind(b"\n") + 1
                if not end and len(data) < MAX_TAKEN:
                    return self
                self._take(data[:end].split(b"\n"))
                self._offset += end or len(data)  # of a longer line, which is no point and no message

    def _take(self, lines: List[bytes]) -> None:
        """Take in lines; their points all at once, in a third of the time, or one by one where some are
        damaged."""
        self.messages.extend(filter(None, map(parse_message, lines)))
        lines = [line for line in lines if line.startswith(b"[")]
        series: Dict[int, List[Any]] = {}
        try:
            for point in json.loads(b"[%s]" % b",".join(lines)):
                series.setdefault(int(point[0]), []).append(point)
            new = {series_id: point_columns(points) for series_id, points in series.items()}
        except MALFORMED:
            for line in lines if len(lines) > 1 else ():
                self._take([line])
            return
        for series_id, columns in new.items():
            known = self.points.setdefault(series_id, {})
            for name, column in columns.items():
                known.setdefault(name, column[:0]).extend(column)


class Scale:
    """Maps values to 0 up to 1; `low` and `high` are the ends, or their logarithms. Raises ArithmeticError
    or ValueError for what cannot be drawn."""

    def __init__(self, values: Sequence[float], is_log: bool, margin: float = 0.0) -> None:
        self.is_log = is_log
        self._to: Callable[[float], float] = math.log10 if is_log else float
        low, high = self._to(min(values)), self._to(max(values))
        more = (high - low) * margin if low < high else abs(low) * 0.05 or 0.5
        self.low, self.high = low - more, high + more

    def at(self, value: float) -> float:
        """Return where a value lies; what is far outside is just outside."""
        return min(max((self._to(value) - self.low) / (self.high - self.low), -9.0), 9.0)

    def value(self, at: float) -> float:
        found = self.low + (self.high - self.low) * at
        return 10.0**found if self.is_log else found

    def ticks(self, steps: Sequence[float] = ()) -> List[float]:
        """Return about five round values: multiples of one of `steps` where one of these is enough."""
        if self.is_log and self.high - self.low >= 2:
            first, last = math.ceil(self.low), math.floor(self.high)
            return [10.0**power for power in range(first, last + 1, (last - first) // 7 + 1)]
        low, high = self.value(0), self.value(1)
        least = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(least))
        units = unit, 2 * unit, 5 * unit, 10 * unit
        step = next(step for step in (*(steps if least > 1 else ()), *units) if step >= least)
        return [nth * step for nth in range(math.ceil(low / step), math.floor(high / step) + 1)]


def to_draw(xs: Any, ys: Any, edges: Sequence[float]) -> List[int]:
    """Return which of points, sorted by x, show all that can be seen of them: in each column between two
    edges the smallest and the largest, and one neighbour outside on either side."""
    import bisect

    start = bisect.bisect_left(xs, edges[0])
    found = [start - 1] if start else []
    for edge in edges[1:]:
        end = bisect.bisect_right(xs, edge, start)
        if end > start:
            column = ys[start:end]
            found += sorted({start + column.index(min(column)), start + column.index(max(column))})
        start = end
    return [*found, start] if start < len(xs) else found


class Curve(NamedTuple):
    """One line of a chart."""

    label: str
    colour: str
    columns: Dict[str, Any]
    created_at: float

    def on(self, axis: str, log_x: bool, log_y: bool) -> Tuple[Any, Any, List[Tuple[float, float]]]:
        """Return where the points lie on an axis, sorted; the values there; and as pairs the points
        whose values are no finite numbers."""
        xs, ys = self.columns["time" if axis == "elapsed" else axis], self.columns["value"]
        if axis == "elapsed":
            xs = [at - self.created_at for at in xs]
        is_sorted = math.isfinite(sum(xs)) and all(map(operator.le, xs, xs[1:]))
        if is_sorted and math.isfinite(sum(ys)) and not log_x and not log_y:
            return xs, ys, []
        pairs = [pair for pair in zip(xs, ys) if pair[0] == pair[0] and (pair[0] > 0 or not log_x)]
        pairs.sort(key=operator.itemgetter(0))
        finite = [pair for pair in pairs if math.isfinite(pair[1]) and (pair[1] > 0 or not log_y)]
        odd = [pair for pair in pairs if not math.isfinite(pair[1])]
        return [pair[0] for pair in finite], [pair[1] for pair in finite], odd


#: What lies on the x axis of a chart: a column of points, or the time since the run was created.
AXES = ("step", "epoch", "time", "elapsed")
#: Round distances of times, in seconds.
_TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
#: The width and height of a chart, and the left, top, width and height of the plot in it.
CHART_SIZE, PLOT = (440, 220), (56, 10, 370, 188)
#: How what is no finite number is marked: how far from the top, and as what.
_MARKS = {"nan": (PLOT[3] - 2, "\u00d7"), "-inf": (PLOT[3] - 2, "\u25be"), "inf": (10, "\u25b4")}


def chart_svg(name: str, curves: Sequence[Curve], ask: Ask) -> Html:
    """Draw curves over one another, as the parameters x, xscale, yscale, smooth, from and to say."""
    axis = ask.one["x"] if ask.one["x"] in AXES else "step"
    try:
        drawn = _plot(axis, curves, ask)
    except (ArithmeticError, ValueError, OSError):
        drawn = html('<p class="none">these numbers cannot be drawn so</p>')
    swatch = '<li><svg viewBox="0 0 18 4"><polyline points="1,2 17,2" color="{}"/></svg>{} <b></b></li>'
    legend = each(swatch, [(curve.colour, cell_text(curve.label)) for curve in curves])
    figure = '<figure data-axis="{}"><figcaption>{} <b></b></figcaption>{}<ul>{}</ul></figure>'
    return html(figure, axis, name, drawn, legend)


def _plot(axis: str, curves: Sequence[Curve], ask: Ask) -> Html:
    log_x, log_y = ask.one["xscale"] == "log", ask.one["yscale"] == "log"
    keep = min(max(ask.number("smooth") or 0.0, 0.0), 0.999)
    width, height = PLOT[2:]
    found = [curve.on(axis, log_x, log_y) for curve in curves]
    ends = [at for xs, _, odd in found for at in (*xs[:1], *xs[-1:], *(at for at, _ in odd))]
    low, high = ask.number("from"), ask.number("to")
    x = Scale([min(ends) if low is None else low, max(ends) if high is None else high], log_x)
    edges = [x.value(nth / width) for nth in range(width + 1)]
    lines, shapes = [], []
    read: List[Any] = []  # where what can be read lies, the number of its curve, and what it is
    for nth, (curve, (xs, ys, odd)) in enumerate(zip(curves, found)):
        recorded = [(xs[at], ys[at]) for at in to_draw(xs, ys, edges)]
        read += [(round(x.at(at) * width, 1), nth, at, value) for at, value in recorded]
        lines.append((curve.colour, "raw" if keep else "", recorded))
        if keep:
            smooth = list(itertools.accumulate(ys, lambda mean, y: mean + (1 - keep) * (y - mean)))
            lines.append((curve.colour, "", [(xs[at], smooth[at]) for at in to_draw(xs, smooth, edges)]))
        marks = {(repr(value), round(x.at(at) * width / 8)): at for at, value in odd if 0 <= x.at(at) <= 1}
        for (kind, _), at in marks.items():
            mark = '<text class="mark" color="{}" x="{}" y="{}">{}<title>{} at {}</title></text>'
            shapes.append(html(mark, curve.colour, x.at(at) * width, *_MARKS[kind], kind, f"{at:.10g}"))
    in_view = [value for *_, line in lines for at, value in line if 0 <= x.at(at) <= 1]
    y = Scale(in_view or [1.0], log_y, 0.04)
    for colour, look, line in lines:
        spots = [f"{x.at(at) * width:.1f},{(1 - y.at(value)) * height:.1f}" for at, value in line]
        if len(line) == 1:  # a line of no length has round ends
            look, spots = "dot", 2 * spots
        shapes.append(html('<polyline class="{}" color="{}" points="{}"/>', look, colour, " ".join(spots)))
    return html(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" tabindex="0" data-points="{}">{}<svg x="{}" y="{}"'
        ' width="{}" height="{}">{}<rect height="100%" width="0"/></svg></svg>',
        *CHART_SIZE, to_json(read), _axes(axis, x, y), *PLOT, shapes,
    )  # fmt: skip


def _axes(axis: str, x: Scale, y: Scale) -> List[Html]:
    left, top, width, height = PLOT
    drawn = []
    for value in y.ticks():
        down = top + (1 - y.at(value)) * height
        drawn.append(html('<path d="M{} {}h{}"/>', left, down, width))
        drawn.append(html('<text class="y" x="{}" y="{}">{}</text>', left - 6, down, f"{value:.4g}"))
    for value in x.ticks(_TIME_STEPS if axis in ("time", "elapsed") else ()):
        across = left + x.at(value) * width
        text = f"{value:.6g}" if axis != "elapsed" else human_s(value) if value else "0"
        if axis == "time":
            text = time.strftime("%b %d" if x.high - x.low > 3 * 86400 else "%H:%M:%S", time.localtime(value))
        drawn.append(html('<path d="M{} {}v{}"/>', across, top, height))
        drawn.append(html('<text class="x" x="{}" y="{}">{}</text>', across, CHART_SIZE[1] - 6, text))
    return drawn


# -------------------------------------------------------------------------- pages


class Reply(NamedTuple):
    status: int
    body: bytes = b""
    kind: str = "text/plain"
    headers: Tuple[Tuple[str, str], ...] = ()
    etag: str = ""


def run_link(row: Dict[str, Any], text: str = "", top: str = "") -> Html:
    """Return a link to the page of a run."""
    shown_as = cell_text(text or row["name"] or short_hash(row["hash"]))
    return html('<a href="{}run/{}/">{}</a>', top, row["hash"], shown_as)


class Site:
    """Answers what is asked about a repository in a URL. It knows nothing of sockets."""

    def __init__(self, paths: RepoPaths, utc: Callable[[], float] = time.time) -> None:
        self.paths, self._utc = paths, utc
        self._seen_at = SeenAt(paths)
        self._follower = functools.lru_cache(MOST_COMPARED)(LogFollower)
        # What is kept to answer faster. The stamp of that from which it was made is an argument.
        self._pages = functools.lru_cache(100)(self._make)
        self._rows = functools.lru_cache(3000)(lambda run_hash, stamp: read_run(paths, run_hash))
        self._indexed = functools.lru_cache(3)(
            lambda q, stamp: {row["hash"]: row for row in Repo(paths.root).run_rows(q)}
        )

    def answer(self, path: str, query: str, known_etag: str = "") -> Reply:
        """Return the answer to GET of a path below the base path; 304 where `known_etag` is still true."""
        for route in _ROUTES:
            if match := re.fullmatch(route[0], path):
                break
            if re.fullmatch(route[0], f"{path}/"):
                where = path.rpartition("/")[2] + "/" + ("?" + query if query else "")
                return Reply(301, headers=(("Location", where),))
        else:
            return self._error(path, 404, "There is no such page.")
        hashes = match.groups()
        try:
            if not os.path.isdir(self.paths.aim):
                raise RepoError(f"no repository at {self.paths.root}: it was moved, or its share is away")
            # Every 5 s a page says anew how long ago things were, and what the watcher found.
            logs = map(self.paths.run_log, {*list_pending(self.paths), *hashes})
            stamps = [file_stamp(file) for file in (self.paths.check_ins, *sorted(logs))]
            stamp = repr([path, query, int(self._utc()) // 5, stamps])
            etag = f'"{hash(stamp):x}"'
            if etag == known_etag:
                return Reply(304, etag=etag)
            make = self._pages if route[2] == "text/html" else self._make
            return Reply(200, make(route, query, *hashes, stamp=stamp), route[2], (), etag)
        except (AimwatchError, OSError) as error:
            # A plain AimwatchError says that what the URL names is not there.
            status = {AimwatchError: 404, QueryError: 400, ArgumentError: 400}.get(type(error), 503)
            return self._error(path, status, str(error))

    def _make(self, route: Any, query: str, *hashes: str, stamp: str) -> bytes:
        found = route[1](self, Ask(query), *hashes)
        if route[2] == "text/csv":
            found = csv_text(found)
        elif route[2] == "application/json":
            found = json.dumps(json_cell(found if isinstance(found, dict) else as_objects(found)))
        return bytes(found, "utf-8", "backslashreplace")

    def _error(self, path: str, status: int, text: str) -> Reply:
        if path.startswith("api/"):
            return Reply(status, json.dumps({"error": text}).encode(), "application/json")
        page = page_of(f"{status}", "../" * path.count("/") or "./", self.paths.root, {"Trouble": text})
        return Reply(status, page.encode("utf-8", "backslashreplace"), "text/html")

    def row(self, run_hash: str) -> Dict[str, Any]:
        """Return the row of a run, as its log has it now. Raises AimwatchError."""
        stamp = file_stamp(self.paths.run_log(checked_run_hash(run_hash)))
        if stamp is None:
            raise AimwatchError(f"there is no run {run_hash} in {self.paths.root}")
        return self._rows(run_hash, stamp)

    def _log(self, run_hash: str) -> LogFollower:
        return self._follower(self.paths.run_log(run_hash)).read()

    def status(self, ask: Optional[Ask] = None) -> Dict[str, Any]:
        """What `status --json` prints."""
        # Seen from one answer to the next: no page waits until a watcher on another machine looks again.
        return status_object(self.paths, not self._seen_at.is_frozen(fresh=False))

    def found(self, q: str) -> Dict[str, Dict[str, Any]]:
        """Return the rows for which a query is true, by hash. Raises QueryError."""
        pending = {}  # whose logs say more than the index
        for run_hash in list_pending(self.paths):
            with contextlib.suppress(AimwatchError, OSError):
                pending[run_hash] = self.row(run_hash)
        found = dict(self._indexed(q, file_stamp(self.paths.index) or self._utc()))
        for run_hash in pending:
            found.pop(run_hash, None)
        found.update((row["hash"], row) for row, _ in Query(q).matches(pending.values()))
        return found

    def runs(self, q: str) -> List[Dict[str, Any]]:
        """Return the rows for which a query is true, newest first. Raises QueryError."""
        return sorted(self.found(q).values(), key=operator.itemgetter("created_at"), reverse=True)

    def listing(self, ask: Ask) -> Tuple[List[str], List[Dict[str, Any]]]:
        """Return the columns and the rows of the list of runs. Raises QueryError."""
        columns = names_of(ask.one["columns"]) or list(RUN_COLUMNS)
        return columns, sorted_by(ask.one["sort"], self.runs(ask.one["q"]), run_cell)

    def counts(self, live: List[Dict[str, Any]]) -> Dict[Tuple[str, str], int]:
        """Return how many runs there are by (state, experiment)."""
        found = self.found("")
        for row in live:  # who stalled
            experiment = found.get(row["hash"], row)["experiment"] or ""
            found[row["hash"]] = {"state": row["state"], "experiment": experiment}
        return Counter(map(operator.itemgetter("state", "experiment"), found.values()))

    def overview(self, ask: Ask) -> str:
        """The first page: who watches, what lives, what failed, and all runs."""
        status = self.status()
        live = [row for row in status["runs"] if row["state"] != FINISHED]
        mark = ("good", "\u25cf") if status["watcher"]["alive"] else ("bad", "\u25b2")
        said = [(*mark, status["watcher"]["text"])]
        said += [("bad", "\u25b2", notifier_trouble(item)) for item in status["notifiers_that_do_not_work"]]
        lines = each('<p class="{}">{} {}</p>', said)
        totals = Counter(dict.fromkeys(_SHAPES, 0))
        for (state, _), count in self.counts(live).items():
            totals[state] += count
        lines += each('<span class="chip">{} <b>{}</b></span>', zip(map(badge, totals), totals.values()))
        tables = {"Live and failed": self._live_table(ask, live), "All runs": self._list(ask, live)}
        return page_of(os.path.basename(self.paths.root), "./", self.paths.root, {"State": lines, **tables})

    def _live_table(self, ask: Ask, live: List[Dict[str, Any]]) -> Html:
        rows, (groups, pages) = [], ask.pages("live", with_groups_as_one(live), PAGE_RUNS)
        ranks = '{}<details id="{}"><summary>{} ranks</summary>{}</details>'
        for row in groups:
            said = live_fields(row, self._utc())
            run = html("{}<small>{}</small>", run_link(row), cell_text(row["experiment"]))
            if members := row.get("members"):
                each_of = [(badge(one["state"]), run_link(one), one["reason"]) for one in members]
                run = html(ranks, run, row["hash"], len(members), each("<p>{} {} {}</p>", each_of))
            promise = html("{}<small>{}</small>", said["promise"], said["progress"])
            where = html("{}<small>{}</small>", row["host"], row["job"])
            why = "; ".join(filter(None, [said["alerts"], said["reason"]]))
            since = said["last check-in"]
            rows.append([badge(row["state"]), run, since, promise, where, row["metrics"], why])
        names = ("state", "run", "last check-in", "promise", "where", "last metrics", "reason")
        return html("{}<p>{}</p>", grid(names, rows), pages)

    def _list(self, ask: Ask, live: List[Dict[str, Any]]) -> Html:
        form = html(
            '<form class="ask"><label>Query <input name="q" value="{}" size="40"></label><label>Columns '
            '<input name="columns" value="{}" size="40" placeholder="{}"></label>'
            '<input type="hidden" name="sort" value="{}"><button>Show</button></form>',
            ask.one["q"], ask.one["columns"], ",".join(RUN_COLUMNS), ask.one["sort"],
        )  # fmt: skip
        try:
            columns, found = self.listing(ask)
        except QueryError as error:
            line = "".join(ask.one["q"].splitlines()[error.line - 1 : error.line])
            wrong = '{}<pre>{}\n{}^</pre><p class="bad">{}</p>'
            return html(wrong, form, line, " " * (error.column - 1), str(error))
        sort, heads = ask.one["sort"], [Html()]
        for name in columns:
            to = ask.to("", sort=f"-{name}" if sort == name else name, page=None)
            mark = " \u25b4" * (sort == name) + " \u25be" * (sort == f"-{name}")
            heads.append(html('<a href="{}">{}{}</a>', to, name, mark))
        rows, pages = ask.pages("page", found, PAGE_RUNS)
        states, cells = {row["hash"]: row["state"] for row in live}, []
        for row in rows:
            box = html('<input type="checkbox" name="run" value="{}" aria-label="compare">', row["hash"])
            look: Dict[str, Any] = {name: shown(run_cell(row, name), name) for name in columns}
            look["state"] = badge(states.get(row["hash"], row["state"]))
            look.update(hash=run_link(row, short_hash(row["hash"])), name=run_link(row))
            cells.append([box, *(look[name] for name in columns)])
        return html(
            '{}<form action="compare/">{}<p><button>Compare ticked</button> {}{} <a href="{}">CSV</a>'
            ' <a href="{}">JSON</a></p></form>',
            form, grid(["", *columns], cells, heads), plural(len(found), "run"), pages, ask.to("runs.csv"),
            ask.to("api/runs"),
        )  # fmt: skip

    def run(self, ask: Ask, run_hash: str) -> str:
        """Everything that is known of one run."""
        row = self.row(run_hash)
        live = {item["hash"]: item for item in self.status()["runs"]}.get(run_hash)
        facts, state = dict(run_fields(row)), row["state"]
        if live:
            state, said = live["state"], live_fields(live, self._utc())
            facts.update((name, text) for name, text in said.items() if text)
        reason = facts.pop("reason", "")
        fields = each("<div><dt>{}</dt><dd>{}</dd></div>", facts.items())
        metrics = []
        for metric in row["metrics"]:
            known = metric_cells(row, metric)
            cells = [shown(known[name], name) for name in METRIC_COLUMNS[1:]]
            metrics.append([*cells, html('<a href="points.csv?series={}">CSV</a>', metric["series"])])
        head = '<h1>{} {}</h1><p class="bad"><b>{}</b></p><dl>{}</dl>'
        parts = {
            "State": html(head, badge(state), facts["name"], reason, fields),
            "Where it hangs": hanging_frames(self.paths, run_hash) if state == STALLED else "",
            "Where it failed, or its last output": "\n".join(row["frames"]),
            "Charts": self._charts(ask, [row]),
            "Metrics": metrics and grid([*METRIC_COLUMNS[1:], "points"], metrics),
            "Params": row["params"] and json.dumps(row["params"], indent=2, ensure_ascii=False),
            "Log messages": "\n".join(map(message_line, self._log(run_hash).messages)),
            "Notified": "\n".join(self._notified(run_hash)),
        }
        return page_of(f"{state}: {facts['name']}", "../../", self.paths.root, parts)

    def _notified(self, run_hash: str) -> List[str]:
        """Return what of a run was notified to whom and when, a line each."""
        lines = []
        with contextlib.suppress(FileNotFoundError), open_regular(self.paths.outbox) as file:
            for line, _ in read_lines(file):
                record = (json_object(line) if f'"{run_hash}-'.encode() in line else None) or {}
                with contextlib.suppress(*MALFORMED):
                    text = f"sent to {record['to']}"
                    if "event" in record:
                        facts, whom = record["facts"], ", ".join(record["to"]) or "nobody"
                        text = f"{facts['event']}: {facts.get('run.reason', '')}; to notify: {whom}"
                    lines.append(f"{local_time(record['time'])} {text}")
        return lines

    def _charts(self, ask: Ask, rows: Sequence[Dict[str, Any]]) -> Html:
        """Return the charts of runs by metric, with the form that says how they are drawn."""
        curves: Dict[str, List[Curve]] = {}
        for row in rows:
            points = self._log(row["hash"]).points
            for metric in row["metrics"]:
                if columns := points.get(metric["series"]):
                    drawn = curves.setdefault(metric["name"], [])
                    label = f"{row['name'] or short_hash(row['hash'])} {shown(metric['context'], 'context')}"
                    colour = f"hsl({210 + 137 * len(drawn)} 60% 50%)"
                    drawn.append(Curve(label, colour, columns, row["created_at"]))
        if not curves:
            return Html()
        scales, choices = ("linear", "log"), []
        smooth = ("0", "0.6", "0.9", "0.99")
        for name, options in (("x", AXES), ("xscale", scales), ("yscale", scales), ("smooth", smooth)):
            chosen = {ask.one[name]: Html(" selected")}
            texts = each("<option{}>{}</option>", [(chosen.get(text), text) for text in options])
            choices.append(html('<label>{} <select name="{}">{}</select></label>', name, name, texts))
        kept = [pair for pair in ask.pairs if pair[0] in ("q", "run")]
        choices += each('<input type="hidden" name="{}" value="{}">', kept)
        names, pages = ask.pages("page", list(curves), PAGE_CHARTS)
        return html(
            '<form class="ask">{}<button>Draw</button></form><div class="charts">{}</div><p>{}</p>',
            choices, [chart_svg(name, curves[name], ask) for name in names], pages,
        )  # fmt: skip

    def compare(self, ask: Ask) -> str:
        """Several runs: their charts over one another, and what differs."""
        asked = [value for name, value in ask.pairs if name == "run"]
        if ask.one["q"]:
            asked = [row["hash"] for row in self.runs(ask.one["q"])]
        rows = [self.row(run_hash) for run_hash in list(dict.fromkeys(asked))[:MOST_COMPARED]]
        names = [(row["name"] or row["hash"])[-12:] for row in rows]
        links = [run_link(row, top="../") for row in rows]
        form = '<form class="ask"><input name="q" value="{}" size="40" aria-label="query">'
        form += "<button>Show what a query finds</button></form><p>{}</p>"
        about = f"{len(rows)} of {plural(len(asked), 'run')}" if rows else "Tick runs on the first page."
        parts = {
            "Compare": html(form, ask.one["q"], about),
            "Charts": self._charts(ask, rows),
            "What differs": grid(["", *names], differences(rows), ["", *links]) if rows else "",
        }
        return page_of("compare", "../", self.paths.root, parts)

    def points(self, ask: Ask, run_hash: str) -> Iterator[Sequence[Any]]:
        """What `export` prints, of one series where its number is given."""
        row, given = self.row(run_hash), ask.one["series"]
        found = [metric for metric in row["metrics"] if given in ("", str(metric["series"]))]
        if given and not found:
            raise AimwatchError(f"run {run_hash} has no series {given}")
        return exported(self.paths, row, found)

    def list_of_runs(self, ask: Ask) -> List[Sequence[Any]]:
        """What the list of runs shows, after the names of its columns."""
        columns, rows = self.listing(ask)
        page, _ = ask.pages("page", rows, PAGE_RUNS)
        return [columns, *([run_cell(row, name) for name in columns] for row in page)]

    def show(self, ask: Ask, run_hash: str) -> Dict[str, Any]:
        """What `show --json` prints."""
        return run_object(self.row(run_hash), list(self._log(run_hash).messages))

    def metrics(self, ask: Optional[Ask] = None) -> str:
        """What a cluster's monitoring wants to know, as OpenMetrics text with bounded labels."""

        def label(name: str, text: str) -> str:
            return f"{name}={json.dumps(printable(text, 100), ensure_ascii=False)}"

        status, now = self.status(), self._utc()
        live = [row for row in status["runs"] if row["state"] != FINISHED]
        ages = [max(0.0, now - row["last_check_in"]) for row in live if row["state"] != FAILED]
        logs = map(self.paths.run_log, list_pending(self.paths))
        index_ns, *log_ns = [(file_stamp(path) or [0])[-1] for path in (self.paths.index, *logs)]
        # By name and labels.
        samples: Dict[Tuple[str, ...], float] = {
            ("check_in_age_sum_seconds",): sum(ages),
            ("check_in_age_max_seconds",): max(ages, default=0.0),
            ("watcher_alive",): status["watcher"]["alive"],
            ("index_lag_seconds",): (max([index_ns, *log_ns]) - index_ns) / 1e9,
        }
        if status["watcher"]["seen_at"]:
            samples["watcher_look_age_seconds",] = now - status["watcher"]["seen_at"]
        counts = sorted(self.counts(live).items(), key=lambda item: -item[1])
        largest = list(dict.fromkeys(experiment for (_, experiment), _ in counts))[:50]
        for (state, experiment), count in counts:
            known = experiment if experiment in largest else "other"
            key = "runs", label("state", state), label("experiment", known)
            samples[key] = samples.get(key, 0) + count
        for row in notifier_rows(self.paths)[:50]:
            of_it = label("notifier", row["id"][:8]), label("type", row["type"])
            samples[("notifier_broken", *of_it)] = row["problem"] is not None
            samples[("notifier_waiting_events", *of_it)] = row["waiting"]
        lines = []
        for name, group in itertools.groupby(sorted(samples.items()), key=lambda item: item[0][0]):
            lines.append(f"# TYPE aimwatch_{name} gauge")
            lines += [f"aimwatch_{name}{{{','.join(key[1:])}}} {value:.6g}" for key, value in group]
        return "\n".join([*lines, "# EOF", ""])


_HASH = f"({RUN_HASH.pattern})"
#: Paths, what is asked there, and the type of the answer.
_ROUTES: Tuple[Tuple[str, Callable[..., Any], str], ...] = (
    ("", Site.overview, "text/html"),
    ("compare/", Site.compare, "text/html"),
    (f"run/{_HASH}/", Site.run, "text/html"),
    (f"run/{_HASH}/points\\.csv", Site.points, "text/csv"),
    ("runs\\.csv", Site.list_of_runs, "text/csv"),
    ("metrics", Site.metrics, "application/openmetrics-text; version=1.0.0"),
    ("api/status", Site.status, "application/json"),
    ("api/runs", Site.list_of_runs, "application/json"),
    (f"api/runs/{_HASH}", Site.show, "application/json"),
    (f"api/runs/{_HASH}/points", Site.points, "application/json"),
)


PAGE_CSS = """
:root { color-scheme: light dark; --line: 1px solid #8885; }
* { box-sizing: border-box; }
body { max-width: 1360px; margin: 0 auto; padding: 0 1.2em 3em; overflow-wrap: anywhere;
  font: 14px/1.45 system-ui, sans-serif; }
a { color: LinkText; text-decoration: none; }
header { padding: .6em 0; border-bottom: var(--line); } header a { font-weight: 700; }
output { float: right; }
h1 { font-size: 1.35em; } h2 { font-size: 1.1em; margin: 1.6em 0 .5em; } #State h2 { display: none; }
p { margin: .5em 0; } small { display: block; }
header, small, .none, .good, .finished, label, th, dt, ul { color: #777; }
.running { color: #1b8a3a; } .failed, .bad, output { color: #dc3b3b; } .stalled { color: #b86e00; }
.state, .chip { white-space: nowrap; font-weight: 600; } .chip { margin-right: 1.4em; }
pre, .wide, figure { border: var(--line); border-radius: 8px; }
pre { white-space: pre-wrap; padding: .7em; margin: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .45em .7em; white-space: nowrap; font-weight: 400; }
tbody tr { border-top: var(--line); } td small, td p, .text { white-space: normal; max-width: 26em; }
.text, .chip { display: inline-block; min-width: 8em; }
.ask { display: flex; flex-wrap: wrap; gap: .6em 1em; align-items: center; margin: .6em 0; }
input, select, button { font: inherit; max-width: 75vw; padding: .2em .5em; }
dl, .charts { display: grid; gap: .6em 1.4em; } dd { margin: 0; }
dl { grid-template-columns: repeat(auto-fill, minmax(min(250px, 45%), 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr)); }
figure { margin: 0; padding: .7em; min-width: 0; } figcaption { font-weight: 600; }
figcaption b { float: right; } figure ul { margin: .3em 0 0; padding: 0; }
figure:not(:hover, :focus-within) :is(b, rect) { visibility: hidden; }
li { display: inline-block; margin-right: 1em; } li svg { width: 1.3em; margin-right: .4em; }
.chart { display: block; width: 100%; cursor: crosshair; }
path { stroke: #8885; } rect { fill: LinkText; opacity: .3; }
text { font-size: 11px; fill: #777; text-anchor: middle; } .mark { font-size: 13px; fill: currentColor; }
.y { text-anchor: end; dominant-baseline: middle; }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linecap: round; }
.dot { stroke-width: 6; } .raw { opacity: .3; }
@media (max-width: 640px) { thead, td:empty { display: none; } tr { display: block; padding: .5em 0; }
  td { display: block; position: relative; padding: .12em .6em .12em 8.2em; white-space: normal; }
  td::before { content: attr(data-name); color: #777; position: absolute; left: .6em; } }
"""
PAGE_JS = r"""
const all = (what, from = document) => [...from.querySelectorAll(what)];
let reading = null, start = null;

// Takes over what has changed of a page. Where somebody types or reads a chart, and what is ticked, stays.
function swap(page) {
  const kept = new Set(all("[name=run]:checked, details[open]").map(item => item.value || item.id));
  for (const item of all("[name=run], details", page))
    item.checked = item.open = kept.has(item.value || item.id);
  for (const old of all("section")) if (!page.getElementById(old.id)) old.remove();
  for (const fresh of all("section", page)) {
    const old = document.getElementById(fresh.id);
    if (!old) document.querySelector("main").append(fresh);
    else if (!old.isEqualNode(fresh) && !old.querySelector(":is(input, select, svg):focus, svg:hover"))
      old.replaceWith(fresh);
  }
  document.title = page.title;
}
async function refresh() {
  if (document.hidden) return;
  let trouble = "";
  try {
    const answer = await fetch(location.href, {cache: "no-cache"});
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (answer.ok) swap(page);
    else trouble = (page.querySelector("pre") ?? page.body).textContent;
  } catch {
    trouble = "no answer; trying again";
  }
  document.querySelector("output").textContent = trouble;
}

const chartAt = target => target?.closest?.("svg.chart");
// The points of a chart, each as where it lies, the number of its curve, x and y.
const points = chart => JSON.parse(chart.dataset.points);
const nearest = (found, at) => found.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
// Writes what lies nearest to a place beside the name of a chart and into its legend, and marks the way
// to it from where a drag began.
function read(chart, at) {
  const figure = chart.closest("figure"), rect = chart.querySelector("rect"), axis = figure.dataset.axis;
  const [name, ...legend] = all("b", figure), found = points(chart);
  if (!found.length) return;
  reading = nearest(found, at);
  const [left, right] = [reading[0], (start ?? reading)[0]].sort((a, b) => a - b);
  rect.setAttribute("x", left - .5);
  rect.setAttribute("width", right - left + 1);
  const words = x => axis === "time" ? new Date(x * 1000).toLocaleString() : x;
  name.textContent = axis + " " + words(reading[2]);
  legend.forEach((item, nth) => {
    const own = found.filter(point => point[1] === nth);
    const [, , x, y] = own.length ? nearest(own, reading[0]) : reading;
    item.textContent = !own.length ? "" : +y.toPrecision(8) + (x === reading[2] ? "" : " at " + words(x));
  });
}
function zoom(from, to) {
  const url = new URL(location.href);
  url.searchParams.set("from", from);
  url.searchParams.set("to", to);
  history.replaceState(null, "", url);
  location.reload();  // which keeps the place on the page
}
addEventListener("mousemove", event => {
  const chart = chartAt(event.target);
  if (!chart) return;
  const matrix = chart.querySelector("svg").getScreenCTM().inverse();
  read(chart, new DOMPoint(event.clientX, 0).matrixTransform(matrix).x);
});
addEventListener("mousedown", event => {
  if (!chartAt(event.target) || event.button) return;
  event.preventDefault();
  start = reading;
});
addEventListener("mouseup", () => {
  const ends = start ? [start[2], reading[2]] : [0, 0];
  start = null;
  if (ends[0] !== ends[1]) zoom(Math.min(...ends), Math.max(...ends));
});
addEventListener("dblclick", event => chartAt(event.target) && zoom("", ""));
addEventListener("keydown", event => {
  const chart = chartAt(event.target), way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!chart || !way) return;
  event.preventDefault();
  const beyond = points(chart).filter(point => (point[0] - (reading?.[0] ?? -1)) * way > 0);
  if (beyond.length) read(chart, nearest(beyond, reading?.[0] ?? 0)[0]);
});
setInterval(refresh, 2000);
"""

# -------------------------------------------------------------------------- server

MAX_CONNECTIONS = 32
_CLOSED = (
    b"Closed. Open the address that 'aimwatch up' printed, with its key. If you did, the name in the "
    b"address is not one that this server knows: start it with --allowed-host NAME.\n"
)


class Gate(NamedTuple):
    """Who is let in: by which names this server is called, with which token, below which path."""

    hosts: Set[str]
    token: str
    base_path: str
    cookie: str

    def answer(self, site: Site, target: str, headers: Any) -> Reply:
        """Return the answer to GET."""
        import hmac

        path, _, query = target.partition("?")
        # Any other name may be of a site that was made to lead here, to read this one in a browser.
        host = re.sub(r":[0-9]+$", "", headers.get("Host", "")).strip("[]").lower()
        given = re.findall(rf"(?:^|; *){self.cookie}=([^; ]*)", headers.get("Cookie", ""))
        given.append(headers.get("Authorization", "").partition("Bearer ")[2])
        key = query[4:] if query.startswith("key=") and path == f"{self.base_path}/" else ""
        fits = [hmac.compare_digest(item.encode("utf-8"), self.token.encode()) for item in (key, *given)]
        is_known = host in self.hosts or re.fullmatch(r"[0-9.]+|[0-9a-f:]*:[0-9a-f:.]*", host)
        if not is_known or (self.token and not any(fits)):
            return Reply(403, _CLOSED)
        if key and self.token:
            # No redirect: where one began with another site's link, a browser sends no strict cookie.
            cookie = f"{self.cookie}={self.token}; SameSite=Strict; HttpOnly"
            return Reply(200, headers=(("Set-Cookie", cookie), ("Refresh", "0; url=./")))
        if path == self.base_path:
            return Reply(301, headers=(("Location", f"{path.rpartition('/')[2]}/"),))
        if not path.startswith(f"{self.base_path}/"):
            return Reply(404, b"There is no such page.\n")
        return site.answer(path[len(self.base_path) + 1 :], query, headers.get("If-None-Match", ""))


def reply_headers(reply: Reply) -> Dict[str, str]:
    """Return the headers of an answer: nothing comes from elsewhere, and no script that is not ours runs."""
    import base64
    import hashlib

    digests = [hashlib.sha256(text.encode()).digest() for text in (PAGE_JS, PAGE_CSS)]
    js, css = (base64.b64encode(digest).decode() for digest in digests)
    return {
        "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{js}'; style-src 'sha256-{css}'; "
        "img-src data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "private, no-cache" if reply.etag else "no-store",
        "Content-Type": f"{reply.kind}; charset=utf-8",
        **({} if reply.status == 304 else {"Content-Length": str(len(reply.body))}),
        **({"ETag": reply.etag} if reply.etag else {}),
        **dict(reply.headers),
    }


def serve(site: Site, gate: Gate, listener: Any, stop: threading.Event) -> None:
    """Answer requests until `stop` is set."""
    import http.server
    import socket

    links: deque[Any] = deque()  # the newest connections

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, timeout = "HTTP/1.1", 30.0
        wbufsize = 1 << 18  # of an answer in two pieces, the system holds the second back for 40 ms

        def do_GET(self) -> None:
            reply = gate.answer(site, self.path, self.headers)
            self.send_response_only(reply.status)
            for name, value in reply_headers(reply).items():
                self.send_header(name, value)
            if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
                self.send_header("Connection", "close")  # a body is not read: the next request could be in it
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            """Make room for a connection: the oldest has to go."""
            links.append(request)
            if len(links) > MAX_CONNECTIONS:
                with contextlib.suppress(OSError):  # it has gone by itself
                    links.popleft().shutdown(socket.SHUT_RDWR)
            return True

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exc_info()[1], OSError):  # the other side may go at any time
                log.exception("a page could not be made")

    server = Server(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stop.wait()


def listen(host: str, port: int, uds: Optional[str]) -> Any:
    """Return a socket that listens. Raises AimwatchError, naming the flag to change."""
    import socket

    mask = os.umask(0o177)  # a socket file is for this user alone from its first moment
    try:
        if uds is not None:
            return socket.create_server(uds, family=socket.AF_UNIX, backlog=128)
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError, ValueError) as error:  # a name such as a..b is a ValueError
        why = getattr(error, "strerror", None) or error
        flags = f"--host {host} --port {port}" if uds is None else f"--uds {uds}"
        ways = "a free --port from 1024 up, 0 for any, or another path"
        raise AimwatchError(f"cannot listen, {why}, at {flags}: choose {ways}") from None
    finally:
        os.umask(mask)


# ======================================================================================
# Command line
#
# `main` turns errors into one line on stderr and an exit code: 0 fine, 1 something is wrong,
# 2 wrong usage. Tables are for people, --json for scripts, colour for terminals alone.
# ======================================================================================


#: What is so short is never cut in a table.
UNCUT = 11


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    """Return lines with the columns of `rows` aligned under `header`.

    Where they are wider than the terminal, long cells are cut, but for the first of each line, and where
    that is not enough, the last columns are left out.
    """
    import shutil

    cells = [list(header)] + [[printable(cell, 60) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    while sum(widths) + 2 * len(widths) - 2 > shutil.get_terminal_size().columns and len(widths) > 1:
        widest = max(widths[1:])
        if widest > UNCUT:
            widths[widths.index(widest, 1)] -= 1
        else:
            widths.pop()
    fitted = [[printable(cell, width).ljust(width) for cell, width in zip(row, widths)] for row in cells]
    return ["  ".join(row).rstrip() for row in fitted]


def print_below(*texts: Optional[str]) -> None:
    """Print what there is to say of a line of a table."""
    for text in filter(None, texts):
        print(f"  {printable(text, 300)}")


class _LogThread(logging.Handler):
    """Writes log lines to stderr from a thread, above a status line at the bottom: a full pipe, or a
    terminal that was stopped with Ctrl-S, may keep no poll, no notifier and no end of the process waiting."""

    def __init__(self) -> None:
        import queue

        super().__init__()
        self._lines: Any = queue.Queue(1000)
        self._status, self._dropped = "", 0
        threading.Thread(target=self._run, name="aimwatch-log", daemon=True).start()

    def _run(self) -> None:
        # Not through sys.stderr: a lock of it that a thread holds at the end of the process is fatal.
        target, drawn = sys.stderr.fileno(), ""
        while True:
            text, status = self._lines.get(), self._status
            text = ("\r\x1b[K" if drawn else "") + text + status
            with contextlib.suppress(OSError):
                os.write(target, text.encode("utf-8", "backslashreplace"))
            drawn = status
            self._lines.task_done()

    def flush(self) -> None:
        """Wait until all is written, for a second at most."""
        deadline = time.monotonic() + 1.0
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.full():
            self._dropped += 1
            return
        lost = f"{self._dropped} log lines were dropped: stderr took none\n" if self._dropped else ""
        self._lines.put(f"{lost}{self.format(record)}\n")
        self._dropped = 0

    def show(self, status: str) -> None:
        """Draw the status line anew."""
        self._status = status
        if self._lines.empty():  # else the lines that wait do
            self._lines.put("")


class _PrintableLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record without what a hostile log could tell the terminal to do."""
        return "\n".join(printable(line, 4000) for line in super().format(record).split("\n"))


def _log_to_stderr(timed: bool, thread: bool = False) -> Any:
    """Have the log written to stderr, and return its handler."""
    handler = _LogThread() if thread else logging.StreamHandler()
    text = "%(asctime)s %(levelname)-7s %(message)s" if timed else "aimwatch: %(message)s"
    handler.setFormatter(_PrintableLines(text, "%Y-%m-%d %H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if timed else logging.WARNING)
    return handler


# -------------------------------------------------------------------------- commands and arguments

#: Every command by the words that call it, in the order of the help: (what it does, its arguments, epilog).
_COMMANDS: Dict[str, Tuple[Callable[[Any], Optional[int]], Sequence[str], str]] = {}


def command(name: str, *arguments: str, epilog: str = "") -> Callable[[Any], Any]:
    """Make a function the command `name`. It gets the parsed arguments and returns the exit code, if any;
    the first paragraph of its docstring is its help, and the first sentence stands in the list of commands.
    For `arguments` see `add_argument`."""

    def register(do: Callable[[Any], Optional[int]]) -> Callable[[Any], Optional[int]]:
        _COMMANDS[name] = do, arguments, epilog
        return do

    return register


#: What is said of arguments that several commands have.
COMMON_HELP = {
    "RUN": "the run's name or hash, or the first characters of its hash",
    "NAME": "its name or ID, or the first characters of its ID",
    "--json": "print JSON",
    "--yes": "ask nothing",
    "--events": f"of what to notify: any of {','.join(EVENTS)} (default: {','.join(DEFAULT_EVENTS)})",
}


def add_argument(parser: Any, text: str) -> None:
    """Add to a parser the argument that a text describes: how it is written, two spaces, its help.

    `--once` is a switch, `--for TIME` has a value, `RUN` stands alone; `?`, `+`, `*` after it say how often
    it may. READERS says how a `TIME` is read. A number or a variable in `(default: 1h)` is the default.
    """
    import argparse

    usage, _, about = text.partition("  ")
    flag, metavar, count = re.findall(r"^(--[a-z-]+)? ?([A-Z=]*) ?(.*)$", usage)[0]
    about = about or COMMON_HELP[flag or metavar]
    if not metavar:
        parser.add_argument(flag, action="store_true", help=about)
        return

    def read(value: str) -> Any:
        try:
            return READERS.get(metavar, str)(value)
        except AimwatchError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    options: Dict[str, Any] = {"metavar": metavar, "type": read, "help": about}
    default = re.search(r"\(default: (?:\$(\w+)|([0-9][\w.]*)\))", about)
    if default:
        options["default"] = default[2] or os.environ.get(default[1])
    if flag and count:
        options.update(action="append", default=[])
    elif not flag:
        options.update(nargs=count or None, default="")
    parser.add_argument(flag or metavar.lower(), **options)


checked_time = a_text(r"[0-9]{1,8}(\.[0-9]+)?[smhd]?", "{} is not a time such as 90, 30m, 2h or 1d")
checked_param = a_text(r"(?s)[^=.]+(\.[^=.]+)*=.*", "{} is not such as hparams.lr=0.1", strip=False)
_EVENT = "|".join(EVENTS)
checked_events = a_text(f"({_EVENT})(,({_EVENT}))*", f"{{}} is not one or several of {', '.join(EVENTS)}")


def seconds_of(text: str) -> float:
    """Return the seconds of `90`, `30m`, `2h` or `1d`."""
    text = checked_time(text)
    return float(text.rstrip("smhd")) * {"m": 60, "h": 3600, "d": 86400}.get(text[-1], 1)


def names_of(text: str) -> List[str]:
    """Return names that are given with commas between them."""
    names = re.split(r",(?![^\[\]]*\])", text)
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def param_of(text: str) -> Tuple[List[str], Any]:
    """Return the path and the value of `hparams.lr=0.1`: JSON, or text where it is none."""
    key, _, value = checked_param(text).partition("=")
    with contextlib.suppress(ValueError, RecursionError):
        value = from_json(value)
    return key.split("."), value


#: How a value is read, by what the help calls it. What is not here is text.
READERS: Dict[str, Callable[[str], Any]] = {
    "TIME": seconds_of,
    "N": a_text("[0-9]{1,9}", "{} is not a whole number", number=True),
    "URL": checked_url,
    "LEVEL": a_text(
        f"(?i){'|'.join(LOG_LEVELS)}|[0-9]{{1,3}}", f"{{}} is not one of {', '.join(LOG_LEVELS)}", number=True
    ),
    "LIST": names_of,
    "EVENTS": lambda text: names_of(checked_events(text)),
    "NAME=VALUE": param_of,
}

# -------------------------------------------------------------------------- start, init, status


def _stop_signal() -> threading.Event:
    """Return what says when this process was told to stop."""
    with contextlib.suppress(ImportError, AttributeError, OSError):  # not every C library has it
        import ctypes

        # What compiling this file took where no .pyc can be written: 16 MB, for months.
        ctypes.CDLL(None).malloc_trim(0)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


@command(
    "start",
    f"--grace TIME  silence beyond the promise before a run counts as stalled (default: {DEFAULT_GRACE_S:g})",
    f"--poll-interval TIME  between two looks (default: {DEFAULT_POLL_INTERVAL_S:g})",
    f"--remind-every TIME  notify again of a run that stays stalled, {MAX_REMINDERS} times (default: never)",
    "--standby  where another watcher holds the repository, wait and take over when it is gone",
    "--ping-url URL  GET this URL after every poll that went well (default: $AIMWATCH_PING_URL)",
    "--once  look once, notify, and exit: 1 when any run is stalled or failed; for cron",
    "--metrics-file PATH  keep in PATH, for the node exporter, what `up` has at /metrics",
)
def cmd_start(args: Any) -> int:
    """Watch the repository until told to stop, or once."""
    paths = find_repo(args.repo)
    handler = _log_to_stderr(timed=True, thread=not args.once)
    called = command_line(args.repo)
    enabled = [item for item in read_notifiers(paths) if item.enabled]
    is_aims = not os.path.exists(paths.watcher) and "'events': " not in str(read_config(paths))
    if not enabled:
        log.info(f"no notifiers are enabled: events are only written here; '{called} notifiers add' adds one")
    elif is_aims:
        log.info(
            f"of starts, finishes and log messages Aim's watcher notifies and this one does not: '{called} "
            f"notifiers enable {enabled[0].shown_as} --events {','.join(EVENTS)}' changes that"
        )
    return _take_watch(paths, args, _stop_signal(), handler)


STANDBY_INTERVAL_S = 2.0


def _take_watch(paths: RepoPaths, args: Any, stop: threading.Event, handler: Any) -> int:
    """Watch, with --standby as soon as no other process watches, and return the exit code."""
    held_by, seen_at, frozen = "", SeenAt(paths), False
    options = args.grace, args.poll_interval, args.once, args.remind_every or 0.0
    while not stop.is_set():
        try:
            watcher = Watcher(paths, *options, wait=stop.wait, seize=frozen)
            if args.once:
                return _one_pass(watcher, stop, args)
            return _watch(watcher, stop, handler, args.ping_url, args.metrics_file)
        except RepoError as error:
            # Who stands by is there for the bad day: a share that is away ends nobody's standing by.
            if not args.standby or not (held_by or isinstance(error, WatcherBusyError)):
                raise
            if str(error) != held_by:
                held_by = str(error)
                log.info("standing by: %s", held_by)
                sd_notify(f"READY=1\nSTATUS=standing by for {paths.root}")
        sd_notify("WATCHDOG=1")
        stop.wait(STANDBY_INTERVAL_S)
        frozen = seen_at.is_frozen()
    return 0


def _watch(
    watcher: Watcher, stop: threading.Event, handler: _LogThread, ping_url: str = "", metrics_file: str = ""
) -> int:
    paths, site, reindexer = watcher.paths, Site(watcher.paths), Reindexer(watcher.paths)
    watcher.on_dead = reindexer.note_dead
    indexing = threading.Thread(target=keep_indexed, args=(reindexer, stop), daemon=True)
    indexing.start()
    ping_due = threading.Event()
    try:
        watcher.poll()
        live = watcher.counts()
        log.info(
            f"watching {paths.root}: {plural(live[RUNNING] + live[STALLED], 'live run')} "
            f"({live[STALLED]} stalled), {live[FAILED]} failed, grace {human_s(watcher.table.grace_s)}, "
            f"poll every {human_s(watcher.poll_interval_s)}; notifying {watcher.dispatcher.describe()}"
        )
        sd_notify(f"READY=1\nSTATUS=watching {paths.root}")
        if ping_url:
            threading.Thread(target=ping_when, args=(ping_due, ping_url), daemon=True).start()
        threading.Thread(target=watch_sight, args=(watcher,), daemon=True).start()
        while not stop.is_set():
            begun = time.monotonic()
            watcher.poll()
            sd_notify("WATCHDOG=1")
            if not watcher.trouble:
                ping_due.set()
            _write_metrics(site, metrics_file)
            if sys.stderr.isatty():
                counts = ", ".join(f"{count} {state}" for state, count in watcher.counts().items() if count)
                now = time.strftime("%H:%M:%S")
                handler.show(f"{now} watching {counts or 'no runs yet'} (Ctrl-C ends it)")
            stop.wait(max(0.05, watcher.poll_interval_s - (time.monotonic() - begun)))
    finally:
        handler.show("")
        sd_notify("STOPPING=1")
        indexing.join(0.5)
        watcher.close()
    log.info("stopped")
    return 0


def _one_pass(watcher: Watcher, stop: threading.Event, args: Any) -> int:
    watcher.poll()
    while watcher.table.suspects() and not (watcher.trouble or stop.is_set()):
        stop.wait(watcher.poll_interval_s)  # the next pass may come in an hour
        watcher.poll()
    if args.ping_url and not watcher.trouble:
        ping(args.ping_url)
    deadline = time.monotonic() + ATTEMPT_S + 1
    while watcher.dispatcher.is_behind() and time.monotonic() < deadline and not stop.wait(0.01):
        pass
    counts = watcher.counts()
    watcher.close()
    with contextlib.suppress(AimwatchError, OSError):
        Reindexer(watcher.paths).run_all(wait_s=1.0)  # so that `runs`, too, knows what has died
    _write_metrics(Site(watcher.paths), args.metrics_file)
    return 1 if watcher.trouble or counts[STALLED] or counts[FAILED] else 0


def _write_metrics(site: Site, path: str) -> None:
    if path:
        try:
            replace_file(path, site.metrics().encode(), 0o644)
        except (AimwatchError, OSError) as error:
            log.warning("cannot write %s: %s", path, error)


@command(
    "exec",
    "--name NAME  the run's name (default: none)",
    "--experiment NAME  the experiment that the run belongs to",
    "--tag TAG+  a tag; may be given several times",
    "--param NAME=VALUE+  a param, such as hparams.lr=0.1; may be given several times",
    "--expect TIME  within which it writes or computes; 0: no promise (default: learned from its output)",
    "COMMAND A...  the program and its arguments, after --",
)
def cmd_exec(args: Any) -> int:
    """Run a program of any kind as a run, and exit with its status."""
    argv = args.command[1:] if args.command[0] == "--" else args.command
    run_hash = os.urandom(12).hex()

    def open_run() -> Run:
        run = Run(run_hash, repo=find_repo(args.repo, create=True).root, create=True, stacks=False)
        is_new = "resume" not in run._state.header
        command = [argument[:500] for argument in argv][:100]
        run._record({"resume": round(time.time(), 3), "argv": command, "exec": os.getpid()})
        if is_new:
            described = {"name": args.name, "experiment": args.experiment, "tags": args.tag}
            run._set_props(**{name: value for name, value in described.items() if value})
            for path, value in args.param:
                run[tuple(path)] = value
        return run

    return run_program(argv, open_run, AUTO if args.expect is None else args.expect)


@command(
    "init",
    "--group NAME  share it: all members of the group train, its owner watches",
    "--owner USER  with --group, who watches and indexes (default: you)",
)
def cmd_init(args: Any) -> None:
    """Create a repository, or share one with a group."""
    given = args.repo if args.repo is not None else os.environ.get("AIMWATCH_REPO") or os.getcwd()
    if args.owner and not args.group:
        raise AimwatchError("--owner has a meaning with --group alone")
    paths, who = find_repo(given, create=True), args.owner or "you"
    print(f"repository at {paths.root}")
    if args.group:
        import grp
        import pwd

        try:
            paths.share(grp.getgrnam(args.group).gr_gid, pwd.getpwnam(who).pw_uid if args.owner else -1)
        except (KeyError, OSError) as error:
            raise AimwatchError(
                f"cannot share {paths.root}: {error.args[-1]}: its owner, who must be a member of the group, "
                "or root can do it"
            ) from None
        print(f"shared with group {args.group}: all its members train there, and {who} alone watch and index")


#: A watcher that holds its lock and has not looked for this long hangs.
STUCK_S = 60.0


def watcher_state(paths: RepoPaths, saved: Dict[str, Any], looks: Optional[bool] = None) -> Tuple[bool, str]:
    """Return whether a watcher is alive, and the same in words. `looks` says whether watcher.json goes on
    changing; None: look, where the watcher is on another machine."""
    seen_at = bounded(saved.get("seen_at"))
    age_s = max(0.0, time.time() - seen_at) if seen_at else math.inf
    ago = f"last looked {human_s(age_s)} ago" if seen_at else "never looked"
    lock = lock_state(paths.watcher_lock)
    if is_elsewhere(saved):  # neither its clock nor, perhaps, its lock can be told here
        looks = SeenAt(paths).moves() if looks is None else looks
        age_s, ago, lock = (0.0, "it looks", "held") if looks else (math.inf, ago, lock)
    if lock in ("free", "absent") or (lock == "unknown" and age_s > STUCK_S):
        if saved.get("once") and age_s < 3600.0:
            return True, f"watched by passes of 'start --once'; {ago}"
        return False, f"no watcher is alive; {ago}"
    who = describe_watcher(saved)
    if age_s > STUCK_S + 3 * bounded(saved.get("save_interval_s")):
        return False, f"{who} holds the watch but does not look, or its disk is full; {ago}"
    return True, f"watched by {who}; {ago}"


def moment(at: Any) -> Optional[Moment]:
    """Return a time in seconds since the epoch as JSON shows it; None for none, or none that can be one."""
    return Moment(bounded(at)) if bounded(at) else None


def status_object(paths: RepoPaths, looks: Optional[bool] = None) -> Dict[str, Any]:
    """Return what `status --json` prints; for `looks` see `watcher_state`."""
    saved = read_watcher_file(paths)
    alive, text = watcher_state(paths, saved, looks)
    watcher = {"alive": alive, "text": text, "host": saved.get("host"), "pid": saved.get("pid")}
    watcher.update((field, moment(saved.get(field))) for field in ("started_at", "seen_at"))
    notifiers = [
        {field: row[field] for field in ("id", "name", "type", "problem", "broken_since", "waiting")}
        for row in notifier_rows(paths)
        if row["status"] == "enabled" and row["problem"]
    ]
    owners = (*paths.owners_folders, paths.config, paths.index, paths.outbox, paths.watcher)
    lax = [path for path in owners if os.path.exists(path) and os.stat(path).st_mode & 0o022]
    writable = ", ".join(os.path.relpath(path, paths.root) for path in lax)
    return {
        "repo": paths.root,
        "watcher": watcher,
        "notifiers_that_do_not_work": notifiers,
        "modes": f"others can write {writable}: 'chmod go-w', or 'init --group'" if lax else None,
        "runs": status_rows(paths),
    }


@functools.lru_cache(20_000)
def _facts_at(paths: RepoPaths, run_hash: str, stamp: Any) -> Facts:
    """Return the facts of a run; `stamp` is that of its log, which `up` does not read twice for one."""
    return run_facts(paths, run_hash)


def status_rows(paths: RepoPaths) -> List[Dict[str, Any]]:
    """Return an object for every run with check-ins: what it last said, and its state as watchers know it."""
    runs = RunTable(0)
    runs.take(names_in(paths.check_ins, "(?s).*"), 0, 0)
    known = {watched.name: watched for watched in saved_runs(read_watcher_file(paths))}
    mutes, rows = {run: until for run, until, _ in read_mutes(paths) if until > time.time()}, []
    in_its_log = ("experiment", "host", "pid", "job", "group", "reason", "progress", "metrics")
    for seen in runs.runs.values():
        watched = known.get(seen.name)
        facts: Facts = {}
        if seen.state != FINISHED:
            facts = _facts_at(paths, seen.hash, file_stamp(paths.run_log(seen.hash)))
        state = watched.state if watched else seen.state
        if state == RUNNING and facts.get("run.state") == FAILED:
            state = FAILED  # its log knows, and no watcher has seen it yet
        taken_on_by = None
        with contextlib.suppress(OSError):
            ack = os.path.join(paths.mutes, f"{seen.name}-{state}")
            taken_on_by = login_name(os.lstat(ack).st_uid)
        rank, world = (facts.get(f"run.{field}", "") for field in ("rank", "world"))
        rows.append(
            {
                "hash": seen.hash,
                "name": facts.get("run.name", seen.hash),
                "state": state,
                "last_check_in": Moment(watched.since_utc if watched else seen.utc),
                "promise_s": seen.promise_s or None,
                "rank": int(rank) if rank.isdecimal() else None,
                "world": int(world) if world.isdecimal() else None,
                "muted_until": moment(mutes.get(seen.hash)),
                "acknowledged_by": taken_on_by,
                "check_in": seen.name,
                **{field: facts.get(f"run.{field}") or None for field in in_its_log},
            }
        )
    return sorted(rows, key=lambda row: (list(KINDS).index(row["state"]), -row["last_check_in"]))


@command("status", "--json")
def cmd_status(args: Any) -> int:
    """Show every live run, and whether a watcher is alive. Exits 1 when any run is stalled or failed that
    nobody has acknowledged, or no watcher is alive."""
    found, now = status_object(find_repo(args.repo)), time.time()
    rows = found["runs"]
    bad = any(row["state"] in (STALLED, FAILED) and not row["acknowledged_by"] for row in rows)
    code = 0 if found["watcher"]["alive"] and not bad else 1
    if args.json:
        print_json(found)
        return code
    top = f"repository {found['repo']}", found["watcher"]["text"], found["modes"]
    troubles = map(notifier_trouble, found["notifiers_that_do_not_work"])
    print("\n".join(filter(None, (*top, *troubles))))
    live, cells, more = with_groups_as_one(row for row in rows if row["state"] != FINISHED), [], []
    for row in live:
        name = row["name"] if row["name"] != row["hash"] else ""
        last, promise, *below = live_fields(row, now).values()
        cells.append((short_hash(row["hash"]), row["state"], last, promise, name, row["host"] or ""))
        more.append(below)
    header, *lines = table(("RUN", "STATE", "LAST SEEN", "PROMISE", "NAME", "HOST"), cells)
    if live:
        print(f"\n{header}")
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for row, line, below in zip(live, lines, more):
        print(f"\x1b[{KINDS[row['state']].colour}m{line}\x1b[0m" if is_coloured else line)
        print_below(*below)
    said = (f"{count} {state}" for state, count in Counter(row["state"] for row in rows).items())
    print("\n" + (", ".join(said) or "no runs with check-ins"))
    return code


def notifier_trouble(item: Dict[str, Any]) -> str:
    """Return why a notifier does not work and since when, and what waits for it; "" where nothing does."""
    said = {
        "problem": f"notifier {item['type']} {item['name']} does not work: {item['problem']}",
        "broken_since": f"since {local_time(item['broken_since'] or 0.0)}",
        "waiting": f"{plural(item['waiting'], 'event')} waiting",
    }
    return "; ".join(text for field, text in said.items() if item[field])


def live_fields(row: Dict[str, Any], now_s: float) -> Dict[str, str]:
    """Return what people are told of a row of `status`; "" for nothing."""
    ack = f"acknowledged by {row['acknowledged_by']}" if row["acknowledged_by"] else None
    muted = f"muted for {human_s(row['muted_until'] - now_s)}" if row["muted_until"] else None
    return {
        "last check-in": f"{human_s(max(1, round(now_s - row['last_check_in'])))} ago",
        "promise": human_s(row["promise_s"]) if row["promise_s"] else "none",
        "alerts": "; ".join(filter(None, (ack, muted))),
        "reason": row["reason"] or "",
        "progress": row["progress"] or "",
    }


def with_groups_as_one(rows: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return rows of `status`, with the ranks of a group in one row that has the worst of their states."""
    groups: Dict[str, List[Dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"] or row["hash"], []).append(row)
    found, of_rank_0 = [], ("hash", "name", "host", "promise_s", "muted_until")
    for members in groups.values():
        first, worst = min(members, key=lambda row: row["rank"] or 0), dict(members[0])
        if len(members) > 1:
            alive = sum(row["state"] in (RUNNING, STALLED) for row in members)
            why = f"rank {worst['rank']}: {worst['reason']}" if worst["reason"] else None
            worst["reason"] = "; ".join(filter(None, (f"{alive} of {worst['world']} ranks alive", why)))
            worst.update({field: first[field] for field in of_rank_0}, members=members)
        found.append(worst)
    return found


@command("mute", "RUN", "--for TIME  30m, 2h, 1d (default: 1h)")
def cmd_mute(args: Any) -> None:
    """Notify nobody of a run for a while, and after that if it is stalled or failed then."""
    paths = find_repo(args.repo)
    paths.create()
    run_hash = _end_mutes(paths, args.run)
    until = math.ceil(time.time() + getattr(args, "for"))
    os.close(open_below(os.path.join(paths.mutes, f"{run_hash}-{until}"), os.O_WRONLY | os.O_CREAT))
    print(f"muted run {run_hash} until {local_time(until)}")


@command("unmute", "RUN")
def cmd_unmute(args: Any) -> None:
    """Notify of a muted run again, and at once if it is stalled or failed."""
    print(f"unmuted run {_end_mutes(find_repo(args.repo), args.run)}")


def _end_mutes(paths: RepoPaths, text: str) -> str:
    """End the mutes of the run that people name so, and return its hash."""
    hashes = {name.partition("-")[0] for name in names_in(paths.check_ins, "[A-Za-z0-9_]{1,64}-.+")}
    run_hash = Repo(paths.root).find_run(text, hashes)  # Aim's runs, too
    for run, _, file in read_mutes(paths):
        if run == run_hash:
            unlink_below(file)
    return run_hash


@command("ack", "RUN*", "--all  every run that is stalled or failed")
def cmd_ack(args: Any) -> None:
    """Say that you have taken on stalled or failed runs: until their state changes, `status` shows by whom
    and exits as if they were not there, and nobody is reminded of them."""
    if bool(args.run) == args.all:
        raise AimwatchError("ack: give hashes of runs, or --all")
    paths = find_repo(args.repo)
    paths.create()
    rows = {row["hash"]: row for row in status_rows(paths)}
    bad = [run_hash for run_hash, row in rows.items() if row["state"] in (STALLED, FAILED)]
    repo, chosen = Repo(paths.root), bad if args.all else []
    for text in args.run:
        run_hash = repo.find_run(text, rows)
        group = rows[run_hash]["group"] if run_hash in rows else None
        ranks = [other for other in bad if other == run_hash or group and rows[other]["group"] == group]
        if not ranks:
            raise AimwatchError(f"run {run_hash} is neither stalled nor failed now")
        chosen += ranks
    for run_hash in dict.fromkeys(chosen):
        row = rows[run_hash]
        name = f"{row['check_in']}-{row['state']}"
        os.close(open_below(os.path.join(paths.mutes, name), os.O_WRONLY | os.O_CREAT))
        print(f"acknowledged run {run_hash}, which is {row['state']}")


@command(
    "up",
    "--host ADDRESS  where to listen (default: 127.0.0.1)",
    "--port N  0: a free one (default: 43880)",
    "--uds PATH  listen on a socket file for this user alone, without a token",
    "--base-path PATH  what a proxy leaves before every path",
    "--allowed-host NAME+  a name that a proxy calls",
    "--no-token  let in everybody who reaches the port, for a machine of your own",
    "--watch  run the watcher too",
    epilog="The token is a new one at each start, unless $AIMWATCH_TOKEN holds one.",
)
def cmd_up(args: Any) -> None:
    """Show the runs on a web page, until told to stop."""
    import secrets

    paths, stop = find_repo(args.repo), _stop_signal()
    with contextlib.ExitStack() as at_end, listen(args.host, args.port, args.uds) as listener:
        handler = _log_to_stderr(timed=True, thread=True)
        if args.uds:
            at_end.callback(os.unlink, args.uds)
            name, port, token, local = "localhost", 43880, "", os.path.abspath(args.uds)
        else:
            name, port = listener.getsockname()[:2]
            token = "" if args.no_token else os.environ.get("AIMWATCH_TOKEN") or secrets.token_urlsafe(24)
            name = this_host() if name in ("0.0.0.0", "::") else name
            local = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
        base = f"/{(args.base_path or '').strip('/')}".rstrip("/")
        names = ["localhost", name, args.host, this_host(), *args.allowed_host]
        beside = threading.Thread(target=keep_indexed, args=(Reindexer(paths), stop), daemon=True)
        if args.watch:
            beside = threading.Thread(target=_watch, args=(Watcher(paths), stop, handler), daemon=True)
        beside.start()
        at_end.callback(beside.join, 1.5)
        rest = f"{base}/" + (f"?key={token}" if token else "")
        print(args.uds or f"http://{local}{rest}")
        ssh = f"ssh -L {port}:{local} {this_host()}"
        print(f"from elsewhere: {ssh}, then http://localhost:{port}{rest}", flush=True)

        def say_who_watches() -> None:  # of one on another machine, that takes seconds
            text = "this process watches" if args.watch else watcher_state(paths, read_watcher_file(paths))[1]
            print(text, flush=True)

        threading.Thread(target=say_who_watches, daemon=True).start()
        gate = Gate(set(map(str.lower, names)), token, base, f"aimwatch_{port}")
        serve(Site(paths), gate, listener, stop)
        stop.set()


# -------------------------------------------------------------------------- notifiers


def _ask(prompt: str, check: Callable[[str], Any], secret: bool = False) -> Any:
    """Ask, on a terminal or of standard input, until `check` takes the answer; return what it makes of it."""
    ask: Callable[[str], str] = input
    if secret and sys.stdin.isatty():
        import getpass

        prompt, ask = f"{prompt} (not shown)", getpass.getpass
    while True:
        try:
            return check(ask(f"{prompt}: "))
        except AimwatchError as error:
            print(f"Error: {error}")


def _confirm(question: str, default: bool) -> bool:
    said = input(f"{question} [{'Y/n' if default else 'y/N'}]: ").strip().lower()
    return said.startswith("y") if said else default


#: What a notifier of any type has besides its arguments.
COMMON_FIELDS = (
    Field("name", "name", "Name (empty: none)", checked_notifier_name),
    Field("where", "where", "Only runs for which, as run.user == 'ann' (empty: all)", checked_query),
)


@command("notifiers")
def cmd_notifiers(args: Any) -> None:
    """Say who is notified, and how."""


@command("notifiers add", epilog="'notifiers add TYPE --help' shows the flags of a type, and which it needs.")
def cmd_notifiers_add(args: Any) -> None:
    """Add a notifier, by questions, or wholly by the flags of its type."""
    kinds = ", ".join(NOTIFIER_FIELDS)
    is_known = a_text("|".join(NOTIFIER_FIELDS), f"{{}} is not one of {kinds}")
    kind = _ask(f"Select notifier type to add ({kinds})", is_known)
    args = build_parser().parse_args(["notifiers", "add", kind], args)
    args.do(args)


def _add_notifier(args: Any) -> None:
    """Add a notifier of this type."""
    import uuid

    paths, kind = find_repo(args.repo), args.verb
    read_config(paths)
    arguments = _field_values(NOTIFIER_FIELDS[kind], args)
    shown = {"message": "(the default message)", **masked(kind, arguments)}
    arguments.setdefault("message", AIM_DEFAULT_MESSAGE)
    notifier = {"id": str(uuid.uuid4()), "type": kind, "arguments": arguments, "status": "enabled"}
    notifier.update(_field_values(COMMON_FIELDS, args))
    also = () if args.events or args.yes or not _confirm("Also when a run finishes?", False) else (FINISHED,)
    notifier["events"] = args.events or [*DEFAULT_EVENTS, *also]
    added = read_notifier(str(notifier["id"]), notifier)
    print(f"\n{json.dumps({**notifier, 'arguments': shown}, indent=2)}")
    _warn_about(kind, arguments)
    for other in read_notifiers(paths):
        if added.name and other.name == added.name:
            raise ConfigError(f"there is a notifier called {added.name}: give another --name")
        if other._replace(id=added.id, name=added.name, enabled=True) == added:
            raise ConfigError(f"the same notifier is there already: {other.shown_as}")
    if not args.yes and not _confirm("Save notifier configuration above?", True):
        raise AimwatchError("aborted: nothing was saved")
    with edit_config(paths) as raw:
        raw["notifications"]["notifiers"][added.id] = notifier
    way = f"{command_line(args.repo)} notifiers test {added.shown_as}"
    print(f"added {kind} notifier {added.id}; try it: {way}")
    if not args.yes and _confirm("Send a sample now?", True):
        _send_sample(paths, [added])


def _make_add_command(kind: str) -> None:
    flags, example = [], f"notifiers add {kind}"
    for field in (*NOTIFIER_FIELDS[kind], *COMMON_FIELDS):
        flags.append(f"--{field.flag} TEXT{'+' if field.name == 'headers' else ''}  {field.prompt}")
        if field.secret:
            flags.append(f"--{field.flag}-file FILE  read --{field.flag} from FILE")
        if field.required:
            example += f" --{field.flag}-file FILE" if field.secret else f" --{field.flag} TEXT"
    epilog = (
        f"At least: {example} --yes. What is not given is asked for. A secret on the command line shows in "
        f"process lists: use the -file flags, where - is standard input. A message may name {KNOWN_FIELDS}."
    )
    command(f"notifiers add {kind}", *flags, "--events EVENTS", "--yes", epilog=epilog)(_add_notifier)


for _type in NOTIFIER_FIELDS:
    _make_add_command(_type)


def _field_values(fields: Sequence[Field], args: Any) -> Dict[str, Any]:
    """Return what a notifier has from flags, files and questions, without what is left out."""
    values: Dict[str, Any] = {}
    for field in fields:
        said, check = _said(field, args), functools.partial(_checked, field)
        is_asked = said is None and not args.yes
        values[field.name] = _ask(field.prompt, check, field.secret) if is_asked else check(said)
    return {name: value for name, value in values.items() if value}


def _said(field: Field, args: Any) -> Optional[str]:
    """Return what the flags of a field say, None where they say nothing."""
    name = field.flag.replace("-", "_")
    value, path = getattr(args, name), getattr(args, f"{name}_file", None)
    if path == "-":  # without --yes, what follows answers questions
        return (sys.stdin.read(MAX_ANSWER_BYTES) if args.yes else sys.stdin.readline()).strip("\n")
    if path is not None:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read(MAX_ANSWER_BYTES).strip("\n")
    return ("\n".join(value) or None) if isinstance(value, list) else value


def _checked(field: Field, said: Optional[str]) -> Any:
    try:
        if field.required and not said:
            raise ConfigError("this is needed")
        value = field.check(said) if said else None
        if field.name in ("message", "body"):
            check_template(value)
        return value
    except AimwatchError as error:
        raise ConfigError(f"--{field.flag}: {error}") from None


def _warn_about(kind: str, arguments: Dict[str, Any]) -> None:
    import urllib.parse

    url = urllib.parse.urlsplit(arguments.get("url") or arguments.get("base_url") or "")
    is_plain = url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1")
    if is_plain or (arguments.get("security") == "none" and arguments.get("password")):
        host = url.hostname or arguments["host"]
        print(f"Warning: nothing is encrypted on the way to {host}: everybody between reads the secrets too.")
    if kind == "workplace" and "base_url" not in arguments:
        print("Note: Meta closed Workplace on 2026-06-01; --base-url names a server that speaks its format.")


@command("notifiers remove", "NAME", "--yes")
def cmd_notifiers_remove(args: Any) -> None:
    """Remove a notifier; what waits for it is given up."""
    paths = find_repo(args.repo)
    notifier_id = find_notifier(args.name, read_config(paths))
    shown = f"notifier {printable(notifier_id)}"
    if not args.yes and not _confirm(f"Remove {shown}, and what waits for it?", False):
        raise AimwatchError("aborted: nothing was removed")
    with edit_config(paths) as raw:
        raw["notifications"]["notifiers"].pop(notifier_id, None)
    print(f"removed {shown}")


@command("notifiers disable", "NAME")
@command("notifiers enable", "NAME", "--events EVENTS")
def cmd_notifiers_enable(args: Any) -> None:
    """Have a notifier hear of what happens, or disable it and keep its configuration."""
    with edit_config(find_repo(args.repo)) as raw:
        notifier_id = find_notifier(args.name, raw)
        entry = raw["notifications"]["notifiers"][notifier_id]
        if not isinstance(entry, dict):
            raise ConfigError(f"notifier {notifier_id} is no JSON object: remove it and add it again")
        entry["status"] = f"{args.verb}d"
        if getattr(args, "events", None):
            entry["events"] = args.events
    print(f"{args.verb}d notifier {args.name}")


def notifier_rows(paths: RepoPaths) -> List[Dict[str, Any]]:
    """Return what `notifiers list --json` prints of each notifier; [] where the configuration cannot be read:
    in a shared layout, its owner alone does."""
    outbox, rows = Outbox(paths.outbox, read_only=True), []
    with contextlib.suppress(ConfigError):
        for item in read_notifiers(paths):
            reason, since = outbox.broken.get(item.id, (None, None))
            row = {
                "id": item.id,
                "type": item.type,
                "status": "enabled" if item.enabled else "disabled",
                "arguments": masked(item.type, item.arguments),
                "events": item.events,
                "name": item.shown_as,
                "where": item.where or None,
                "problem": item.problem or reason,
                "broken_since": moment(since),
                "waiting": len(outbox.waiting_for(item.id)),
            }
            rows.append(row)
    return rows


@command("notifiers list", "--json")
def cmd_notifiers_list(args: Any) -> None:
    """List the notifiers, with what is wrong with those that do not work."""
    paths = find_repo(args.repo)
    read_config(paths)  # or raises
    rows = notifier_rows(paths)
    if args.json:
        print_json(rows)
        return
    cells = []
    for row in rows:
        known = map(row["arguments"].get, ("base_url", "url", "group_id", "to", "command"))
        where = next(filter(None, known), "")
        where = " ".join(map(str, where)) if isinstance(where, list) else str(where)
        where = re.sub(r"^https?://|/\*\*\*$", "", where)
        cells.append((row["name"], row["type"], row["status"], where, ",".join(row["events"])))
    header, *lines = table(("NAME", "TYPE", "STATUS", "WHERE", "EVENTS"), cells)
    print(header)
    for line, row in zip(lines, rows):
        print(line)
        print_below(row["where"] and f"only where {row['where']}", notifier_trouble(row))
    if not rows:
        print(f"none yet: '{command_line(args.repo)} notifiers add' sets one up", file=sys.stderr)


@command("notifiers dump")
def cmd_notifiers_dump(args: Any) -> None:
    """Print the configuration with its secrets masked."""
    raw = read_config(find_repo(args.repo))
    entries = raw["notifications"]["notifiers"]
    for notifier_id, entry in entries.items():
        item = read_notifier(notifier_id, entry)
        shown = {"arguments": masked(item.type, item.arguments)}
        entries[notifier_id] = {**entry, **shown} if isinstance(entry, dict) else "***"
    print(json.dumps(raw, indent=2))


@command("notifiers get-log-level")
def cmd_get_log_level(args: Any) -> None:
    """Print from which level on people hear of log messages of runs."""
    level = read_config(find_repo(args.repo))["notifications"].get("log_level", 30)
    print(f"Log level: {logging.getLevelName(level) if isinstance(level, int) else repr(level)}")


@command("notifiers set-log-level", f"LEVEL  {', '.join(LOG_LEVELS)}")
def cmd_set_log_level(args: Any) -> None:
    """Set from which level on people hear of log messages of runs."""
    with edit_config(find_repo(args.repo)) as raw:
        raw["notifications"]["log_level"] = LOG_LEVELS.get(str(args.level).upper(), args.level)


@command("notifiers test", "NAME?  the one of that name or ID (default: every enabled one)")
def cmd_notifiers_test(args: Any) -> int:
    """Send a sample through the real transport and say what came back."""
    paths = find_repo(args.repo)
    return _send_sample(paths, _notifiers_to_use(paths, args, args.name))


def _notifiers_to_use(paths: RepoPaths, args: Any, name: str = "") -> List[Notifier]:
    """Return the notifier of that name or ID, or every enabled one."""
    wanted = find_notifier(name, read_config(paths)) if name else ""
    found = [item for item in read_notifiers(paths) if (item.id == wanted if wanted else item.enabled)]
    if not found:
        raise AimwatchError(f"nobody is notified: '{command_line(args.repo)} notifiers add' sets one up")
    return found


def _send_sample(paths: RepoPaths, notifiers: Sequence[Notifier]) -> int:
    """Send a sample of an alert, say what came of it, and return the exit code."""
    sample = {
        "event": STALLED,
        "repo": paths.root,
        "id": "sample",
        "time": iso_time(time.time(), "seconds"),
        "run.hash": "0" * 24,
        "run.name": "sample, sent by 'notifiers test'",
        "run.host": this_host(),
    }
    code = _deliver_now(notifiers, sample, sys.stdout)
    if code == 0:
        freshen(paths.config)  # a running watcher sees that the file is new, and tries again at once
    return code


def _deliver_now(notifiers: Iterable[Notifier], facts: Facts, stream: Any) -> int:
    """Send one message past the outbox, say on `stream` what came back, and return the exit code."""
    _log_to_stderr(timed=True)  # where the notifiers that are loggers write
    code = 0
    for item in notifiers:
        outcome = Outcome(BROKEN, item.problem) if item.problem else deliver(item, [facts])
        verdict = "delivered"
        if outcome.kind != SENT:
            verdict, code = "NOT delivered", 1
        if outcome.kind != SENT or stream is sys.stdout:
            print(printable(f"{item.type} {item.shown_as}: {verdict}: {outcome.detail}"), file=stream)
    return code


# -------------------------------------------------------------------------- runs and metrics

RUN_COLUMNS = ("hash", "name", "experiment", "state", "created", "duration", "host")
RUN_FIELDS = ("created", "ended", "duration", *ROW_FIELDS)
METRIC_COLUMNS = ("run", "metric", "context", "last", "step", "min", "max", "count")
#: How many rows are shown, and how long `reindex` waits for another process that writes the index.
DEFAULT_LIMIT, REINDEX_WAIT_S = 50, 60.0


def _listing(columns: Sequence[str], also: str = "") -> List[str]:
    """Return the arguments of a command that lists what a query finds."""
    return [
        "QUERY?  an expression over run; the README has the language (default: all)",
        f"--limit N  show at most N, 0 for all (default: {DEFAULT_LIMIT}, and all with --json and --csv)",
        "--sort COLUMN  sort by a column; --sort=-COLUMN: the largest first (default: the newest first)",
        f"--columns LIST  what to show (default: {','.join(columns)}{also})",
        "--json",
        "--csv  print CSV",
    ]


class Moment(float):
    """A time in seconds since the epoch. JSON and CSV show it in ISO 8601, tables in local time."""


def print_json(value: Any) -> None:
    print(json.dumps(json_cell(value), indent=2))


#: `metric:loss`, `metric:loss[subset=val].min`: a metric, its context and what of it is shown.
_METRIC_COLUMN = re.compile(
    rf"(?s)metric:(.+?)(?:\[([^\[\]]*)\])?(?:\.({'|'.join(_SERIES_FIELDS)}))?", re.ASCII
)


def run_cell(row: Dict[str, Any], column: str) -> Any:
    """Return what a column of `runs` shows of a run: a field, `metric:<name>`, or a param's path."""
    field = {"created": "created_at", "ended": "end_time"}.get(column, column)
    if field in ("created_at", "end_time"):
        return moment(row[field])
    if column == "duration":
        return duration_s(row)
    if column in ROW_FIELDS:
        return row[column]
    metric = _METRIC_COLUMN.fullmatch(column)
    if metric:
        name, context, field = metric.groups()
        found = [item for item in row["metrics"] if item["name"] == name]
        if context is not None:
            wanted = context.replace(",", ", ")
            found = [item for item in found if shown(item["context"], "context") == wanted]
        last = max(found, key=lambda item: int(item["last_step"]), default=None)
        return None if last is None else metric_cells(row, last)[field or "last"]
    keys = [int(key) if key.isdecimal() else key for key in column.split(".")]
    return _at(lambda row, metric: row["params"], keys)(row, None)


def metric_cells(row: Dict[str, Any], metric: Dict[str, Any]) -> Dict[str, Any]:
    """Return what the columns of `metrics` show of a series in the row of its run."""
    more = {"run": row["hash"], "metric": metric["name"], "step": metric["last_step"]}
    return {**metric, **more, "last_time": Moment(metric["last_time"])}


def shown(value: Any, column: str) -> str:
    """Return a cell's value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, Moment):
        at = time.localtime(value)
        this_year = at.tm_year == time.localtime().tm_year
        return time.strftime("%m-%d %H:%M" if this_year else "%Y-%m-%d", at)
    if column == "duration":
        return human_s(value)
    if column in ("hash", "run"):
        return short_hash(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if column == "context":
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def sorted_by(sort: Optional[str], items: List[Any], cell: Callable[[Any, str], Any]) -> List[Any]:
    """Return items sorted by a column, or by `-column` the largest first. What is missing comes last either
    way, and so does NaN: a run that diverged is not the best one. Text comes after numbers."""
    if not sort:
        return items
    backwards = sort.startswith("-")

    def rank(item: Any) -> Tuple[bool, bool, Any]:
        value = cell(item, sort.lstrip("-"))
        if value is None or value != value:
            return not backwards, False, 0
        is_text = not isinstance(value, (int, float))
        return backwards, is_text, shown(value, "") if is_text else value

    return sorted(items, key=rank, reverse=backwards)


def _print_list(
    args: Any, columns: List[str], known: Sequence[str], items: List[Any], cell: Callable[..., Any], noun: str
) -> None:
    """Print what was found as the flags ask. Raises AimwatchError for a column that is not a known one."""
    for column in columns:
        metric = _METRIC_COLUMN.fullmatch(column)
        name = f"metric:{metric[1]}" if metric else re.sub(r"(\.[0-9]+)+$", "", column)
        if name not in known:
            hint = nearest(column, known) or f": the columns are {', '.join(known[:40])}"
            raise AimwatchError(f"there is no column {printable(repr(column), 60)}{hint}")
    items = sorted_by(args.sort, items, cell)
    limit = args.limit if args.limit is not None else (0 if args.json or args.csv else DEFAULT_LIMIT)
    rows = [[cell(item, column) for column in columns] for item in items[: limit or None]]
    if args.csv:
        print(csv_text([columns, *rows], sys.stdout.isatty()), end="")
    elif args.json:
        print_json(as_objects([columns, *rows]))
    else:
        left_out: Sequence[str] = ()
        if rows:
            lines = run_table(columns, rows)
            print("\n".join(lines))
            left_out = columns[len(re.split(" {2,}", lines[0].strip())) :]
        more = f", {len(items) - len(rows)} more with --limit 0" if len(rows) < len(items) else ""
        missing = f"; no room for {', '.join(left_out)}" if left_out else ""
        print(plural(len(rows), noun) + more + missing, file=sys.stderr)


def run_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> List[str]:
    """Return the lines of a table of runs or series."""
    return table([column.upper() for column in columns], [list(map(shown, row, columns)) for row in rows])


def as_objects(rows: Iterable[Sequence[Any]]) -> List[Dict[str, Any]]:
    """Return rows, of which the first has the names of the columns, as objects."""
    names, *rest = rows
    return [dict(zip(names, row)) for row in rest]


def csv_text(rows: Iterable[Sequence[Any]], for_terminal: bool = False) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([csv_cell(value, for_terminal) for value in row] for row in rows)
    return text.getvalue()


def csv_cell(value: Any, for_terminal: bool = False) -> Any:
    """Return a value as CSV. Text that a spreadsheet would run as a formula is marked as text."""
    if not isinstance(value, str):
        value = json_cell(value)
        return json.dumps(value) if isinstance(value, (dict, list)) else value
    text = printable(value, len(value) * 10) if for_terminal else value
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def json_cell(value: Any) -> Any:
    """Return a value as JSON gives it."""
    if isinstance(value, Moment):
        return iso_time(value) or None
    if isinstance(value, dict):
        return {key: json_cell(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_cell(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _asked_columns(args: Any, default: Sequence[str]) -> List[str]:
    """Return the columns to show: those asked for, and the one to sort by."""
    columns = args.columns or list(default)
    by = (args.sort or "").lstrip("-")
    return [*columns, by] if by and by not in columns else columns


@command("runs", *_listing(RUN_COLUMNS, "; also tags, reason, a param such as hparams.lr, metric:NAME"))
def cmd_runs(args: Any) -> None:
    """List the runs for which a query is true, the newest first."""
    repo, query = Repo(args.repo), Query(args.query)
    columns, known = _asked_columns(args, RUN_COLUMNS), list(RUN_FIELDS)
    found = repo.run_rows(args.query)
    if query.params or not set(columns) <= set(known):
        params, metrics = repo.names()
        for name in query.params:
            if name not in params:
                hint = nearest(name, [*_RUN_FIELDS, *params])
                print(f"no run has a param {printable(repr(name), 60)}{hint}", file=sys.stderr)
        known += [*params, *(f"metric:{name}" for name in metrics)]
    _print_list(args, columns, known, found, run_cell, "run")


@command("metrics", *_listing(METRIC_COLUMNS))
def cmd_metrics(args: Any) -> None:
    """List the metrics for which a query over run and metric is true, those of the newest run first."""
    repo = Repo(args.repo)
    columns, known = _asked_columns(args, METRIC_COLUMNS), METRIC_COLUMNS + _SERIES_FIELDS
    found = [metric_cells(*pair) for pair in repo.metric_rows(args.query)]
    _print_list(args, columns, known, found, dict.get, "metric")


@command("show", "RUN", "--json")
def cmd_show(args: Any) -> None:
    """Show everything that is known of one run, and its log messages."""
    repo = Repo(args.repo)
    row = read_run(repo._paths, repo.find_run(args.run))
    messages = list(read_messages(repo._paths.run_log(row["hash"])))
    if args.json:
        print_json(run_object(row, messages))
        return
    for name, value in run_fields(row):
        print(f"{name + ':':<13}{printable(str(value), 1000)}")
    params, columns = param_items(row["params"], ""), METRIC_COLUMNS[1:]
    cells = [[metric_cells(row, metric)[column] for column in columns] for metric in row["metrics"]]
    parts = {
        "where it failed, or its last output": [f"  {printable(frame, 300)}" for frame in row["frames"]],
        "params": [printable(f"  {path} = {json.dumps(value)}", 300) for path, value in params if path],
        "metrics": run_table(columns, cells) if cells else [],
        "log messages": [f"  {message_line(message)}" for message in messages],
    }
    for title, lines in parts.items():
        if lines:
            print("\n".join(["", title, *lines]))


def read_run(paths: RepoPaths, run_hash: str) -> Dict[str, Any]:
    """Return the row of a run as its log has it now, and how many lines were `skipped`. Raises RepoError."""
    state = Run._to_read(paths, run_hash)._state
    return {**run_row(state), "skipped": state.skipped}


def run_object(row: Dict[str, Any], messages: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Return what `show --json` prints of a run."""
    times = {field: moment(row[field]) for field in ("created_at", "end_time")}
    metrics = [{**metric, "last_time": Moment(metric["last_time"])} for metric in row["metrics"]]
    said = [{**message, "time": Moment(message["time"])} for message in messages]
    return {**row, **times, "metrics": metrics, "messages": said}


def run_fields(row: Dict[str, Any]) -> List[Tuple[str, Any]]:
    """Return what `show` prints at the top, each with its name."""
    ended = "not yet" if row["end_time"] is None else f"{local_time(row['end_time'])} ({row['state']})"
    fields = {
        "run": row["hash"],
        "name": row["name"] or default_name(row["hash"]),
        "experiment": row["experiment"],
        "description": row["description"],
        "tags": ", ".join(row["tags"]),
        "archived": "yes" if row["archived"] else None,
        "created": local_time(row["created_at"]),
        "ended": ended,
        "duration": human_s(duration_s(row)),
        "damage": f"{plural(row['skipped'], 'line')} of the log could not be read" * bool(row["skipped"]),
        "process": row["pid"],
        "folder": row["cwd"],
        "command": " ".join(row["argv"] or ()),
        "output": row["stdout"],
        **{field: row[field] for field in ("reason", "host", "user", "job", "commit", "python")},
    }
    return [(name, value) for name, value in fields.items() if value is not None and value != ""]


@command("diff", "RUN", "OTHER  another run")
def cmd_diff(args: Any) -> None:
    """Show in what two runs differ, and what was run where."""
    repo = Repo(args.repo)
    hashes = [repo.find_run(args.run), repo.find_run(args.other)]
    rows = [read_run(repo._paths, run_hash) for run_hash in hashes]
    cells = differences(rows)
    header = ["", *map(short_hash, hashes)]
    print("\n".join(table(header, [row for row in cells if max(map(len, row[1:])) <= 2 * UNCUT])))
    for name, *both in cells:
        if max(map(len, both)) > 2 * UNCUT:  # what differs may be at the end, and must not be cut
            print(f"\n{printable(name)}")
            for run_hash, text in zip(header[1:], both):
                print(f"  {run_hash}  {printable(text, 1000)}")


def differences(rows: Sequence[Dict[str, Any]]) -> List[List[str]]:
    """Return each fact, param and metric in which runs differ, and where they ran: its name, its values."""
    known = []
    for row in rows:
        facts = {"state": row["state"], **dict(run_fields(row))}
        facts.update((f"param {path}", value) for path, value in param_items(row["params"], "") if path)
        for metric in row["metrics"]:
            context = shown(metric["context"], "context")
            facts[f"last {metric['name']}" + (f" [{context}]" if context else "")] = metric["last"]
        known.append(facts)
    names = dict.fromkeys(itertools.chain(*known))
    found = [[name, *(shown(facts.get(name), "") for facts in known)] for name in names]
    own, where = ("run", "created", "ended", "process", "damage"), ("host", "folder", "command", "commit")
    return [row for row in found if row[0] not in own and (row[0] in where or len(set(row[1:])) > 1)]


@command("export", "RUN", "METRIC?  the metric's name (default: all)", "--json")
def cmd_export(args: Any) -> None:
    """Print the points of a run's metrics as CSV."""
    repo = Repo(args.repo)
    row = read_run(repo._paths, repo.find_run(args.run))
    rows = exported(repo._paths, row, metrics_called(row, args.metric) if args.metric else row["metrics"])
    if args.json:
        print_json(as_objects(rows))
    else:
        print(csv_text(rows, sys.stdout.isatty()), end="")


def exported(paths: RepoPaths, row: Dict[str, Any], metrics: List[Dict[str, Any]]) -> Iterator[Sequence[Any]]:
    """Yield the names of the columns, and then all points of metrics of a run. Raises OSError."""
    yield ("metric", "context", "step", "epoch", "value", "time")
    for metric in metrics:
        for step, value, epoch, at in read_points(paths.run_log(row["hash"]), metric["series"]):
            yield metric["name"], metric["context"], step, epoch, value, Moment(at)


def metrics_called(row: Dict[str, Any], name: str) -> List[Dict[str, Any]]:
    """Return the metrics of a name in a run's row. Raises AimwatchError where there is none."""
    found = [metric for metric in row["metrics"] if metric["name"] == name]
    if not found:
        known = ", ".join(sorted({printable(metric["name"], 60) for metric in row["metrics"]})) or "none"
        raise AimwatchError(f"run {row['hash']} has no metric {printable(name, 60)!r}: it has {known}")
    return found


@command(
    "report",
    "--since TIME  over how long: 90m, 12h, 7d (default: 1d)",
    "--send  send it to the enabled notifiers, and print nothing",
)
def cmd_report(args: Any) -> int:
    """Say what finished, what failed and by what, and what still runs; for cron."""
    repo = Repo(args.repo)
    since = time.time() - args.since
    # Of a group also each rank that failed.
    q = f"(run.active or run.end_time >= {since!r}) and (not run.rank or run.state == 'failed')"
    rows = repo.run_rows(q)
    states = {row["hash"]: row for row in status_rows(repo._paths)}
    for row in rows:
        live = states.get(row["hash"], row)
        if row["end_time"] is None and live["state"] in (STALLED, FAILED):
            row.update(state=live["state"], reason=live["reason"] or DIED * (live["state"] == FAILED))
    text = report_text(repo.path, rows, args.since)
    if not args.send:
        print(text)
        return 0
    facts = {"event": "report", "repo": repo.path, "time": iso_time(time.time(), "seconds"), "message": text}
    used = _notifiers_to_use(repo._paths, args)
    plain = (item._replace(arguments={**item.arguments, "message": "{message}"}) for item in used)
    return _deliver_now(plain, facts, sys.stderr)


def report_text(root: str, rows: Iterable[Dict[str, Any]], over_s: float) -> str:
    """Return how many runs there are in each state, and a line for what had one cause, as in an alert."""
    rows = sorted(rows, key=lambda row: list(KINDS).index(row["state"]))
    causes: Dict[Any, List[Facts]] = collections.defaultdict(list)
    for row in rows:
        fields = ("name", "experiment", "host", "reason")
        known = {f"run.{field}": on_one_line(str(row[field] or "")) for field in fields}
        facts = clean_facts({"event": row["state"], "run.hash": short_hash(row["hash"]), **known})
        causes[_cause(facts)].append(facts)
    counts = ", ".join(f"{count} {state}" for state, count in Counter(row["state"] for row in rows).items())
    lines = [f"the last {human_s(over_s)} in {root}: {counts or 'no runs'}"]
    for facts in map(_as_one, causes.values()):
        lines.append(summary(facts) + (f" ({facts['run.hash']})" if facts["run.name"] else ""))
    return "\n".join(lines)


@command("plot", "RUN", "METRIC  the metric's name; each context is drawn")
def cmd_plot(args: Any) -> None:
    """Draw a metric of a run as a chart in the terminal."""
    repo = Repo(args.repo)
    row = read_run(repo._paths, repo.find_run(args.run))
    import shutil

    width, height = shutil.get_terminal_size((80, 24))
    for metric in metrics_called(row, args.metric):
        print(printable(f"{metric['name']} {shown(metric['context'], 'context')}".rstrip(), width))
        points = read_points(repo._paths.run_log(row["hash"]), metric["series"])
        drawn = [(step, value) for step, value, *_ in points if abs(value) < 1e300]
        print("\n".join(chart(drawn, max(20, width - 12), max(4, min(height - 4, 16)))))


def chart(points: Sequence[Tuple[float, float]], width: int, height: int) -> List[str]:
    """Return lines that draw finite points over `width` by `height` characters, and the scales."""
    if not points:
        return ["no values that can be drawn"]
    xs, ys = zip(*points)
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    across, up = Scale(xs, False), Scale(ys, False)
    # Of the eight dots of a braille character, the bits by column and row.
    bits = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
    grid = [[0] * width for _ in range(height)]
    for x, y in points:
        column = round(across.at(x) * (2 * width - 1))
        row = round((1 - up.at(y)) * (4 * height - 1))
        grid[row // 4][column // 2] |= bits[column % 2][row % 4]
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    lines = [
        f"{labels.get(nth, ''):>10} {''.join(chr(0x2800 + dots) for dots in row)}".rstrip("\u2800 ")
        for nth, row in enumerate(grid)
    ]
    ends = f"{left:g}".ljust(width - len(f"{right:g}")) + f"{right:g}"
    return [*lines, f"{'':>10} {ends}"]


@command("rm", "RUN+", "--yes")
def cmd_rm(args: Any) -> None:
    """Remove runs with everything they recorded."""
    repo = Repo(args.repo)
    hashes = [repo.find_run(prefix) for prefix in args.run]
    if not args.yes:
        print("\n".join(hashes))
        if not _confirm(f"Remove {plural(len(hashes), 'run')} for good?", False):
            raise AimwatchError("aborted: nothing was removed")
    for run_hash in hashes:
        repo.delete_run(run_hash)
        print(f"removed run {run_hash}")


@command("close", "RUN+")
def cmd_close(args: Any) -> None:
    """Declare runs ended whose processes are gone: `status` shows them no more, and nobody is notified."""
    repo = Repo(args.repo)
    for prefix in args.run:
        run_hash = repo.find_run(prefix)
        changed = repo.close_run(run_hash)
        print(f"{'closed run' if changed else 'already closed:'} {run_hash}")


@command("reindex", "--rebuild  build the index from nothing")
def cmd_reindex(args: Any) -> int:
    """Bring the index up to date with what the runs recorded; for cron. Silent when all is well. Exits 1,
    with a list, when some run could not be read."""
    paths = find_repo(args.repo)
    problems = Reindexer(paths).run_all(args.rebuild, REINDEX_WAIT_S)
    for problem in problems:
        print(f"{command_line()}: {problem}", file=sys.stderr)
    return 1 if problems else 0


# -------------------------------------------------------------------------- demo

#: What the demo's processes run: a training loop, with a name, that meets its fate on the way.
DEMO_TRAINING = """\
import os, signal, sys, time
from aimwatch import Run

with Run(repo=sys.argv[1], experiment="demo") as run:
    run.name = "%s"
    for step in range(20):
        time.sleep(0.05)
        run.report_progress(expect_next_in=1)
        if step == 10:
            %s
"""
DEMO_GRACE_S, DEMO_LIMIT_S = 1.0, 20.0
#: The demo's processes: what becomes of each, by which statement, and what must be alerted.
DEMO_FATES = {
    "finishes": ("reaches its end", "pass", [FINISHED]),
    "raises": ("raises an exception", "raise ValueError(f'loss is NaN at step {step}')", [FAILED]),
    "killed": ("is sent SIGKILL", "os.kill(os.getpid(), signal.SIGKILL)", [FAILED]),
    "hangs": ("stops working", "time.sleep(60)", [STALLED]),
    "terminated": ("is sent SIGTERM", "os.kill(os.getpid(), signal.SIGTERM)", [FAILED]),
    "stalls": ("stalls and comes back", "time.sleep(5)", [STALLED, RECOVERED, FINISHED]),
}


@command("demo", "--keep  leave the repository for a look")
def cmd_demo(args: Any) -> int:
    """Watch six training processes end in six ways, and check the alerts about them."""
    import shutil
    import tempfile

    root, rows = tempfile.mkdtemp(prefix="aimwatch-demo-"), []
    with contextlib.ExitStack() as at_end:
        if not args.keep:
            at_end.callback(shutil.rmtree, root, ignore_errors=True)
        alerts = _demo_alerts(find_repo(root, create=True), at_end)
    for name, (what, _, must) in DEMO_FATES.items():
        found = [kind for run, kind in alerts if run == name]
        verdict = "ok" if found == must else f"WRONG: not {', '.join(must)}"
        rows.append((name, what, ", ".join(found) or "none", verdict))
    is_right = all(verdict == "ok" for *_, verdict in rows)
    print("\n" + "\n".join(table(("RUN", "WHAT IT DOES", "ALERTS", ""), rows)))
    print("\nEvery alert came, and came once." if is_right else "\nSomething is wrong.")
    if args.keep:
        print(f"\nThe repository is kept: {command_line()} --repo {root} status")
    return 0 if is_right else 1


def _demo_alerts(paths: RepoPaths, at_end: contextlib.ExitStack) -> List[Tuple[str, str]]:
    """Watch the processes, and return the alerts that the outbox says were sent: (the run's name, event)."""
    import subprocess

    with edit_config(paths) as raw:
        demo = {"id": "demo", "type": "logger", "events": [STALLED, FAILED, RECOVERED, FINISHED]}
        raw["notifications"]["notifiers"]["demo"] = {**demo, "arguments": {}}
    print(f"{len(DEMO_FATES)} training processes in {paths.root}, each promising a check-in within 1 s.")
    print(f"What the watcher (grace {human_s(DEMO_GRACE_S)}) says, as it comes:\n", flush=True)
    _log_to_stderr(timed=True)
    watcher = Watcher(paths, DEMO_GRACE_S, poll_interval_s=0.2)
    at_end.callback(watcher.close)
    watcher.poll()  # what is there at the first look is no news
    here = os.path.dirname(os.path.abspath(__file__))  # where it finds this module
    for name, (_, fate, _) in DEMO_FATES.items():
        argv = [sys.executable, "-c", DEMO_TRAINING % (name, fate), paths.root]
        process = at_end.enter_context(subprocess.Popen(argv, cwd=here, stderr=subprocess.DEVNULL))
        at_end.callback(process.kill)
    wanted = sum(len(must) for *_, must in DEMO_FATES.values())
    deadline = time.monotonic() + DEMO_LIMIT_S
    while (
        len(watcher.outbox.known) < wanted or watcher.dispatcher.is_behind()
    ) and time.monotonic() < deadline:
        time.sleep(watcher.poll_interval_s)
        watcher.poll()
    records = list(map(json.loads, read_bounded(paths.outbox, MAX_LINE_BYTES).splitlines()))
    events = {one["event"]: one["facts"] for one in records if "event" in one}
    sent = [events[event_id] for one in records for event_id in one.get("sent", ())]
    return [(facts["run.name"], facts["event"]) for facts in sent]


# -------------------------------------------------------------------------- parser and main


def build_parser(argv: Sequence[str] = ()) -> Any:
    """Return the parser of the command line, made of what stands above the commands; where `argv` names one,
    of that alone, since a program that is run through `exec` waits for this."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            # A webhook in the wrong place must not be repeated in somebody's cron mail.
            super().error(re.sub(r"(://[^/?#\s'\"]+)[/?#][^\s'\"]+", r"\1/***", message))

    repo = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    repo.add_argument(
        "--repo",
        metavar="DIR",
        help="the folder that holds .aim (default: $AIMWATCH_REPO, else the nearest .aim here or above)",
    )
    parser = Parser(
        prog=command_line(),
        parents=[repo],
        description="Watch machine-learning training runs and notify people when one fails or stalls.",
        epilog="Exit codes: 0 fine, 1 something is wrong, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"aimwatch {__version__}")
    parsers, groups = {"": parser}, {}
    named = [name for name in _COMMANDS if name.partition(" ")[0] in argv]
    for name in named or _COMMANDS:
        do, arguments, epilog = _COMMANDS[name]
        group, _, verb = name.rpartition(" ")
        if group not in groups:
            is_needed = group != "notifiers add"
            groups[group] = parsers[group].add_subparsers(metavar="COMMAND", required=is_needed)
        about = (do.__doc__ or "").partition("\n\n")[0].replace("\n    ", " ")
        summary = about[:1].lower() + about[1:].partition(". ")[0].rstrip(".")
        added = groups[group].add_parser(verb, parents=[repo], help=summary, description=about, epilog=epilog)
        for text in arguments:
            add_argument(added, text)
        added.set_defaults(do=do, verb=verb)
        parsers[name] = added
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return its exit code.

    Arguments:
        argv: the arguments after the program's name; None: those of this process.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives
        with contextlib.suppress(AttributeError, ValueError):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    import argparse

    is_program, argv = argv is None, sys.argv[1:] if argv is None else argv
    try:
        # Given here, since a default of the parser would undo a --repo before the command.
        args = build_parser(argv).parse_args(argv, argparse.Namespace(repo=None))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    _log_to_stderr(timed=False)
    try:
        code = args.do(args) or 0
        sys.stdout.flush()
        return int(code)
    except (KeyboardInterrupt, EOFError):
        print(f"\n{command_line()}: aborted", file=sys.stderr)
    except (AimwatchError, OSError) as error:
        if not isinstance(error, BrokenPipeError):  # the reader of the pipe has seen enough
            print(f"{command_line()}: {error}", file=sys.stderr)
        if is_program and isinstance(error, OSError):
            # At its end, Python would complain of what standard output does not take.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 1


if __name__ == "__main__":
    sys.exit(main())
