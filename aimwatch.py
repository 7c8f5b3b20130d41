#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Watch machine-learning training runs and tell people when one fails or stalls.

One file, standard library only. A training script imports it and reports progress; a watcher
that reads nothing but the shared directory tells people, once, when a promise was not kept.

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
    ext/notifications/config.json      who is told, and how (mode 0600)
    ext/notifications/watcher.lock     held by the one watcher
    aimwatch/runs/<hash>.jsonl         what a run recorded, one JSON value per line
    aimwatch/pending/<hash>            locked by the process that writes the run
    aimwatch/outbox.jsonl              what was to be sent, and what was
    aimwatch/watcher.json              what the watcher has seen

It does not: open a port, run a server, need clocks that agree, start a thread in a training
process, read or write Aim's own run storage, or work on Windows.

Stable names are those in ``__all__``, the command line, and the files above.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import heapq
import itertools
import json
import logging
import math
import os
import re
import signal
import stat
import sys
import threading
import time
import weakref
from collections import deque
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

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
    "RepoError",
    "Run",
    "RunBusyError",
    "__version__",
    "main",
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


class RunBusyError(RepoError):
    """Another process, or another object in this one, writes the run."""


class ConfigError(AimwatchError):
    """The notifier configuration is damaged, or what was asked of it is impossible."""


#: Strict JSON on one line: escapes keep line breaks and lone surrogates out of the files.
to_json: Callable[[Any], str] = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode

#: Errors that mean "this file system has no record locks", as opposed to "somebody holds it".
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def try_lock(fd: int) -> Optional[bool]:
    """Take the POSIX record lock on `fd`: True when taken, False when held elsewhere, None when
    the file system has no locks.

    Record locks cross machines on NFS and Lustre, and go with the process that held them. They
    also go when that process closes *any* descriptor of the same file, so a process must never
    reopen a file that it holds locked.
    """
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def replace_file(path: str, data: bytes, mode: int = 0o666) -> None:
    """Put `data` at `path` in one step, so that a reader sees the old file or the new one.

    The temporary file is new (O_EXCL), so neither a planted link nor a leftover is written to,
    and it has its final `mode` (less the umask) from its first byte.
    """
    temporary = f"{path}.{os.urandom(6).hex()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_bounded(path: str, limit: int) -> bytes:
    """Return at most `limit` bytes of a regular file; anything else is refused unread.

    O_NONBLOCK keeps a FIFO that somebody planted from hanging the reader in `open`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return file.read(limit)


_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str, limit: int = 500) -> str:
    """Return `text` on one line of at most `limit` characters, with what could move a cursor,
    reverse a line or break an encoder shown as an escape."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


def human_s(seconds: float) -> str:
    """Return a duration in seconds as people say it: `850 ms`, `12 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 0.9995:
        return f"{max(seconds, 0.0) * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    whole = round(seconds)
    for unit_s, name, part_s, part in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit_s:
            rest = whole % unit_s // part_s
            return f"{whole // unit_s} {name}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"


def local_time(epoch_s: float) -> str:
    """Return seconds since the epoch as local time with its zone, for people to read."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(epoch_s)).rstrip()
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def plural(count: int, noun: str) -> str:
    """Return `1 run`, `2 runs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def this_host() -> str:
    """Return this machine's name as `uname` gives it."""
    return os.uname().nodename


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
        self.notifications = os.path.join(self.aim, "ext", "notifications")
        self.config = os.path.join(self.notifications, "config.json")
        self.config_lock = os.path.join(self.notifications, "config.lock")
        self.watcher_lock = os.path.join(self.notifications, "watcher.lock")
        self.own = os.path.join(self.aim, "aimwatch")
        self.runs = os.path.join(self.own, "runs")
        self.pending = os.path.join(self.own, "pending")
        self.outbox = os.path.join(self.own, "outbox.jsonl")
        self.watcher = os.path.join(self.own, "watcher.json")

    def run_log(self, run_hash: str) -> str:
        return os.path.join(self.runs, f"{run_hash}.jsonl")

    def marker(self, run_hash: str) -> str:
        return os.path.join(self.pending, run_hash)

    def create(self) -> None:
        """Make the folders that are missing. Raises RepoError where that is impossible."""
        for folder in (self.check_ins, self.notifications, self.runs, self.pending):
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as error:
                raise RepoError(
                    f"cannot create a repository at {self.root}: {folder}: {error.strerror}: "
                    "check the path, or choose another folder with --repo or Run(repo=...)"
                ) from None


def find_repo(given: Optional[str] = None, create: bool = False) -> RepoPaths:
    """Return the paths of the repository meant by `given`.

    `given` is the folder that holds `.aim`, or `.aim` itself. Without it: $AIMWATCH_REPO, else the
    nearest `.aim` in this folder or one above it, else this folder. With `create` the repository
    is made where it is missing. Raises RepoError where there is none and none may be made.
    """
    if given is None:
        given = os.environ.get("AIMWATCH_REPO") or _nearest_repo(os.getcwd())
    elif not str(given):
        raise RepoError("the repository's path is empty: give the folder that holds .aim")
    root = os.path.abspath(os.path.expanduser(given))
    if os.path.basename(root) == ".aim":
        root = os.path.dirname(root)
    paths = RepoPaths(root)
    for path in (root, paths.aim):
        if os.path.exists(path) and not os.path.isdir(path):
            raise RepoError(f"no repository at {root}: {path} is a file, not a folder")
    if create:
        paths.create()
    elif not os.path.isdir(paths.aim):
        raise RepoError(
            f"no repository at {root}: run 'aim-watcher --repo {root} init' or start a run there"
        )
    return paths


def _nearest_repo(folder: str) -> str:
    above = folder
    while True:
        if os.path.isdir(os.path.join(above, ".aim")):
            return above
        parent = os.path.dirname(above)
        if parent == above:
            return folder
        above = parent


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

_CHECK_IN_NAME = re.compile(
    r"(?P<run>[A-Za-z0-9_]{1,64})-(?P<idx>[0-9]{1,18})-(?P<flag>[a-z_]{1,20})"
    r"-(?P<utc>[0-9]{1,13}(?:\.[0-9]{1,6})?)-(?P<expect>[0-9]{1,9})"
)


class CheckIn(NamedTuple):
    """One parsed file name of `check_ins`. `utc` is for people; `expect_next_in_s` 0 = no promise."""

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
    """Return by how many seconds a written promise exceeds the caller's, so that the calls of
    that long need not write."""
    return min(max(expect_next_in_s / 10, 1.0), 30.0)


class CheckInFile:
    """One run's file in `check_ins`.

    Takes no lock: numbers come from an atomic counter, and two threads that write at the same
    moment leave the higher number in force, whichever comes first. Not used after a fork.
    """

    def __init__(self, folder: str, run_hash: str, next_idx: int, names: Iterable[str]) -> None:
        self.folder = folder
        self.run_hash = run_hash
        self._idx = itertools.count(next_idx)
        self._names: Set[str] = set(names)

    def next_idx(self) -> int:
        """Return the number of the next check-in; each is given out once."""
        return next(self._idx)

    def write(self, idx: int, flag: str, expect_next_in_s: int) -> None:
        """Move the run's file forward to check-in `idx`. Raises OSError.

        A `failed` check-in is put beside the last one, which Aim's watcher goes on timing, unless
        the file system has no room for another name.
        """
        target = check_in_name(self.run_hash, idx, flag, time.time(), expect_next_in_s)
        older = sorted(self._names)
        if flag == FAILED and self._create_beside(target):
            older = []
        elif not (older and self._rename(older.pop(), target)):
            self._create(target)
        self._names.add(target)
        for name in older:
            self._remove(name)

    def _create_beside(self, name: str) -> bool:
        try:
            self._create(name)
        except OSError:
            return False
        return True

    def _rename(self, old: str, new: str) -> bool:
        try:
            os.rename(os.path.join(self.folder, old), os.path.join(self.folder, new))
        except FileNotFoundError:
            # Another thread moved it, or somebody tidied up; a new file says the same.
            self._names.discard(old)
            return False
        self._names.discard(old)
        return True

    def _create(self, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        os.close(os.open(os.path.join(self.folder, name), flags, 0o666))

    def _remove(self, name: str) -> None:
        try:
            os.unlink(os.path.join(self.folder, name))
        except OSError:
            pass  # a leftover with a lower number says nothing
        self._names.discard(name)


# ======================================================================================
# Run log
#
# Everything a run recorded, as JSON lines that one process appends with one write(2) each. What
# `append` returned from survives the death of the process; a torn or foreign line is skipped and
# counted, and never glued to the next record.
# ======================================================================================

LOG_FORMAT = 1
#: A longer line is not ours, and is skipped without being held in memory.
MAX_LINE_BYTES = 16 << 20
#: How much a run keeps in memory while its log cannot be written.
MAX_BACKLOG_BYTES = 64 << 20
#: How often an unwritable log is tried again.
RETRY_S = 1.0
_CHECKPOINT_START = b'{"checkpoint"'


class SeriesState:
    """What is known of one metric series without reading its points."""

    __slots__ = (
        "context",
        "count",
        "first_step",
        "id",
        "last",
        "last_epoch",
        "last_step",
        "last_time",
        "max",
        "min",
        "name",
    )

    def __init__(self, series_id: int, name: str, context: Dict[str, Any]) -> None:
        self.id = series_id
        self.name = name
        self.context = context
        self.count = 0
        self.min = math.nan
        self.max = math.nan
        self.last = math.nan
        self.first_step = 0
        self.last_step = 0
        self.last_epoch: Optional[float] = None
        self.last_time = 0.0

    def add(self, step: int, value: float, when: float, epoch: Optional[float]) -> None:
        """Count one point in. NaN takes part in `last`, never in `min` and `max`."""
        if not self.count:
            self.first_step = step
        # Written so that a NaN on either side gives way to a number.
        if not value >= self.min and value == value:
            self.min = value
        if not value <= self.max and value == value:
            self.max = value
        self.count += 1
        self.last = value
        self.last_step = step
        self.last_time = when
        self.last_epoch = epoch

    def to_list(self) -> List[Any]:
        """Return the series as a checkpoint holds it."""
        floats = [json_float(value) for value in (self.min, self.max, self.last)]
        steps = [self.first_step, self.last_step, self.last_epoch, self.last_time]
        return [self.id, self.name, self.context, self.count, *floats, *steps]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> SeriesState:
        """Read back what `to_list` gave. Raises ValueError or TypeError on anything else."""
        series_id, name, context, count, low, high, last, first_step, last_step, epoch, when = (
            values
        )
        if not isinstance(name, str) or not isinstance(context, dict):
            raise TypeError("a series needs a name and a context")
        series = cls(int(series_id), name, context)
        series.count = int(count)
        series.min, series.max, series.last = float(low), float(high), float(last)
        series.first_step, series.last_step = int(first_step), int(last_step)
        series.last_epoch = None if epoch is None else float(epoch)
        series.last_time = float(when)
        return series


def json_float(value: float) -> Union[float, str]:
    """Return `value`, or the string that stands for it where JSON has no number for it."""
    return value if math.isfinite(value) else repr(value)


class RunState:
    """Everything a run log says, less the points themselves.

    The writer keeps one beside its log and the reader builds one from the log, both with `apply`,
    so that what is read back is what the writer had.
    """

    def __init__(self, run_hash: str) -> None:
        self.hash = run_hash
        self.header: Dict[str, Any] = {}
        self.created_at = 0.0
        self.params: Dict[str, Any] = {}
        self.props: Dict[str, Any] = {}
        self.series: Dict[int, SeriesState] = {}
        self.end: Optional[Dict[str, Any]] = None
        self.errors: Deque[str] = deque(maxlen=5)
        self.next_idx = 1
        self.last_time = 0.0
        self.skipped = 0

    def apply(self, record: Any) -> bool:
        """Take one parsed line in; False where it is not a record of ours."""
        try:
            if type(record) is list:
                return self._apply_point(record)
            for key, handler in self._HANDLERS.items():
                if key in record:
                    handler(self, record)
                    return True
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
            pass
        return False

    def _seen(self, when: Any) -> None:
        self.last_time = max(self.last_time, float(when))

    def _apply_point(self, point: List[Any]) -> bool:
        epoch = point[4] if len(point) > 4 else None
        when = float(point[3])
        self.series[point[0]].add(int(point[1]), float(point[2]), when, epoch)
        self.last_time = max(self.last_time, when)
        return True

    def _apply_header(self, record: Dict[str, Any]) -> None:
        self._seen(record["created_at"])
        self.header = record
        self.created_at = float(record["created_at"])

    def _apply_resume(self, record: Dict[str, Any]) -> None:
        self._seen(record["resume"])
        self.header = {**self.header, **record}
        self.end = None

    def _apply_props(self, record: Dict[str, Any]) -> None:
        self.props.update(record["props"])

    def _apply_log(self, record: Dict[str, Any]) -> None:
        self._seen(record["time"])
        if record["log"] >= logging.ERROR:
            self.errors.append(str(record["message"]))

    def _apply_end(self, record: Dict[str, Any]) -> None:
        self._seen(record["time"])
        self.end = record
        self.next_idx = max(self.next_idx, int(record["idx"]) + 1)

    _HANDLERS: Dict[str, Callable[[RunState, Dict[str, Any]], None]] = {
        "format": _apply_header,
        "resume": _apply_resume,
        "props": _apply_props,
        "log": _apply_log,
        "end": _apply_end,
    }


class LogWriter:
    """Appends records to one run log, which the caller holds as its only writer.

    A record that the disk refuses waits in memory, in order, and is tried again with the next
    record at most once a second. When the buffer is full the oldest wait is given up and counted.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.dropped = 0
        self._backlog: Deque[bytes] = deque()
        self._backlog_bytes = 0
        self._retry_mono = 0.0
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o666)
        self.size = os.fstat(self._fd).st_size
        # A writer that was killed may have left half a line; the next record must not join it.
        self._torn = self.size > 0 and os.pread(self._fd, 1, self.size - 1) != b"\n"

    def append(self, record: Any) -> None:
        """Write one record as a line; keep it for later where that fails. Never raises OSError."""
        self.append_line(to_json(record).encode("ascii") + b"\n")

    def append_line(self, line: bytes) -> None:
        """Write one finished line, with the same promise as `append`."""
        if self._backlog or not self._write(line):
            self._backlog.append(line)
            self._backlog_bytes += len(line)
            while self._backlog_bytes > MAX_BACKLOG_BYTES:
                self._backlog_bytes -= len(self._backlog.popleft())
                self.dropped += 1
            self.flush()

    def flush(self, now: bool = False) -> bool:
        """Write what waits; True when nothing waits any more."""
        mono = time.monotonic()
        if self._backlog and (now or mono >= self._retry_mono):
            self._retry_mono = mono + RETRY_S
            while self._backlog and self._write(self._backlog[0]):
                self._backlog_bytes -= len(self._backlog.popleft())
            if not self._backlog:
                log.warning("%s can be written again (%d records lost)", self.path, self.dropped)
        return not self._backlog

    def sync(self) -> None:
        """Wait until what was written has reached the disk, as far as the disk tells."""
        with contextlib.suppress(OSError):
            os.fsync(self._fd)

    def _write(self, line: bytes) -> bool:
        data = b"\n" + line if self._torn else line
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            if not self._backlog:
                self._retry_mono = time.monotonic() + RETRY_S
                log.warning(
                    "cannot write %s: %s; records wait in memory", self.path, error.strerror
                )
            return False
        self._torn = written < len(data) and (written > 0 or self._torn)
        return written == len(data)

    def close(self) -> None:
        """Try once more to write what waits, and let go of the file."""
        if not self.flush(now=True):
            log.error("%s: %d records could not be written", self.path, len(self._backlog))
        os.close(self._fd)


def read_log(path: str, run_hash: str) -> RunState:
    """Return what the run log at `path` says. Raises OSError where it cannot be read.

    Reads the first line, then from the last checkpoint on: what a run has recorded since decides
    the cost, not what it ever recorded.
    """
    state = RunState(run_hash)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        start = _last_checkpoint(file.fileno(), info.st_size)
        lines = read_lines(file)
        if start:
            _apply_line(state, next(lines, (b"", True))[0])
            file.seek(start)
        for line, whole in lines:
            # A last line without its end is being written, or was torn; not counted as damage.
            if not _apply_line(state, line) and whole:
                state.skipped += 1
    return state


def read_lines(file: Any) -> Iterator[Tuple[bytes, bool]]:
    """Yield (line, whether it had its end), skipping lines of over MAX_LINE_BYTES in pieces."""
    while True:
        line = file.readline(MAX_LINE_BYTES)
        if not line:
            return
        whole = line.endswith(b"\n")
        if not whole and len(line) == MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            line, whole = b"", True
        yield line, whole


def _apply_line(state: RunState, line: bytes) -> bool:
    if line == b"\n":
        return True  # written by a resumed run to end its predecessor's torn line
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return state.apply(record)


def _last_checkpoint(fd: int, size: int) -> int:
    """Return the offset of the last line that starts a checkpoint, or 0. JSON strings hold no raw
    line break, so the bytes searched for stand nowhere else."""
    needle = b"\n" + _CHECKPOINT_START
    block, end = 1 << 18, size
    while end > 0:
        start = max(0, end - block)
        at = os.pread(fd, end - start + len(needle), start).rfind(needle)
        if at >= 0:
            return start + at + 1
        end = start
    return 0


# ======================================================================================
# Run
#
# What a training script holds. A wrong argument raises where it stands; after the constructor has
# returned, no failure of a disk or a share reaches the training loop. No thread is started, and a
# forked child does nothing to its parent's run.
# ======================================================================================

#: A promise of 0 is written again this often, so that people see the run alive.
IDLE_CHECK_IN_S = 30.0
#: How long a run that ends goes on trying to say so on a disk that refuses.
END_RETRIES, END_RETRY_S = 4, 0.5
#: How long a record waits for another thread's before it goes ahead.
LOCK_WAIT_S = 2.0
#: How long a lock on a run may be somebody's look at whether it is held.
PROBE_WAIT_S = 0.3
_MAX_FRAMES = 6
_monotonic = time.monotonic


def checked_expect_s(value: Any) -> float:
    """Return a promise in seconds as a float. Raises ArgumentTypeError or ArgumentError."""
    if isinstance(value, (str, bytes, bytearray, bool)):
        number = None
    else:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
    if number is None:
        raise ArgumentTypeError(
            f"expect_next_in must be a number of seconds, not {type(value).__name__} "
            f"({printable(repr(value), 60)}): use 0 for no promise"
        )
    if not 0 <= number <= MAX_EXPECT_S:
        raise ArgumentError(
            f"expect_next_in must be from 0 to {MAX_EXPECT_S} seconds (ten years), not {value!r}: "
            "use 0 for no promise"
        )
    return number


def checked_run_hash(value: Any) -> str:
    """Return a run hash that can stand in a file name. Raises ArgumentError."""
    if not isinstance(value, str) or not RUN_HASH.fullmatch(value):
        raise ArgumentError(
            f"run hash {printable(repr(value), 80)} cannot be used: "
            "it must be 1 to 64 letters, digits or underscores"
        )
    return value


def describe_session() -> Dict[str, Any]:
    """Return where this process runs, as the first line of a run log states it."""
    session: Dict[str, Any] = {
        "host": this_host(),
        "pid": os.getpid(),
        "user": os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid()),
        "argv": [str(argument)[:1000] for argument in getattr(sys, "argv", [])][:100],
        "python": "{}.{}.{}".format(*sys.version_info[:3]),
    }
    try:
        session["cwd"] = os.getcwd()
    except OSError:
        pass  # the folder is gone; the run is not
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        session["job"] = f"slurm {array}_{task}" if array and task else f"slurm {job}"
    elif os.environ.get("PBS_JOBID"):
        session["job"] = f"pbs {os.environ['PBS_JOBID']}"
    elif os.environ.get("LSB_JOBID"):
        session["job"] = f"lsf {os.environ['LSB_JOBID']}"
    return session


def describe_exception(error: BaseException) -> str:
    """Return an exception's type and message in one string; its `__str__` may itself fail."""
    try:
        message = str(error)
    except Exception:
        message = "<its message cannot be shown>"
    name = type(error).__qualname__
    return f"{name}: {message[:2000]}" if message else name


def last_frames(error: BaseException) -> List[str]:
    """Return the innermost frames of an exception, outermost first: `file:line in name: code`."""
    import traceback

    found = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    return [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in found]


class _Process:
    """What runs need of the process: its exit, its uncaught exception, its SIGTERM.

    Hooks are installed once and call whatever stood there before. They are inherited by forked
    children, where every run declines by its pid.
    """

    def __init__(self) -> None:
        self.runs: weakref.WeakSet[Run] = weakref.WeakSet()
        #: Marker path to the writing run, since a record lock does not exclude one's own process.
        self.writers: weakref.WeakValueDictionary[str, Run] = weakref.WeakValueDictionary()
        self._excepthook: Optional[Callable[..., Any]] = None
        self._sigterm: Any = None
        self._watches_exit = False

    def add(self, run: Run) -> None:
        """Watch over one more run."""
        self.runs.add(run)
        if not self._watches_exit:
            self._watches_exit = True
            atexit.register(self._at_exit)
            self._excepthook, sys.excepthook = sys.excepthook, self._on_uncaught
        if self._sigterm is None and threading.current_thread() is threading.main_thread():
            current = signal.getsignal(signal.SIGTERM)
            # None: a handler that is not Python's. Ignored: somebody's decision. Both are kept.
            if current is not None and current != signal.SIG_IGN:
                self._sigterm = current
                signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_uncaught(self, kind: Any, error: BaseException, trace: Any) -> None:
        if not _interactive():
            for run in list(self.runs):
                run._end_by_exception(error)
        if self._excepthook is not None:
            self._excepthook(kind, error, trace)

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        # Runs first, then the user's handler: it may never return, and people must be told.
        for run in list(self.runs):
            run._end(FAILED, "terminated by SIGTERM", _stack(frame))
        if callable(self._sigterm):
            self._sigterm(signum, frame)
        else:
            for run in list(self.runs):
                run._close_files()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def _at_exit(self) -> None:
        # Set even where somebody replaced our excepthook without calling it.
        error = None if _interactive() else getattr(sys, "last_value", None)
        for run in list(self.runs):
            run._at_exit(error if sys.excepthook != self._on_uncaught else None)


def _interactive() -> bool:
    """True at a prompt, where an uncaught exception ends a statement and not the process."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive or sys.flags.inspect)


def _stack(frame: Any) -> List[str]:
    import traceback

    found = traceback.extract_stack(frame)[-_MAX_FRAMES:]
    return [f"{item.filename}:{item.lineno} in {item.name}: {item.line}" for item in found]


_process = _Process()


class Run:
    """A training run: reports progress, and tells how it ended.

    Arguments:
        run_hash: the run to resume (1 to 64 letters, digits, underscores), or None for a new one.
        repo: the folder that holds `.aim`, or `.aim` itself; None: see `find_repo`.
        read_only: look at a run without writing; the run must exist.
        experiment: the experiment that the run belongs to.
        system_tracking_interval, log_system_params, capture_terminal_logs, force_resume: accepted
            so that scripts written for Aim run unchanged; without effect here.

    Raises ArgumentError for an impossible hash, RepoError where the repository cannot be used,
    RunBusyError where another process, or another object in this one, writes the run.
    """

    def __init__(
        self,
        run_hash: Optional[str] = None,
        *,
        repo: Optional[str] = None,
        read_only: bool = False,
        experiment: Optional[str] = None,
        system_tracking_interval: Optional[Union[int, float]] = None,
        log_system_params: Optional[bool] = False,
        capture_terminal_logs: Optional[bool] = False,
        force_resume: Optional[bool] = False,
    ) -> None:
        self._pid = 0  # so that __del__ finds a run that was never opened, whatever fails here
        self.hash = os.urandom(12).hex() if run_hash is None else checked_run_hash(run_hash)
        self.read_only = read_only
        self._paths = find_repo(None if repo is None else os.fspath(repo), create=not read_only)
        self._state = RunState(self.hash)
        self._window: Tuple[Any, float] = (None, 0.0)
        self._complained = False
        if read_only:
            self._read()
        else:
            self._open(run_hash is not None)
            if experiment is not None:
                self.experiment = experiment

    # ---------------------------------------------------------------- opening

    def _read(self) -> None:
        path = self._paths.run_log(self.hash)
        try:
            self._state = read_log(path, self.hash)
        except FileNotFoundError:
            raise RepoError(
                f"no run {self.hash} in {self._paths.root}: check the hash, or open it without "
                "read_only to start a run of that name"
            ) from None
        except OSError as error:
            raise RepoError(f"cannot read {path}: {error.strerror}") from None

    def _open(self, may_exist: bool) -> None:
        # Reentrant: the SIGTERM handler runs on top of whatever the main thread was doing.
        self._lock = threading.RLock()
        self._disk_lock = threading.RLock()
        self._disk_idx = -1
        self._deadline = 0.0
        self._promised = False
        self._ended: Optional[str] = None
        self._closed = False
        #: An exception that was being handled when the run began is none of the run's.
        self._outer_error = sys.exc_info()[1]
        marker = os.path.realpath(self._paths.marker(self.hash))
        other = _process.writers.get(marker)
        if other is not None and other._is_mine():
            raise RunBusyError(
                f"run {self.hash} is already open in this process: use that object, "
                "or close it first"
            )
        try:
            with contextlib.ExitStack() as undo:
                self._marker_fd = self._take_marker(marker)
                undo.callback(os.close, self._marker_fd)
                self._log = LogWriter(self._paths.run_log(self.hash))
                undo.callback(self._log.close)
                names = self._adopt() if may_exist else []
                self._file = CheckInFile(
                    self._paths.check_ins, self.hash, self._state.next_idx, names
                )
                self._record(self._session_record())
                self._write_check_in(STARTING, 0, 0.0, None, strict=True)
                undo.pop_all()
        except OSError as error:
            raise RepoError(
                f"cannot write to the repository at {self._paths.root}: "
                f"{error.filename or self.hash}: {error.strerror}: make it writable, or choose "
                "another folder with Run(repo=...) or $AIMWATCH_REPO"
            ) from None
        self._pid = os.getpid()
        _process.writers[marker] = self
        _process.add(self)

    def _session_record(self) -> Dict[str, Any]:
        now = round(time.time(), 3)
        if self._state.created_at:
            return {"resume": now, **describe_session()}
        return {"format": LOG_FORMAT, "hash": self.hash, "created_at": now, **describe_session()}

    def _take_marker(self, marker: str) -> int:
        """Lock `pending/<hash>`, which says that this process writes the run."""
        deadline = _monotonic() + PROBE_WAIT_S
        while True:
            fd = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            locked = try_lock(fd)
            if locked is False:
                os.close(fd)
                if _monotonic() > deadline:
                    raise RunBusyError(self._busy_message())
                time.sleep(0.02)
                continue
            try:
                current = os.stat(marker)
            except FileNotFoundError:
                current = None  # an indexer that held the lock removed it meanwhile
            if current is not None and os.path.samestat(current, os.fstat(fd)):
                break
            os.close(fd)
        if locked is None:
            log.warning(
                "%s: this file system has no record locks: a second writer of run %s would not "
                "be noticed",
                self._paths.pending,
                self.hash,
            )
        return fd

    def _busy_message(self) -> str:
        try:
            header = read_log(self._paths.run_log(self.hash), self.hash).header
        except OSError:
            header = {}
        return (
            f"run {self.hash} is being written by process {header.get('pid', '?')} on "
            f"{printable(str(header.get('host', '?')), 100)}: end that process first, or start a "
            "run of another hash"
        )

    def _adopt(self) -> List[str]:
        """Go on where an earlier process left this run, and return the check-ins that are ours."""
        if self._log.size:
            self._state = read_log(self._log.path, self.hash)
            if self._state.header.get("format", LOG_FORMAT) != LOG_FORMAT:
                raise RepoError(
                    f"run {self.hash} was written in format {self._state.header['format']!r} and "
                    f"this aimwatch writes format {LOG_FORMAT}: use the newer aimwatch"
                )
        names = []
        for name in os.listdir(self._paths.check_ins):
            parsed = parse_check_in(name) if name.startswith(self.hash) else None
            if parsed is not None and parsed.run_hash == self.hash:
                self._state.next_idx = max(self._state.next_idx, parsed.idx + 1)
                names.append(name)
        return names if self._log.size else []

    # ---------------------------------------------------------------- progress

    def report_progress(
        self, *, expect_next_in: Union[int, float] = 0, block: bool = False
    ) -> None:
        """Say that the run is alive and promise to say so again within `expect_next_in` seconds.

        Made for the innermost loop: a call that the check-in on disk already covers does not
        touch the disk. Never raises for a failing disk.

        Arguments:
            expect_next_in: seconds, int or float; 0 = no promise.
            block: write a check-in in any case.

        Raises ArgumentTypeError for something that is no number, ArgumentError for NaN, negative
        values and more than ten years.
        """
        covered, until_mono = self._window
        if expect_next_in == covered and _monotonic() < until_mono and not block:
            return
        self._report(expect_next_in, block)

    def _report(self, expect_next_in: Any, block: bool) -> None:
        expect_s = checked_expect_s(expect_next_in)
        if not self._may_write("report_progress"):
            return
        now = _monotonic()
        with self._disk_lock:
            margin_s = promise_margin_s(expect_s)
            # By how much the deadline on disk exceeds the one promised now; NaN: both are "none".
            over_s = self._deadline - (now + expect_s if expect_s else math.inf)
            if not block and self._ended is None and 0 <= over_s <= margin_s + 1:
                self._window = (expect_next_in, self._deadline - expect_s)
                return
        if self._ended is not None:
            self._reopen()
        self._promised = expect_s > 0
        self._write_check_in(CHECK_IN, expect_s, margin_s, expect_next_in)

    def _write_check_in(
        self, flag: str, expect_s: float, margin_s: float, asked: Any, strict: bool = False
    ) -> bool:
        """Write a check-in and note what it covers; no lock is held while it is written."""
        now = _monotonic()
        written_s = math.ceil(expect_s + margin_s) if expect_s else 0
        idx = self._file.next_idx()
        try:
            self._file.write(idx, flag, written_s)
        except OSError as error:
            if strict:
                raise
            if not self._complained:
                self._complained = True
                log.warning("cannot check in below %s: %s", self._paths.check_ins, error.strerror)
            self._window = (asked, now + RETRY_S)
            return False
        if self._complained:
            self._complained = False
            log.warning("checking in below %s works again", self._paths.check_ins)
        with self._disk_lock:
            if idx > self._disk_idx:
                self._disk_idx = idx
                self._deadline = now + written_s if written_s else math.inf
                until = now + (written_s - expect_s if written_s else IDLE_CHECK_IN_S)
                self._window = (asked if flag == CHECK_IN else None, until)
        return True

    def report_successful_finish(self, *, block: bool = True) -> None:
        """Say that the run reached its end. `block` is Aim's; the report is always written."""
        if self._may_write("report_successful_finish"):
            if self._ended == FAILED:
                self._reopen()
            self._end(FINISHED, None, [])

    # ---------------------------------------------------------------- properties

    @property
    def name(self) -> str:
        """The run's name; `Run: <hash>` until one is set."""
        return str(self._state.props.get("name") or f"Run: {self.hash}")

    @name.setter
    def name(self, value: str) -> None:
        self._set_props(name=_checked_text("name", value))

    @property
    def experiment(self) -> str:
        """The experiment that the run belongs to; `default` until one is set."""
        return str(self._state.props.get("experiment") or "default")

    @experiment.setter
    def experiment(self, value: str) -> None:
        self._set_props(experiment=_checked_text("experiment", value))

    def _set_props(self, **props: Any) -> None:
        if self._may_write(f"setting {', '.join(props)}"):
            self._record({"props": props})

    def _record(self, record: Dict[str, Any]) -> None:
        # Bounded: a thread that hangs in a write to a dead share must not hang SIGTERM with it.
        held = self._lock.acquire(timeout=LOCK_WAIT_S)
        try:
            self._state.apply(record)
            self._log.append(record)
        finally:
            if held:
                self._lock.release()

    # ---------------------------------------------------------------- the end

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        if self._is_mine():
            if error is not None:
                self._end_by_exception(error)
            self._finish_and_close()

    def close(self) -> None:
        """End the run: `failed` where an exception is being handled, `finished` otherwise, unless
        its end was already reported. Calling it again does nothing."""
        if self._is_mine():
            error = sys.exc_info()[1]
            if error is not None and error is not self._outer_error:
                self._end_by_exception(error)
            self._finish_and_close()

    def finalize(self) -> None:
        """Aim's other name for `close`."""
        self.close()

    def __del__(self) -> None:
        # The object was dropped while the process lives on; at its exit, _at_exit comes first.
        try:
            if self._is_mine():
                self._end_unreported("was dropped without reporting a successful finish")
        except Exception:
            pass  # at interpreter shutdown, what this needs may be gone

    def _at_exit(self, error: Optional[BaseException]) -> None:
        if self._is_mine():
            if error is not None:
                self._end_by_exception(error)
            self._end_unreported("exited without reporting a successful finish")

    def _end_unreported(self, reason: str) -> None:
        if self._promised:
            self._end(FAILED, reason, [])
        self._finish_and_close()

    def _finish_and_close(self) -> None:
        self._end(FINISHED, None, [])
        self._close_files()

    def _end_by_exception(self, error: BaseException) -> None:
        if isinstance(error, SystemExit):
            if error.code is None or error.code == 0:
                return
            self._end(FAILED, f"exited with status {error.code}", last_frames(error))
        else:
            self._end(FAILED, describe_exception(error), last_frames(error))

    def _end(self, flag: str, reason: Optional[str], frames: List[str]) -> None:
        """Record how the run ended, in its log and then as a check-in. The first end counts."""
        if not self._is_mine() or self._ended is not None:
            return
        self._ended = flag
        self._promised = False
        idx = self._file.next_idx()
        end: Dict[str, Any] = {"end": flag, "time": round(time.time(), 3), "idx": idx}
        if reason is not None:
            end.update(reason=reason, frames=frames)
        # The log first: who sees the check-in must find the reason.
        self._record(end)
        for retry in range(END_RETRIES):
            try:
                self._file.write(idx, flag, 0)
                return
            except OSError as error:
                log.warning(
                    "cannot report %s below %s: %s", flag, self._file.folder, error.strerror
                )
            time.sleep(END_RETRY_S if retry + 1 < END_RETRIES else 0)

    def _reopen(self) -> None:
        """Take a reported end back: the process lived through its SIGTERM, or goes on training."""
        self._record({"resume": round(time.time(), 3)})
        self._ended = None

    def _close_files(self) -> None:
        held = self._lock.acquire(timeout=LOCK_WAIT_S)
        try:
            if not self._closed:
                self._closed = True
                self._log.close()
                os.close(self._marker_fd)
        finally:
            if held:
                self._lock.release()

    # ---------------------------------------------------------------- who may write

    def _is_mine(self) -> bool:
        """True in the process that opened the run, until it is closed."""
        return self._pid == os.getpid() and not self._closed

    def _may_write(self, what: str) -> bool:
        """True where `what` may write. Raises AimwatchError for a run that was opened to read;
        says once why nothing is written for one that is closed or belongs to another process."""
        if self._is_mine():
            return True
        if self.read_only:
            raise AimwatchError(
                f"{what}: run {self.hash} was opened with read_only=True: open it without to write"
            )
        if not self._complained:
            self._complained = True
            why = "was closed"
            if self._pid != os.getpid():
                why = f"belongs to process {self._pid}, and this is a child of it"
            log.error("%s is ignored: run %s %s", what, self.hash, why)
        return False


def _checked_text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{what} must be a string, not {type(value).__name__}")
    return value


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
EVENTS = (STALLED, FAILED, RECOVERED, STARTED, FINISHED, LOG)
DEFAULT_EVENTS = (STALLED, FAILED, RECOVERED)
LOG_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
WORKPLACE_URL = "https://graph.facebook.com/v14.0"
#: The text that Aim puts into every new notifier, and that Aim's watcher needs there. It says
#: nothing of what happened, so ours is sent in its place.
AIM_DEFAULT_MESSAGE = "❗️ Something wrong with Run '{run.hash}'. Please check. ❗️"
#: What a message template may name, with what it stands for.
TEMPLATE_FIELDS = {
    "event": "stalled, failed, recovered, started, finished or log",
    "message": "the default message, whole",
    "repo": "the repository's path",
    "run.hash": "the run's hash",
    "run.name": "its name",
    "run.experiment": "its experiment",
    "run.host": "the machine it runs on",
    "run.pid": "its process there",
    "run.job": "its Slurm, PBS or LSF job",
    "run.user": "who started it",
    "run.last_seen": "when the watcher first saw its newest check-in",
    "run.promised": "within what time it promised to check in again",
    "run.silent": "for how long nothing new was seen",
    "run.process": "whether its process is there: gone, alive or unknown",
    "run.reason": "why it failed",
    "run.frames": "the innermost frames of the failure",
    "run.metrics": "its last metrics",
}
_TEMPLATE_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.]*)\}")


class Notifier(NamedTuple):
    """One notifier as configured. `problem` says why it cannot be used, or is None."""

    id: str
    type: str
    enabled: bool
    arguments: Dict[str, Any]
    events: Tuple[str, ...]
    problem: Optional[str]

    def secrets(self) -> List[str]:
        """Return the strings that must not be shown, the longest first."""
        found: Set[str] = set()
        for name, value in self.arguments.items():
            field = _field(self.type, name)
            if field is not None and field.secret and isinstance(value, str):
                found.add(value)
                # The request line and library errors show the path without the host.
                found.add(value.partition("://")[2].partition("/")[2])
        return sorted((secret for secret in found if len(secret) > 3), key=len, reverse=True)

    def scrub(self, text: str) -> str:
        """Return `text` with every secret of this notifier replaced by asterisks."""
        for secret in self.secrets():
            text = text.replace(secret, "***")
        return text


class Field(NamedTuple):
    """One argument of a notifier type: how it is asked for and checked."""

    name: str
    prompt: str
    secret: bool
    required: bool
    check: Callable[[str], str]


def checked_url(value: str) -> str:
    """Return an http(s) URL. Raises ConfigError, without showing the URL."""
    import urllib.parse

    value = value.strip()
    try:
        parts = urllib.parse.urlsplit(value)
        host = parts.hostname
        parts.port  # noqa: B018 - reading it is what checks it
    except ValueError:
        parts, host = urllib.parse.SplitResult("", "", "", "", ""), None
    if parts.scheme not in ("http", "https"):
        scheme = f"{printable(parts.scheme, 20)}:" if parts.scheme else "no scheme"
        raise ConfigError(f"the URL must start with https:// or http://, and this one has {scheme}")
    if not host or not re.fullmatch(r"[!-~]+", value):
        raise ConfigError(
            "the URL must name a host and hold no spaces, line breaks or non-ASCII characters"
        )
    return value


def checked_token(value: str) -> str:
    """Return a token that can stand in an HTTP header. Raises ConfigError, not showing it."""
    value = value.strip()
    if not re.fullmatch(r"[!-~]+", value):
        raise ConfigError(
            "the token must be one word of printable ASCII: it has a space, a line break or "
            "another character that cannot stand in an HTTP header, or it is empty"
        )
    return value


def checked_group(value: str) -> str:
    """Return a Workplace group ID. Raises ConfigError."""
    value = value.strip()
    if not re.fullmatch(r"[A-Za-z0-9_.]{1,64}", value):
        raise ConfigError(f"group ID {printable(repr(value), 60)}: it must be letters and digits")
    return value


def checked_template(value: str) -> str:
    """Return a message template. Raises ConfigError where it names an unknown field."""
    for name in _TEMPLATE_FIELD.findall(value):
        if name not in TEMPLATE_FIELDS:
            known = ", ".join("{%s}" % field for field in TEMPLATE_FIELDS)
            raise ConfigError(f"the message names {{{name}}}, which does not exist: use {known}")
    return value


_MESSAGE = Field(
    "message", "Message template (empty for the default)", False, False, checked_template
)
NOTIFIER_FIELDS: Dict[str, Tuple[Field, ...]] = {
    "slack": (Field("url", "Webhook URL", True, True, checked_url), _MESSAGE),
    "workplace": (
        Field("group_id", "Group ID", False, True, checked_group),
        Field("access_token", "Access token", True, True, checked_token),
        Field("base_url", "Graph API URL", False, False, checked_url),
        _MESSAGE,
    ),
    "logger": (_MESSAGE,),
}


def _field(kind: str, name: str) -> Optional[Field]:
    for field in NOTIFIER_FIELDS.get(kind, ()):
        if field.name == name:
            return field
    return None


def masked(kind: str, arguments: Dict[str, Any]) -> Dict[str, Any]:
    """Return a notifier's arguments as they may be shown. Of a type that we do not know, every
    value might be a secret."""
    shown = {}
    for name, value in arguments.items():
        field = _field(kind, name)
        if field is None or field.secret:
            scheme, found, rest = str(value).partition("://")
            value = (
                f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}/***" if found else "***"
            )
        shown[name] = value
    return shown


def read_notifier(notifier_id: str, raw: Any) -> Notifier:
    """Return one entry of config.json as a Notifier; what is wrong with it is its `problem`."""
    if not isinstance(raw, dict):
        return Notifier(notifier_id, "?", False, {}, (), "is not an object")
    kind = str(raw.get("type"))
    arguments = raw.get("arguments")
    problem: Optional[str] = None
    if kind not in NOTIFIER_FIELDS:
        problem = f"type {printable(kind, 40)!r} is not one of {', '.join(NOTIFIER_FIELDS)}"
    if not isinstance(arguments, dict):
        arguments, problem = {}, problem or "has no 'arguments' object"
    for field in NOTIFIER_FIELDS.get(kind, ()):
        try:
            value = arguments.get(field.name)
            if value is None or value == "":
                if field.required:
                    raise ConfigError(f"argument {field.name!r} is missing")
            elif not isinstance(value, (str, int)):
                raise ConfigError(f"argument {field.name!r} must be text")
            elif field is not _MESSAGE:  # an unknown field in a message is sent as it stands
                field.check(str(value))
        except ConfigError as error:
            problem = problem or str(error)
    events = raw.get("events", DEFAULT_EVENTS)
    if not isinstance(events, (list, tuple)) or not all(event in EVENTS for event in events):
        events, problem = (), problem or f"'events' must be a list of {', '.join(EVENTS)}"
    enabled = raw.get("status", "enabled") == "enabled"
    return Notifier(notifier_id, kind, enabled, arguments, tuple(events), problem)


class NotifierConfig:
    """The notifiers of a repository, as config.json holds them."""

    def __init__(self, paths: RepoPaths) -> None:
        self.path = paths.config
        self._lock_path = paths.config_lock
        self._folder = paths.notifications

    def read(self) -> Dict[str, Any]:
        """Return the file's content, or an empty configuration where there is no file.

        Raises ConfigError where the file is damaged, of another shape or unreadable.
        """
        try:
            raw = json.loads(read_bounded(self.path, MAX_LINE_BYTES).decode("utf-8"))
        except FileNotFoundError:
            return {"notifications": {"version": "1.0", "log_level": 30, "notifiers": {}}}
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
            raise ConfigError(
                f"{self.path} is not JSON{where}: mend it, or move it away and add the notifiers again"
            ) from None
        top = raw.get("notifications") if isinstance(raw, dict) else None
        if not isinstance(top, dict) or not isinstance(top.get("notifiers", {}), dict):
            raise ConfigError(
                f"{self.path} has another shape than "
                '{"notifications": {"notifiers": {...}}}: mend it, or move it away and add the '
                "notifiers again"
            )
        top.setdefault("notifiers", {})
        return raw  # type: ignore[no-any-return]

    def notifiers(self) -> List[Notifier]:
        """Return every notifier, usable or not. Raises ConfigError like `read`."""
        entries = self.read()["notifications"]["notifiers"]
        return [read_notifier(notifier_id, raw) for notifier_id, raw in entries.items()]

    def find(self, prefix: str, raw: Dict[str, Any]) -> str:
        """Return the ID that starts with `prefix`. Raises ConfigError for none or several."""
        ids = list(raw["notifications"]["notifiers"])
        found = [prefix] if prefix in ids else [item for item in ids if item.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        shown = printable(prefix, 60)
        if not found:
            raise ConfigError(f"no notifier {shown!r}: 'aim-watcher notifiers list' shows them")
        raise ConfigError(f"notifier {shown!r} is ambiguous: {', '.join(found)}")

    @contextlib.contextmanager
    def edit(self) -> Iterator[Dict[str, Any]]:
        """Yield the content for a change and write it back, under a lock and in one step."""
        try:
            os.makedirs(self._folder, exist_ok=True)
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                self._wait_for_lock(fd)
                raw = self.read()
                yield raw
                replace_file(self.path, (json.dumps(raw, indent=4) + "\n").encode(), 0o600)
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from None

    def _wait_for_lock(self, fd: int) -> None:
        deadline = time.monotonic() + 10
        while try_lock(fd) is False:
            if time.monotonic() > deadline:
                raise ConfigError(f"{self._lock_path} has been locked for 10 s: try again")
            time.sleep(0.02)


def fallback_notifier() -> Notifier:
    """Return the notifier used where none is configured."""
    return Notifier("logger", "logger", True, {}, DEFAULT_EVENTS, None)


# ======================================================================================
# Notifiers: messages
#
# From what is known of an event to the text that a person reads. Pure: no file, no socket. A
# template is filled by look-up alone, so that nothing in it or in a run's data is evaluated.
# ======================================================================================

Facts = Dict[str, str]
MAX_MESSAGE = 3000
#: How many runs a message names before it only counts them.
DIGEST_LINES = 20
_ICONS = {STALLED: "❗", FAILED: "❌", RECOVERED: "✅", FINISHED: "✅", TROUBLE: "❗"}


def fill_template(template: str, facts: Facts) -> str:
    """Return `template` with every known {field} replaced; unknown ones stand as they are."""

    def value(match: Any) -> str:
        name = match.group(1)
        if name not in TEMPLATE_FIELDS:
            return str(match.group())
        return default_message(facts) if name == "message" else facts.get(name, "")

    return _TEMPLATE_FIELD.sub(value, template)


def summary(facts: Facts) -> str:
    """Return one line that says which run and what happened."""
    event = facts.get("event", "")
    if event == TROUBLE:
        return f"{_ICONS[TROUBLE]} aimwatch: {facts.get('run.reason', '')}"
    name = facts.get("run.name") or facts.get("run.hash", "")
    text = f"{_ICONS.get(event, '')} Run '{name}' {_what_happened(event, facts)}"
    return text.strip()


def _what_happened(event: str, facts: Facts) -> str:
    silent, reason = facts.get("run.silent", ""), facts.get("run.reason", "")
    if event == STALLED:
        return f"stalled: silent for {silent}, promised a check-in within {facts['run.promised']}"
    if event == FAILED:
        return f"failed: {reason}" if reason else "failed"
    if event == RECOVERED:
        return f"recovered: {reason}"
    return event if event in (STARTED, FINISHED) else f"{event}: {reason}"


def default_message(facts: Facts) -> str:
    """Return the whole message about one event: what, which run, where, since when, how to look."""
    lines = [summary(facts)]
    if facts.get("event") != TROUBLE:
        lines.append(f"run {facts['run.hash']}{_with(', experiment {}', facts, 'run.experiment')}")
        where = _with("on {}", facts, "run.host") + _with(", process {}", facts, "run.pid")
        where += _with(", job {}", facts, "run.job") + _with(", user {}", facts, "run.user")
        lines.append(where.lstrip(", "))
        lines.append(_with("last seen {}", facts, "run.last_seen"))
        if facts.get("event") == STALLED:
            lines.append(_PROCESS_TEXT.get(facts.get("run.process", ""), ""))
        lines.append(_with("last metrics: {}", facts, "run.metrics"))
        lines.append(_with("{}", facts, "run.frames"))
    lines.append(f"look further: aim-watcher --repo {facts['repo']} status")
    return "\n".join(line for line in lines if line)


_PROCESS_TEXT = {
    "gone": "its process is gone",
    "alive": "its process is still there: it hangs, or is slower than it promised",
}


def _with(template: str, facts: Facts, name: str) -> str:
    value = facts.get(name, "")
    return template.format(value) if value else ""


def message_for(template: Optional[str], facts: Facts) -> str:
    """Return what one notifier says of one event.

    A user's template speaks for stalls and failures, as in Aim, and for everything where it names
    {event} or {message}; what it cannot mean is said in our words.
    """
    event = facts.get("event")
    if not template or template == AIM_DEFAULT_MESSAGE or event == TROUBLE:
        return default_message(facts)
    named = set(_TEMPLATE_FIELD.findall(template))
    if event in (STALLED, FAILED) or named & {"event", "message"}:
        return fill_template(template, facts)
    return default_message(facts)


def digest(template: Optional[str], batch: Sequence[Facts]) -> str:
    """Return one message about all events of `batch`: counted, what they share, the first few."""
    if len(batch) == 1:
        return message_for(template, batch[0])
    counts: Dict[str, int] = {}
    for facts in batch:
        counts[facts.get("event", "")] = counts.get(facts.get("event", ""), 0) + 1
    told = ", ".join(f"{count} {event}" for event, count in counts.items())
    lines = [f"{plural(len(batch), 'event')}: {told}"]
    for field, label in (
        ("run.host", "host"),
        ("run.experiment", "experiment"),
        ("run.job", "job"),
    ):
        values = {facts.get(field, "") for facts in batch}
        if len(values) == 1 and "" not in values:
            lines.append(f"all of {label} {values.pop()}")
    for facts in batch[:DIGEST_LINES]:
        host = _with(" on {}", facts, "run.host")
        lines.append(f"{summary(facts)} ({facts.get('run.hash', '')[:8]}{host})")
    if len(batch) > DIGEST_LINES:
        lines.append(f"and {len(batch) - DIGEST_LINES} more")
    lines.append(f"look further: aim-watcher --repo {batch[0]['repo']} status")
    return "\n".join(lines)


def shorten(text: str, limit: int = MAX_MESSAGE) -> str:
    """Return `text` cut to `limit` characters, never inside an escaped character."""
    if len(text) <= limit:
        return text
    cut = text[: limit - 4]
    if "&" in cut[-6:] and ";" not in cut[cut.rindex("&") :]:
        cut = cut[: cut.rindex("&")]
    return cut + "\n..."


def slack_escape(text: str) -> str:
    """Escape what Slack's format gives a meaning to (https://api.slack.com/reference/surfaces/
    formatting#escaping), so that no value mentions a channel or makes a link."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# ======================================================================================
# Notifiers: transports
#
# One attempt to deliver one text, bounded as a whole in time and in bytes read, and a judgement of
# what came back that is a function of the answer alone. Redirects are never followed.
# ======================================================================================

ATTEMPT_S = 10.0
MAX_ANSWER_BYTES = 1 << 16
MAX_BACK_OFF_S = 300.0
MAX_RETRY_AFTER_S = 3600.0
SENT, RETRY, BROKEN = "sent", "retry", "broken"


class Outcome(NamedTuple):
    """What became of an attempt. `wait_s` is how long the other side asked us to wait."""

    kind: str
    detail: str
    wait_s: float = 0.0


class Answer(NamedTuple):
    """An HTTP answer; header names in lower case, the body cut at MAX_ANSWER_BYTES."""

    status: int
    headers: Dict[str, str]
    body: str


#: An attempt leaves here how to break it off from another thread.
Closers = List[Callable[[], Any]]


def attempt(deliver: Callable[[Closers], Outcome], limit_s: float = ATTEMPT_S) -> Outcome:
    """Run one delivery for at most `limit_s` seconds, whatever it hangs in.

    Socket time-outs bound one operation; a name server that is silent and a server that sends one
    byte a second are only bounded by leaving the thread behind and closing what it reads from.
    """
    closers: Closers = []
    found: List[Outcome] = []

    def work() -> None:
        try:
            found.append(deliver(closers))
        except Exception as error:
            found.append(judge_error(error))

    thread = threading.Thread(target=work, name="aimwatch-attempt", daemon=True)
    thread.start()
    thread.join(limit_s)
    if found:
        return found[0]
    for close in closers:
        with contextlib.suppress(Exception):
            close()
    return Outcome(RETRY, f"no complete answer within {limit_s:g} s")


def judge_error(error: BaseException) -> Outcome:
    """Judge an attempt that ended in an exception: everything is tried again, since networks heal."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        error = reason
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return Outcome(RETRY, printable(f"{type(error).__name__}: {text}", 200))


def http_post(url: str, payload: Any, headers: Dict[str, str], closers: Closers) -> Answer:
    """POST `payload` as JSON and return the answer, whatever its status. Raises OSError and
    http.client.HTTPException. Proxies and CA bundles come from the usual variables."""
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: Any) -> None:
            return None

    def connect(factory: Any) -> Callable[..., Any]:
        def make(host: str, **kwargs: Any) -> Any:
            connection = factory(host, **kwargs)
            closers.append(lambda: connection.sock.shutdown(2))
            return connection

        return make

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, request: Any) -> Any:
            return self.do_open(connect(http.client.HTTPConnection), request)

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, request: Any) -> Any:
            bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
            context = ssl.create_default_context(cafile=bundle or None)
            factory = connect(http.client.HTTPSConnection)
            return self.do_open(factory, request, context=context)

    request = urllib.request.Request(url, json.dumps(payload).encode(), method="POST")
    request.add_header("Content-Type", "application/json; charset=utf-8")
    request.add_header("User-Agent", f"aimwatch/{__version__}")
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    opener = urllib.request.build_opener(Plain, Secure, NoRedirect)
    try:
        response = opener.open(request, timeout=ATTEMPT_S)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        body = response.read(MAX_ANSWER_BYTES).decode("utf-8", "replace")
        found = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status, found, body)


def retry_after_s(value: str, now_s: float) -> float:
    """Return the wait that a Retry-After header asks for, in seconds or as a date (RFC 9110
    10.2.3), at most MAX_RETRY_AFTER_S; 0 where it cannot be read."""
    import email.utils

    try:
        wait = (
            float(value)
            if value.strip().isdigit()
            else (email.utils.parsedate_to_datetime(value).timestamp() - now_s)
        )
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    return min(max(wait, 0.0), MAX_RETRY_AFTER_S)


def judge_status(answer: Answer, now_s: float) -> Optional[Outcome]:
    """Judge an HTTP status that means the same everywhere; None for a success."""
    said = printable(" ".join(answer.body.split()), 120)
    text = f"HTTP {answer.status}" + (f": {said}" if said else "")
    if answer.status == 429:
        wait = retry_after_s(answer.headers.get("retry-after", ""), now_s)
        return Outcome(RETRY, text, wait)
    if 300 <= answer.status < 400:
        return Outcome(BROKEN, f"HTTP {answer.status}: redirected; give the final URL")
    if answer.status in (401, 403, 404, 410):
        return Outcome(BROKEN, text)
    if not 200 <= answer.status < 300:
        return Outcome(RETRY, text)
    return None


def json_object(text: str) -> Optional[Dict[str, Any]]:
    """Return the JSON object that `text` is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def judge_slack(answer: Answer, now_s: float) -> Outcome:
    """Judge the answer of a Slack webhook, or of a server that speaks its format."""
    if "invalid_token" in answer.body:
        return Outcome(BROKEN, f"HTTP {answer.status}: invalid_token")
    wrong = judge_status(answer, now_s)
    if wrong is not None:
        return wrong
    if answer.status == 200:
        if answer.body.strip() == "ok":
            return Outcome(SENT, "HTTP 200: ok")
        found = json_object(answer.body)
        if found is not None and not found.get("error"):
            if found.get("ok", True) is not False and found.get("success", True) is not False:
                return Outcome(SENT, "HTTP 200 with a JSON object")
    said = printable(" ".join(answer.body.split()), 80)
    return Outcome(
        RETRY, f"HTTP {answer.status} without 'ok' (a proxy's or a portal's page?): {said}"
    )


def judge_workplace(answer: Answer, now_s: float) -> Outcome:
    """Judge the answer of the Graph API, whose error codes say more than the status
    (https://developers.facebook.com/docs/graph-api/guides/error-handling)."""
    found = json_object(answer.body) or {}
    if answer.status == 200 and found.get("id"):
        return Outcome(SENT, "HTTP 200 with an id")
    error = found.get("error")
    if isinstance(error, dict) and answer.status != 429 and answer.status < 500:
        said = printable(str(error.get("message", "")), 120)
        kind = RETRY if error.get("code") in (1, 2, 4) else BROKEN
        return Outcome(kind, f"Graph error {error.get('code')}: {said}")
    wrong = judge_status(answer, now_s)
    return wrong or Outcome(RETRY, f"HTTP {answer.status} without an id")


def send_slack(notifier: Notifier, batch: Sequence[Facts], closers: Closers) -> Outcome:
    """Post one message to a Slack webhook (https://api.slack.com/messaging/webhooks)."""
    safe = [{name: slack_escape(value) for name, value in facts.items()} for facts in batch]
    text = shorten(digest(notifier.arguments.get("message"), safe))
    answer = http_post(notifier.arguments["url"].strip(), {"text": text}, {}, closers)
    return judge_slack(answer, time.time())


def send_workplace(notifier: Notifier, batch: Sequence[Facts], closers: Closers) -> Outcome:
    """Post one message to a Workplace group's feed."""
    arguments = notifier.arguments
    base = (arguments.get("base_url") or WORKPLACE_URL).strip().rstrip("/")
    headers = {"Authorization": f"Bearer {arguments['access_token'].strip()}"}
    payload = {"message": shorten(digest(arguments.get("message"), batch))}
    url = f"{base}/{str(arguments['group_id']).strip()}/feed"
    return judge_workplace(http_post(url, payload, headers, closers), time.time())


def send_logger(notifier: Notifier, batch: Sequence[Facts], closers: Closers) -> Outcome:
    """Write every event to the log that the watcher writes."""
    for facts in batch:
        bad = facts.get("event") in (STALLED, FAILED, TROUBLE)
        text = message_for(notifier.arguments.get("message"), facts)
        text = "\n  ".join(printable(line, 1000) for line in text.split("\n"))
        log.log(logging.WARNING if bad else logging.INFO, "%s", text)
    return Outcome(SENT, "written to the log")


#: How each type delivers. A test of the command line checks that every type has fields and a way.
TRANSPORTS: Dict[str, Callable[[Notifier, Sequence[Facts], Closers], Outcome]] = {
    "slack": send_slack,
    "workplace": send_workplace,
    "logger": send_logger,
}


def deliver(notifier: Notifier, batch: Sequence[Facts]) -> Outcome:
    """Try once to tell `batch` to `notifier`; no secret stands in what is returned."""
    send = TRANSPORTS[notifier.type]
    outcome = attempt(lambda closers: send(notifier, batch, closers))
    return outcome._replace(detail=notifier.scrub(outcome.detail))


def back_off_s(failures: int, random: float) -> float:
    """Return how long to wait after that many failures in a row; `random` in [0, 1) spreads
    watchers that failed together."""
    return min(MAX_BACK_OFF_S, 2.0 ** min(failures - 1, 20)) * (0.75 + random / 2)


# ======================================================================================
# Outbox
#
# Every event is on disk, with the notifiers that must hear of it, before anything is sent, and
# every delivery after it was made. Killed at any instruction, the watcher finds here what is still
# to be told, and what was told already. One line holds an event for all its notifiers, so that no
# kill comes between two of them.
# ======================================================================================

#: Above this size the outbox is rewritten, at start, without what nobody can ask for any more.
COMPACT_BYTES = 1 << 20


class Event(NamedTuple):
    """Something to be told. The id names run, check-in and kind, so a second sight of the same
    event is the same event. `facts` are the fields of a message."""

    id: str
    kind: str
    facts: Facts


class Outbox:
    """The events of a repository and who was told of them. Safe for use by several threads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        #: Event id to the notifiers that were or are to be told.
        self._known: Dict[str, List[str]] = {}
        #: What is still to be told: event id to the event and the notifiers that wait for it.
        self._waiting: Dict[str, Tuple[Event, Set[str]]] = {}
        self._load()
        self._writer = LogWriter(path)

    def _load(self) -> None:
        try:
            with open(self.path, "rb") as file:
                for line, _ in read_lines(file):
                    self._apply(json_object(line.decode("utf-8", "replace")) or {})
        except FileNotFoundError:
            pass

    def _apply(self, record: Dict[str, Any]) -> None:
        try:
            if "event" in record:
                event = Event(record["event"], record["kind"], record.get("facts") or {})
                self._known[event.id] = list(record["to"])
                if event.facts and record["to"]:
                    self._waiting[event.id] = (event, set(record["to"]))
            elif "sent" in record:
                for event_id in record["sent"]:
                    self._settle(event_id, record["to"])
        except (KeyError, TypeError):
            pass  # a line of something else, or damage; what it stood for is told again at worst

    def _settle(self, event_id: str, notifier_id: str) -> None:
        waiting = self._waiting.get(event_id)
        if waiting is not None:
            waiting[1].discard(notifier_id)
            if not waiting[1]:
                del self._waiting[event_id]

    def knows(self, event_id: str) -> bool:
        """True where the event was put here before."""
        return event_id in self._known

    def known_ids(self) -> List[str]:
        """Return the ids of all events that were put here."""
        return list(self._known)

    def add(self, events: Sequence[Tuple[Event, List[str]]]) -> None:
        """Record events with the ids of the notifiers to tell, in one write that reaches the disk.

        Where the disk refuses, the lines wait in memory and the events are told all the same.
        """
        lines = []
        with self._lock:
            for event, notifier_ids in events:
                self._known[event.id] = notifier_ids
                if notifier_ids:
                    self._waiting[event.id] = (event, set(notifier_ids))
                lines.append(self._line(event, notifier_ids))
            self._write("".join(lines))

    @staticmethod
    def _line(event: Event, notifier_ids: Sequence[str], with_facts: bool = True) -> str:
        record: Dict[str, Any] = {"event": event.id, "kind": event.kind, "to": list(notifier_ids)}
        record["time"] = round(time.time(), 3)
        if with_facts:
            record["facts"] = event.facts
        return to_json(record) + "\n"

    def _write(self, lines: str) -> None:
        if lines:
            self._writer.append_line(lines.encode("ascii"))
            self._writer.sync()

    def sent(self, event_ids: Sequence[str], notifier_id: str) -> None:
        """Record that a notifier was told of events."""
        record = {"sent": list(event_ids), "to": notifier_id, "time": round(time.time(), 3)}
        with self._lock:
            for event_id in event_ids:
                self._settle(event_id, notifier_id)
            self._write(to_json(record) + "\n")

    def waiting_for(self, notifier_id: str) -> List[Event]:
        """Return what a notifier is still to be told, the oldest first."""
        with self._lock:
            return [event for event, ids in self._waiting.values() if notifier_id in ids]

    def is_waiting(self, event_id: str) -> bool:
        """True where somebody is still to be told of the event."""
        return event_id in self._waiting

    def forget_notifiers(self, keep: Set[str]) -> None:
        """Give up what waits for notifiers that were removed."""
        with self._lock:
            for event, ids in list(self._waiting.values()):
                for notifier_id in ids - keep:
                    self._settle(event.id, notifier_id)

    def compact(self, keep_id: Callable[[str], bool]) -> None:
        """Rewrite the file, where it has grown, with what still waits and the ids that `keep_id`
        wants. Called before anything is sent."""
        with self._lock:
            if self._writer.size < COMPACT_BYTES:
                return
            self._known = {
                item: to
                for item, to in self._known.items()
                if item in self._waiting or keep_id(item)
            }
            lines = []
            for event_id, notifier_ids in self._known.items():
                event, waiting = self._waiting.get(
                    event_id, (Event(event_id, "", {}), notifier_ids)
                )
                lines.append(self._line(event, sorted(waiting), event_id in self._waiting))
            self._writer.close()
            replace_file(self.path, "".join(lines).encode("ascii"))
            self._writer = LogWriter(self.path)

    def flush(self) -> None:
        """Try again to write what the disk refused."""
        with self._lock:
            self._writer.flush()

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._writer.close()


class Courier(threading.Thread):
    """Tells one notifier what waits for it, alone in its thread: what hangs here delays nobody."""

    def __init__(self, notifier: Notifier, outbox: Outbox) -> None:
        super().__init__(name=f"aimwatch-{notifier.type}", daemon=True)
        self.notifier = notifier
        self._outbox = outbox
        self._changed = threading.Condition()
        self._queue: Deque[Event] = deque(outbox.waiting_for(notifier.id))
        self._stopping = False
        self._failures = 0
        self._broken = False
        self._tried = not self._queue

    def submit(self, events: Sequence[Event]) -> None:
        """Queue events that the outbox already holds."""
        with self._changed:
            self._queue.extend(events)
            self._tried = False
            self._changed.notify_all()

    def stop(self) -> None:
        """End after the attempt in flight, without waiting for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def wait_tried(self, deadline_mono: float) -> bool:
        """Wait until everything queued was sent, or tried once in vain; False when time ran out."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._tried, max(0.0, deadline_mono - time.monotonic())
            )

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._queue)
                if self._stopping:
                    return
                batch = list(self._queue)
            self._rest(self._deliver(batch))

    def _deliver(self, batch: List[Event]) -> float:
        """Tell `batch` in one message and return how long to rest."""
        outcome = deliver(self.notifier, [event.facts for event in batch])
        name = f"{self.notifier.type} {self.notifier.id[:8]}"
        if outcome.kind == SENT:
            self._outbox.sent([event.id for event in batch], self.notifier.id)
            if self._failures:
                log.info("notifier %s is reached again", name)
            rest_s = MIN_POST_GAP_S if self.notifier.type in ("slack", "workplace") else 0.0
        else:
            rest_s = max(back_off_s(self._failures + 1, _random()), outcome.wait_s)
            broken = outcome.kind == BROKEN
            if broken:
                rest_s = BROKEN_RETRY_S
            if not self._failures or broken != self._broken:
                then = "mend it with 'notifiers'; what waits is kept" if broken else "trying again"
                log.warning("notifier %s: %s; %s", name, outcome.detail, then)
            self._broken = broken
        with self._changed:
            if outcome.kind == SENT:
                for _ in batch:
                    self._queue.popleft()
                self._failures = 0
            else:
                self._failures += 1
            self._tried = not self._queue or outcome.kind != SENT
            self._changed.notify_all()
        return rest_s

    def _rest(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, seconds)


#: At least this long between two posts to one webhook.
MIN_POST_GAP_S = 1.0
#: A notifier whose address or token is refused is tried again this often, and when it is changed.
BROKEN_RETRY_S = 3600.0


def _random() -> float:
    return int.from_bytes(os.urandom(4), "big") / 2**32


class Dispatcher:
    """Hands events to the notifiers that want them, and follows changes of config.json."""

    def __init__(self, paths: RepoPaths, outbox: Outbox, config: NotifierConfig) -> None:
        self._paths = paths
        self._outbox = outbox
        self._config = config
        self._stamp: Any = None
        self._couriers: Dict[str, Courier] = {}
        self._retired: List[Courier] = []

    def load(self) -> None:
        """Read the configuration. Raises ConfigError; what was in force stays in force."""
        self._stamp = self._stat()
        notifiers = self._config.notifiers()
        for notifier in notifiers:
            if notifier.problem and notifier.enabled:
                log.error("notifier %s %s; it is not used", notifier.id[:8], notifier.problem)
        usable = {item.id: item for item in notifiers if item.enabled and not item.problem}
        if not usable:
            fallback = fallback_notifier()
            usable = {fallback.id: fallback}
        for notifier_id, courier in list(self._couriers.items()):
            if usable.get(notifier_id) != courier.notifier:
                courier.stop()
                self._retired.append(self._couriers.pop(notifier_id))
        self._retired = [courier for courier in self._retired if courier.is_alive()]
        self._outbox.forget_notifiers({item.id for item in notifiers} | set(usable))
        for notifier_id, notifier in usable.items():
            if notifier_id not in self._couriers:
                self._start(notifier)

    def _start(self, notifier: Notifier) -> None:
        courier = self._couriers[notifier.id] = Courier(notifier, self._outbox)
        courier.start()

    def _stat(self) -> Any:
        try:
            info = os.stat(self._config.path)
        except OSError:
            return None
        return info.st_mtime_ns, info.st_size, info.st_ino

    def reload_if_changed(self) -> None:
        """Take up a changed configuration; a broken one is reported and the last good one kept."""
        if self._stat() != self._stamp:
            try:
                self.load()
                log.info("notifiers reloaded: %s", self.describe())
            except ConfigError as error:
                log.error("%s; the last good configuration stays in force", error)

    def describe(self) -> str:
        """Return who is told, for people: `slack 5c42d699, logger`."""
        names = [
            item.notifier.type
            if item.notifier.id == item.notifier.type
            else f"{item.notifier.type} {item.notifier.id[:8]}"
            for item in self._couriers.values()
        ]
        return ", ".join(names)

    def wanted(self, kind: str) -> bool:
        """True where some notifier wants events of this kind."""
        return kind == TROUBLE or any(
            kind in item.notifier.events for item in self._couriers.values()
        )

    def tell(self, events: Sequence[Event]) -> None:
        """Put new events into the outbox, for good, and then hand them to their couriers."""
        entries = []
        for event in events:
            to = [
                notifier_id
                for notifier_id, courier in self._couriers.items()
                if event.kind == TROUBLE or event.kind in courier.notifier.events
            ]
            entries.append((event, to))
        self._outbox.add(entries)
        for notifier_id, courier in self._couriers.items():
            courier.submit([event for event, to in entries if notifier_id in to])

    def drain(self, limit_s: float) -> None:
        """Wait until everything was sent or tried once, at most `limit_s` seconds."""
        deadline = time.monotonic() + limit_s
        for courier in self._couriers.values():
            courier.wait_tried(deadline)

    def stop(self, limit_s: float) -> None:
        """End the couriers; what is in flight gets `limit_s` seconds, and is told again if it
        needs longer."""
        deadline = time.monotonic() + limit_s
        for courier in self._couriers.values():
            courier.stop()
        for courier in self._couriers.values():
            courier.join(max(0.0, deadline - time.monotonic()))


# ======================================================================================
# Watcher
#
# Whether a run is stalled is a function of what was seen, of how long the watcher has looked, and
# of the grace; no clock of another machine takes part. A poll costs one listing and what changed
# since the last. The table and the clock are pure; Watcher reads files and sleeps.
# ======================================================================================

RUNNING = "running"
DEFAULT_GRACE_S, DEFAULT_POLL_INTERVAL_S = 100.0, 1.0
#: A gap of more than this, and nobody is accused until the watcher has looked for another while.
GAP_S, HOLD_S = 10.0, 30.0
#: A listing that takes longer than this was not looking, it was waiting for the file system.
MAX_LISTING_S = 10.0
#: A run whose check-in is missing from this many listings is gone, and not just being renamed.
MISSING_POLLS = 3
#: How long the check-ins of ended runs stay, for `status` and for Aim's watcher to see.
KEEP_FINISHED_S, KEEP_FAILED_S = 600.0, 86400.0
#: watcher.json is written when its last writing was this many times its own cost ago.
SAVE_COST_FACTOR, MAX_SAVE_INTERVAL_S = 100.0, 10.0


class LookingClock:
    """Seconds for which the watcher has been looking at the repository.

    Advances only while it looks: what exceeds the time that a step can honestly take was a gap
    (the process suspended, the machine asleep, the share gone), and a gap is nobody's silence.
    """

    def __init__(self, grace_s: float) -> None:
        self.total_s = 0.0
        self.hold_until_s = 0.0
        self._hold_s = min(grace_s, HOLD_S)
        self._last_mono: Optional[float] = None
        self._gap_s = 0.0

    def look(self, now_mono: float, at_most_s: float) -> None:
        """Count the time since the last call, up to `at_most_s`; the rest is a gap."""
        passed = 0.0 if self._last_mono is None else max(0.0, now_mono - self._last_mono)
        self._last_mono = now_mono
        self.total_s += min(passed, at_most_s)
        if passed > at_most_s:
            self.gap(passed - at_most_s)
        elif at_most_s:
            self._gap_s = 0.0

    def gap(self, seconds: float) -> None:
        """Note that the watcher did not look for that long."""
        self._gap_s += seconds
        if self._gap_s > GAP_S:
            self.hold_until_s = self.total_s + self._hold_s

    @property
    def accuses(self) -> bool:
        """False for a while after a gap: who could not read could often not be written to."""
        return self.total_s >= self.hold_until_s


class Seen:
    """What the watcher knows of one run; `since_s` is on its looking clock."""

    __slots__ = (
        "flag",
        "idx",
        "name",
        "promise_s",
        "queued_s",
        "run",
        "since_s",
        "since_utc",
        "state",
        "utc",
    )

    def __init__(self, check_in: CheckIn, name: str, now_s: float, now_utc: float) -> None:
        self.run = check_in.run_hash
        self.state = _FLAG_STATES[check_in.flag]
        self.queued_s = math.inf
        self.take(check_in, name, now_s, now_utc)

    def take(self, check_in: CheckIn, name: str, now_s: float, now_utc: float) -> None:
        """Note a newer check-in, seen now."""
        self.idx, self.flag, self.utc = check_in.idx, check_in.flag, check_in.utc
        self.promise_s = check_in.expect_next_in_s
        self.name = name
        self.since_s = now_s
        self.since_utc = now_utc

    def to_list(self) -> List[Any]:
        """Return what watcher.json keeps."""
        return [self.name, round(self.since_s, 3), round(self.since_utc, 3), self.state]

    @classmethod
    def from_list(cls, values: Any) -> Optional[Seen]:
        """Read back what `to_list` gave; None for anything else."""
        try:
            name, since_s, since_utc, state = values
            check_in = parse_check_in(name)
            if check_in is None or check_in.flag not in _FLAG_STATES or state not in _STATES:
                return None
            seen = cls(check_in, name, float(since_s), float(since_utc))
        except (TypeError, ValueError):
            return None
        seen.state = state
        return seen


_FLAG_STATES = {STARTING: RUNNING, CHECK_IN: RUNNING, FINISHED: FINISHED, FAILED: FAILED}
_STATES = {RUNNING, STALLED, FINISHED, FAILED}
#: What is to be told when a run's state changes; a state that is not the old one's key says nothing.
_CHANGES = {
    (None, RUNNING): (STARTED,),
    (None, FINISHED): (FINISHED,),
    (None, FAILED): (FAILED,),
    (RUNNING, FINISHED): (FINISHED,),
    (RUNNING, FAILED): (FAILED,),
    (STALLED, RUNNING): (RECOVERED,),
    (STALLED, FINISHED): (RECOVERED, FINISHED),
    (STALLED, FAILED): (FAILED,),
    (FINISHED, RUNNING): (STARTED,),
    (FINISHED, FAILED): (FAILED,),
    (FAILED, RUNNING): (RECOVERED,),
    (FAILED, FINISHED): (RECOVERED, FINISHED),
    (FAILED, FAILED): (FAILED,),
}


class Change(NamedTuple):
    """A change to tell: of which run, what, after how many seconds of silence, and from what."""

    kind: str
    seen: Seen
    silent_s: float
    old_state: Optional[str]

    @property
    def id(self) -> str:
        """The event's id; `utc` tells two lives of a run apart whose numbers begin anew."""
        return f"{self.seen.run}-{self.seen.idx}-{self.seen.utc}-{self.kind}"


class RunTable:
    """The state of every run, from listings of `check_ins`. Pure: no file, no clock.

    `reported` collects names that state nothing, for the caller to say so once.
    """

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.runs: Dict[str, Seen] = {}
        self.reported: List[str] = []
        self.names: Set[str] = set()
        self._due: List[Tuple[float, str]] = []
        self._missing: Dict[str, int] = {}

    def restore(self, seen: Seen) -> None:
        """Take in what an earlier watcher knew."""
        self.runs[seen.run] = seen
        self._queue(seen)

    def deadline_s(self, seen: Seen) -> float:
        """Return when, on the looking clock, a run's silence is too long; never for no promise."""
        if seen.state != RUNNING or not seen.promise_s:
            return math.inf
        return seen.since_s + seen.promise_s + self.grace_s

    def _queue(self, seen: Seen) -> None:
        # One entry a run: a later deadline is found when the earlier one comes up.
        deadline = self.deadline_s(seen)
        if deadline < seen.queued_s:
            seen.queued_s = deadline
            heapq.heappush(self._due, (deadline, seen.run))

    def take(
        self, listing: Iterable[str], now_s: float, now_utc: float, first: bool = False
    ) -> List[Change]:
        """Compare a listing with the last one and return what changed. At first sight of a
        repository (`first`) what was there before is noted and not told."""
        names = set(listing)
        fresh = names - self.names
        gone = self.names - names if len(names) - len(fresh) < len(self.names) else ()
        self.names = names
        newest: Dict[str, Tuple[CheckIn, str]] = {}
        for name in fresh:
            check_in = self._parse(name)
            if check_in is not None:
                best = newest.get(check_in.run_hash)
                if best is None or best[0].idx < check_in.idx:
                    newest[check_in.run_hash] = (check_in, name)
        changes: List[Change] = []
        for check_in, name in newest.values():
            changes += self._advance(check_in, name, now_s, now_utc)
        if gone or self._missing:
            self._note_missing(gone)
        return [] if first else changes

    def _parse(self, name: str) -> Optional[CheckIn]:
        check_in = parse_check_in(name)
        if check_in is not None and check_in.flag in _FLAG_STATES:
            return check_in
        if check_in is None or check_in.flag not in AIM_ONLY_FLAGS:
            self.reported.append(name)
        return None

    def _advance(self, check_in: CheckIn, name: str, now_s: float, now_utc: float) -> List[Change]:
        seen = self.runs.get(check_in.run_hash)
        old_state = None if seen is None else seen.state
        silent_s = 0.0 if seen is None else now_s - seen.since_s
        if seen is None:
            seen = self.runs[check_in.run_hash] = Seen(check_in, name, now_s, now_utc)
        elif check_in.idx > seen.idx or check_in.run_hash in self._missing:
            self._missing.pop(check_in.run_hash, None)
            if name == seen.name:
                return []
            seen.take(check_in, name, now_s, now_utc)
            seen.state = _FLAG_STATES[check_in.flag]
        else:
            return []
        self._queue(seen)
        kinds = _CHANGES.get((old_state, seen.state), ())
        if (old_state, check_in.flag) == (RUNNING, STARTING):
            kinds = (STARTED,)
        return [Change(kind, seen, silent_s, old_state) for kind in kinds]

    def _note_missing(self, gone: Iterable[str]) -> None:
        for name in gone:
            seen = self.runs.get(name.partition("-")[0])
            if seen is not None and seen.name == name:
                self._missing[seen.run] = 0
        for run in self._missing:
            self._missing[run] += 1

    def vanished(self) -> List[str]:
        """Return the runs whose check-in has been missing for MISSING_POLLS listings, after which
        any other check-in of theirs counts."""
        return [run for run, polls in self._missing.items() if polls == MISSING_POLLS]

    def forget(self, run: str) -> None:
        """Drop a run that is not there any more."""
        self.runs.pop(run, None)
        self._missing.pop(run, None)

    def overdue(self, now_s: float) -> List[Change]:
        """Return the runs whose silence became too long by `now_s`; they are stalled now."""
        changes = []
        while self._due and self._due[0][0] <= now_s:
            _, run = heapq.heappop(self._due)
            seen = self.runs.get(run)
            if seen is None:
                continue
            seen.queued_s = math.inf
            if self.deadline_s(seen) <= now_s:
                seen.state = STALLED
                changes.append(Change(STALLED, seen, now_s - seen.since_s, RUNNING))
            else:
                self._queue(seen)
        return changes


def writer_state(paths: RepoPaths, run_hash: str) -> str:
    """Return whether the process that writes a run is `alive` or `gone`, by its lock on
    `pending/<hash>`; `unknown` for a run that is not ours or where locks do not work."""
    try:
        fd = os.open(paths.marker(run_hash), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return "gone" if os.path.exists(paths.run_log(run_hash)) else "unknown"
    except OSError:
        return "unknown"
    try:
        return {True: "gone", False: "alive", None: "unknown"}[try_lock(fd)]
    except OSError:
        return "unknown"
    finally:
        os.close(fd)


def describe_metrics(state: RunState, limit: int = 5) -> str:
    """Return the newest metrics of a run: `loss=0.12 (step 400, subset=train), ...`."""
    newest = sorted(state.series.values(), key=lambda item: -item.last_time)[:limit]
    shown = []
    for series in newest:
        if series.count:
            context = "".join(f", {key}={value}" for key, value in sorted(series.context.items()))
            shown.append(f"{series.name}={series.last:.6g} (step {series.last_step}{context})")
    return printable(", ".join(shown))


def run_facts(paths: RepoPaths, run_hash: str) -> Facts:
    """Return what a run's own log says of it, as message fields; the hash alone for Aim's runs."""
    facts = {"run.hash": run_hash, "run.name": run_hash, "repo": paths.root}
    try:
        state = read_log(paths.run_log(run_hash), run_hash)
    except OSError:
        return facts
    for field in ("host", "pid", "job", "user"):
        if state.header.get(field) is not None:
            facts[f"run.{field}"] = printable(str(state.header[field]), 100)
    facts["run.name"] = printable(str(state.props.get("name") or run_hash), 100)
    facts["run.experiment"] = printable(str(state.props.get("experiment") or ""), 100)
    facts["run.metrics"] = describe_metrics(state)
    if state.end is not None:
        facts["run.reason"] = printable(str(state.end.get("reason") or ""))
        frames = state.end.get("frames")
        if isinstance(frames, list):
            facts["run.frames"] = "\n".join(
                f"  {printable(str(frame), 200)}" for frame in frames[-6:]
            )
    return facts


def change_facts(paths: RepoPaths, change: Change) -> Facts:
    """Return the message fields for one change of a run's state."""
    seen = change.seen
    facts = run_facts(paths, seen.run)
    facts["event"] = change.kind
    facts["run.last_seen"] = local_time(seen.since_utc)
    facts["run.promised"] = human_s(seen.promise_s) if seen.promise_s else ""
    facts["run.silent"] = human_s(change.silent_s)
    if change.kind == STALLED:
        facts["run.process"] = writer_state(paths, seen.run)
    if change.kind == RECOVERED:
        how = "finished" if seen.state == FINISHED else "checked in again"
        after = (
            "it had failed"
            if change.old_state == FAILED
            else f"{human_s(change.silent_s)} of silence"
        )
        facts["run.reason"] = f"{how} after {after}"
        facts.pop("run.frames", None)
    return {name: value for name, value in facts.items() if value}


def boot_id() -> str:
    """Return what identifies this boot of this machine: within one, monotonic clocks compare."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return this_host()


def read_watcher_file(paths: RepoPaths) -> Dict[str, Any]:
    """Return the content of watcher.json; {} where it is missing or damaged."""
    try:
        return json_object(read_bounded(paths.watcher, 1 << 30).decode("utf-8", "replace")) or {}
    except OSError:
        return {}


class Watcher:
    """Watches one repository and tells what happens; `clock` and `utc` are arguments for tests.

    Raises RepoError where another watcher holds the repository or its files cannot be written,
    ConfigError where the notifiers cannot be read.
    """

    def __init__(
        self,
        paths: RepoPaths,
        grace_s: float = DEFAULT_GRACE_S,
        poll_interval_s: float = DEFAULT_POLL_INTERVAL_S,
        once: bool = False,
        clock: Callable[[], float] = time.monotonic,
        utc: Callable[[], float] = time.time,
    ) -> None:
        self.paths = paths
        self.table = RunTable(grace_s)
        self.looking = LookingClock(grace_s)
        self.poll_interval_s = poll_interval_s
        self._once = once
        self._clock, self._utc = clock, utc
        self._started_utc = utc()
        self._reported: Set[str] = set()
        self._blind_since: Optional[float] = None
        self._told_blind = False
        self._saved_mono, self._save_cost_s = -math.inf, 0.0
        self._swept_s = 0.0
        paths.create()
        self._lock_fd = self._take_lock()
        try:
            self.outbox = Outbox(paths.outbox)
            self.dispatcher = Dispatcher(paths, self.outbox, NotifierConfig(paths))
            self._restore()
            self.dispatcher.load()
        except OSError as error:
            os.close(self._lock_fd)
            raise RepoError(f"cannot use {error.filename or paths.own}: {error.strerror}") from None
        except BaseException:
            os.close(self._lock_fd)
            raise

    def _take_lock(self) -> int:
        path = self.paths.watcher_lock
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            locked = try_lock(fd)
            if locked is False:
                time.sleep(PROBE_WAIT_S)  # it may be `status`, looking whether somebody watches
                locked = try_lock(fd)
        except OSError as error:
            raise RepoError(f"cannot lock {path}: {error.strerror}") from None
        if locked is False:
            os.close(fd)
            raise RepoError(f"{describe_watcher(self.paths)} already watches {self.paths.root}")
        if locked is None:
            log.warning(
                "%s: this file system has no record locks: make sure that no second "
                "watcher is started",
                path,
            )
        return fd

    def _restore(self) -> None:
        """Go on where the last watcher stopped; its looking counts, the time between does not."""
        saved = read_watcher_file(self.paths)
        self._first = not saved and not self.outbox.known_ids()
        looked_s, hold_s = saved.get("looked_s"), saved.get("hold_until_s")
        if isinstance(looked_s, (int, float)) and isinstance(hold_s, (int, float)):
            self.looking.total_s, self.looking.hold_until_s = float(looked_s), float(hold_s)
        between_s = self._time_since(saved)
        if self._once and between_s is not None:
            self.looking.total_s += between_s
        elif saved and not self._once:
            self.looking.gap(GAP_S + 1 if between_s is None else between_s)
        runs = saved.get("runs")
        for values in runs if isinstance(runs, list) else ():
            seen = Seen.from_list(values)
            if seen is not None:
                # The outbox is written first, so it may know of a stall that watcher.json missed.
                if seen.state == RUNNING and self.outbox.knows(Change(STALLED, seen, 0, None).id):
                    seen.state = STALLED
                self.table.restore(seen)
        if saved:
            known = self.table.runs
            self.outbox.compact(lambda event_id: event_id.partition("-")[0] in known)

    def _time_since(self, saved: Dict[str, Any]) -> Optional[float]:
        """Return the seconds since watcher.json was written, None where no clock can tell."""
        mono = saved.get("mono")
        if saved.get("boot") != boot_id() or not isinstance(mono, (int, float)):
            return None
        return max(0.0, self._clock() - mono)

    def poll(self) -> List[Change]:
        """Look once, and tell what changed. Never raises for a repository that cannot be read."""
        before = self._clock()
        try:
            listing = os.listdir(self.paths.check_ins)
        except OSError as error:
            self._note_blind(error)
            return []
        after = self._clock()
        if self._blind_since is None:
            self.looking.look(before, self.poll_interval_s + 1)
            self.looking.look(after, MAX_LISTING_S)
        else:
            self._note_sight(after)
        changes = self.table.take(listing, self.looking.total_s, self._utc(), self._first)
        self._first = False
        if self.looking.accuses:
            changes += self.table.overdue(self.looking.total_s)
        self._report_names()
        self.dispatcher.reload_if_changed()
        self._tell(changes)
        for run in self.table.vanished():
            # A run of ours whose log is there has lost its check-in, not its life.
            if not os.path.exists(self.paths.run_log(run)):
                self.table.forget(run)
        self._sweep()
        self.outbox.flush()
        self.looking.look(self._clock(), MAX_LISTING_S)
        self._save()
        return changes

    def _tell(self, changes: Sequence[Change]) -> None:
        events = [
            Event(change.id, change.kind, change_facts(self.paths, change))
            for change in changes
            if self.dispatcher.wanted(change.kind) and not self.outbox.knows(change.id)
        ]
        if events:
            self.dispatcher.tell(events)

    def _tell_trouble(self, what: str, reason: str) -> None:
        utc = self._utc()
        facts = {"event": TROUBLE, "run.reason": reason, "repo": self.paths.root}
        self.dispatcher.tell([Event(f"{what}-{utc:.2f}", TROUBLE, facts)])

    def _note_blind(self, error: OSError) -> None:
        now = self._clock()
        if self._blind_since is None:
            self._blind_since = now
            log.error("cannot list %s: %s", self.paths.check_ins, error.strerror)
        self.looking.look(now, 0.0)
        if not self._told_blind and now - self._blind_since > HOLD_S:
            self._told_blind = True
            self._tell_trouble(
                "unreachable",
                f"the repository {self.paths.root} cannot be read for {human_s(HOLD_S)} "
                f"({error.strerror}): no run in it is watched until it can",
            )

    def _note_sight(self, now: float) -> None:
        assert self._blind_since is not None
        blind_s, self._blind_since = now - self._blind_since, None
        self.looking.look(now, 0.0)
        log.warning("%s can be read again after %s", self.paths.check_ins, human_s(blind_s))
        if self._told_blind:
            self._told_blind = False
            self._tell_trouble(
                "reachable",
                f"the repository {self.paths.root} can be read again after {human_s(blind_s)}; "
                "its runs are watched",
            )

    def _report_names(self) -> None:
        for name in self.table.reported:
            if name not in self._reported and len(self._reported) < 1000:
                self._reported.add(name)
                log.warning(
                    "%s: ignoring %s: not a check-in",
                    self.paths.check_ins,
                    printable(repr(name), 120),
                )
        self.table.reported.clear()

    def _sweep(self) -> None:
        """Remove the check-ins of our runs that ended a while ago and were told of."""
        now_s = self.looking.total_s
        if now_s - self._swept_s < 60 and not self._once:
            return
        self._swept_s = now_s
        ended = {run for run, seen in self.table.runs.items() if self._can_sweep(seen, now_s)}
        if ended:
            for name in self.table.names:
                if name.partition("-")[0] in ended and parse_check_in(name) is not None:
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(self.paths.check_ins, name))

    def _can_sweep(self, seen: Seen, now_s: float) -> bool:
        keep_s = {FINISHED: KEEP_FINISHED_S, FAILED: KEEP_FAILED_S}.get(seen.state, math.inf)
        return (
            now_s - seen.since_s > keep_s
            and not self.outbox.is_waiting(Change(seen.state, seen, 0, None).id)
            and os.path.exists(self.paths.run_log(seen.run))
        )

    def _save(self, now: bool = False) -> None:
        """Write watcher.json, at a rate that its own cost bounds."""
        begun = self._clock()
        pause_s = min(self._save_cost_s * SAVE_COST_FACTOR, MAX_SAVE_INTERVAL_S)
        if begun - self._saved_mono < pause_s and not now:
            return
        content = {
            "version": 1,
            "host": this_host(),
            "pid": os.getpid(),
            "started_at": round(self._started_utc, 3),
            "seen_at": round(self._utc(), 3),
            "mono": round(begun, 3),
            "boot": boot_id(),
            "grace_s": self.table.grace_s,
            "poll_interval_s": self.poll_interval_s,
            "once": self._once,
            "looked_s": round(self.looking.total_s, 3),
            "hold_until_s": round(self.looking.hold_until_s, 3),
            "runs": [seen.to_list() for seen in self.table.runs.values()],
        }
        try:
            replace_file(self.paths.watcher, to_json(content).encode("ascii"))
        except OSError as error:
            if self._save_cost_s != MAX_SAVE_INTERVAL_S:
                log.warning("cannot write %s: %s", self.paths.watcher, error.strerror)
            self._saved_mono, self._save_cost_s = begun, MAX_SAVE_INTERVAL_S
            return
        self._saved_mono, self._save_cost_s = begun, self._clock() - begun

    def run(self, stop: threading.Event, after_poll: Callable[[], None] = lambda: None) -> None:
        """Poll until `stop` is set."""
        while not stop.is_set():
            begun = self._clock()
            self.poll()
            after_poll()
            stop.wait(max(0.05, self.poll_interval_s - (self._clock() - begun)))

    def close(self, drain_s: float = 0.0) -> None:
        """Save what was seen, give what is being sent a moment, and let go of the repository."""
        if drain_s:
            self.dispatcher.drain(drain_s)
        self._save(now=True)
        self.dispatcher.stop(1.0)
        self.outbox.close()
        os.close(self._lock_fd)

    def counts(self) -> Dict[str, int]:
        """Return how many runs are in each state."""
        counts = {RUNNING: 0, STALLED: 0, FAILED: 0, FINISHED: 0}
        for seen in self.table.runs.values():
            counts[seen.state] += 1
        return counts


def describe_watcher(paths: RepoPaths) -> str:
    """Return who watches a repository, for people."""
    saved = read_watcher_file(paths)
    if not saved.get("pid"):
        return "another watcher"
    since = (
        local_time(float(saved["started_at"]))
        if isinstance(saved.get("started_at"), float)
        else "?"
    )
    return f"process {saved['pid']} on {printable(str(saved.get('host')), 100)} (since {since})"


# ======================================================================================
# Command line
#
# `main` turns errors into one line on stderr and an exit code: 0 fine, 1 something is wrong,
# 2 wrong usage. Tables are for people, --json for scripts, colour for terminals alone.
# ======================================================================================

_COLOURS = {STALLED: "31", FAILED: "31", RUNNING: "32", FINISHED: "2"}


def coloured(text: str, state: str, stream: Any) -> str:
    """Return `text` in the colour of a state where `stream` is a terminal and NO_COLOR is unset."""
    if state in _COLOURS and stream.isatty() and not os.environ.get("NO_COLOR"):
        return f"\x1b[{_COLOURS[state]}m{text}\x1b[0m"
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    """Return lines with the columns of `rows` aligned under `header`."""
    cells = [list(header)] + [[printable(cell, 60) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells
    ]


def command_line() -> str:
    """Return how this program was called, for messages that name a command to type."""
    called = os.path.basename(sys.argv[0]) if sys.argv else ""
    return f"python3 {called}" if called.endswith(".py") else called or "aimwatch"


class _LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes log lines to stderr, above a status line that it keeps at the bottom."""

    def __init__(self) -> None:
        super().__init__()
        self.status = ""

    def emit(self, record: logging.LogRecord) -> None:
        self._erase()
        super().emit(record)
        self.show(self.status)

    def _erase(self) -> None:
        if self.status:
            self.stream.write("\r\x1b[K")

    def show(self, status: str) -> None:
        """Draw the status line anew."""
        with contextlib.suppress(OSError, ValueError):
            self._erase()
            self.status = status
            self.stream.write(status)
            self.stream.flush()


def _log_to_stderr(timed: bool) -> _LogHandler:
    handler = _LogHandler()
    text = "%(asctime)s %(levelname)-7s %(message)s" if timed else "aimwatch: %(message)s"
    handler.setFormatter(logging.Formatter(text, "%Y-%m-%d %H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if timed else logging.WARNING)
    return handler


# -------------------------------------------------------------------------- start, init, status


def cmd_start(args: Any) -> int:
    """Watch the repository until told to stop, or once."""
    handler = _log_to_stderr(timed=True)
    paths = find_repo(args.repo)
    if not any(item.enabled for item in NotifierConfig(paths).notifiers()):
        _offer_notifier(paths, args)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    watcher = Watcher(paths, args.grace, args.poll_interval, args.once)
    if args.once:
        try:
            watcher.poll()
        finally:
            watcher.close(drain_s=ATTEMPT_S + 1)
        return 1 if watcher.counts()[STALLED] or watcher.counts()[FAILED] else 0
    try:
        watcher.poll()
        live = watcher.counts()
        log.info(
            "watching %s: %s (%d stalled), grace %s, poll every %s; telling %s",
            paths.root,
            plural(live[RUNNING] + live[STALLED], "live run"),
            live[STALLED],
            human_s(args.grace),
            human_s(args.poll_interval),
            watcher.dispatcher.describe(),
        )
        terminal = sys.stderr.isatty()
        watcher.run(stop, lambda: handler.show(_status_line(watcher)) if terminal else None)
    finally:
        handler.show("")
        watcher.close()
    log.info("stopped")
    return 0


def _status_line(watcher: Watcher) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in watcher.counts().items() if count)
    return f"{time.strftime('%H:%M:%S')} watching {counts or 'no runs yet'} (Ctrl-C ends it)"


def _offer_notifier(paths: RepoPaths, args: Any) -> None:
    if sys.stdin.isatty() and sys.stderr.isatty() and not args.once:
        print(f"Nobody is told yet: {paths.root} has no enabled notifiers.")
        if _confirm("Would you like to configure notifiers?", True):
            cmd_notifiers_add(_default_add_args(args.repo))
            return
    log.info(
        "no notifiers are enabled, so events are only written here; '%s notifiers add' sets one up",
        command_line(),
    )


def cmd_init(args: Any) -> int:
    """Create a repository."""
    given = args.repo or os.environ.get("AIMWATCH_REPO") or os.getcwd()
    existed = os.path.isdir(os.path.join(given, ".aim")) or os.path.basename(given) == ".aim"
    paths = find_repo(given, create=True)
    print(f"{'repository already at' if existed else 'created a repository at'} {paths.root}")
    return 0


class WatcherState(NamedTuple):
    """Whether a watcher is alive, said in words, with what watcher.json holds."""

    alive: bool
    text: str
    saved: Dict[str, Any]


#: A watcher that holds its lock and has not looked for this long hangs.
STUCK_S = 60.0
#: A pass of `start --once` counts as watching for this long.
ONCE_COUNTS_S = 3600.0


def watcher_state(paths: RepoPaths, now_utc: float) -> WatcherState:
    """Return whether a watcher is alive, by its lock and by when it last looked."""
    saved = read_watcher_file(paths)
    seen_at = saved.get("seen_at")
    age_s = max(0.0, now_utc - seen_at) if isinstance(seen_at, (int, float)) else math.inf
    ago = f"last looked {human_s(age_s)} ago" if age_s < math.inf else "never looked"
    held = _is_locked(paths.watcher_lock)
    if held is False or (held is None and age_s > STUCK_S):
        if saved.get("once") and age_s < ONCE_COUNTS_S:
            return WatcherState(True, f"watched by passes of 'start --once'; {ago}", saved)
        return WatcherState(False, f"no watcher is alive; {ago}", saved)
    who = describe_watcher(paths)
    if age_s > STUCK_S:
        return WatcherState(False, f"{who} holds the watch but does not look; {ago}", saved)
    since = saved.get("started_at")
    up = human_s(now_utc - since) if isinstance(since, (int, float)) else "?"
    return WatcherState(True, f"watched by {who}, for {up}; {ago}", saved)


def _is_locked(path: str) -> Optional[bool]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        return {True: False, False: True, None: None}[try_lock(fd)]
    except OSError:
        return None
    finally:
        os.close(fd)


def status_rows(paths: RepoPaths, saved: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return one object for every run with check-ins: what it last said, and its state as the
    watcher knows it, where a watcher has seen that very check-in."""
    try:
        listing = os.listdir(paths.check_ins)
    except FileNotFoundError:
        listing = []
    except OSError as error:
        raise RepoError(f"cannot list {paths.check_ins}: {error.strerror}") from None
    runs = RunTable(0)
    runs.take(listing, 0, 0)
    known = {}
    for values in saved.get("runs") or ():
        seen = Seen.from_list(values)
        if seen is not None:
            known[seen.name] = seen
    rows = []
    for seen in runs.runs.values():
        watched = known.get(seen.name)
        facts = run_facts(paths, seen.run) if seen.state != FINISHED else {}
        rows.append(
            {
                "hash": seen.run,
                "name": facts.get("run.name", seen.run),
                "experiment": facts.get("run.experiment"),
                "state": watched.state if watched else seen.state,
                "last_check_in": float(watched.since_utc if watched else seen.utc),
                "promise_s": seen.promise_s or None,
                "host": facts.get("run.host"),
                "pid": facts.get("run.pid"),
                "job": facts.get("run.job"),
                "reason": facts.get("run.reason") or None,
                "watched": watched is not None,
            }
        )
    order = [FAILED, STALLED, RUNNING, FINISHED]
    return sorted(rows, key=lambda row: (order.index(row["state"]), -row["last_check_in"]))


def cmd_status(args: Any) -> int:
    """Show every live run, and whether a watcher is alive."""
    paths = find_repo(args.repo)
    now = time.time()
    state = watcher_state(paths, now)
    rows = status_rows(paths, state.saved)
    bad = sum(row["state"] in (STALLED, FAILED) for row in rows)
    if args.json:
        saved = {key: state.saved.get(key) for key in ("host", "pid", "started_at", "seen_at")}
        watcher = {"alive": state.alive, "text": state.text, **saved}
        print(json.dumps({"repo": paths.root, "watcher": watcher, "runs": rows}, indent=2))
    else:
        _print_status(paths, state, rows, now)
    return 0 if state.alive and not bad else 1


def _print_status(
    paths: RepoPaths, state: WatcherState, rows: Sequence[Dict[str, Any]], now: float
) -> None:
    print(f"repository {paths.root}\n{state.text}")
    live = [row for row in rows if row["state"] != FINISHED]
    if live:
        print()
    cells = [
        (
            row["hash"],
            row["name"] if row["name"] != row["hash"] else "",
            row["state"],
            f"{human_s(now - row['last_check_in'])} ago",
            human_s(row["promise_s"]) if row["promise_s"] else "none",
            row["host"] or "",
            row["reason"] or "",
        )
        for row in live
    ]
    header = ("RUN", "NAME", "STATE", "LAST CHECK-IN", "PROMISE", "HOST", "REASON")
    lines = table(header, cells) if live else []
    for line, row_state in zip(lines, [""] + [row["state"] for row in live]):
        print(coloured(line, row_state, sys.stdout))
    counts = {name: sum(row["state"] == name for row in rows) for name in _STATES}
    shown = [
        f"{counts[name]} {name}" for name in (RUNNING, STALLED, FAILED, FINISHED) if counts[name]
    ]
    print(f"\n{', '.join(shown) if shown else 'no runs with check-ins'}")


# -------------------------------------------------------------------------- notifiers

_FLAG_FIELDS = {
    "webhook_url": "url",
    "group_id": "group_id",
    "access_token": "access_token",
    "base_url": "base_url",
    "message": "message",
}


def _ask(prompt: str, secret: bool = False) -> str:
    """Return a line from the terminal, or from standard input where that is none."""
    if secret and sys.stdin.isatty():
        import getpass

        return getpass.getpass(f"{prompt} (not shown): ")
    return input(f"{prompt}: ")


def _confirm(question: str, default: bool) -> bool:
    while True:
        said = _ask(f"{question} [{'Y/n' if default else 'y/N'}]").strip().lower()
        if said in ("", "y", "yes", "n", "no"):
            return default if not said else said.startswith("y")
        print("Please answer y or n.")


def _default_add_args(repo: Optional[str]) -> Any:
    args = ["notifiers", "add"]
    return _parser().parse_args(args if repo is None else ["--repo", repo, *args])


def cmd_notifiers_add(args: Any) -> int:
    """Add a notifier, by questions or wholly by flags."""
    paths = find_repo(args.repo)
    config = NotifierConfig(paths)
    config.read()
    while True:
        kind = args.type or _ask_type(args)
        notifier: Dict[str, Any] = {
            "id": _new_id(),
            "type": kind,
            "arguments": _arguments(kind, args),
            "status": "enabled",
        }
        if args.events is not None:
            notifier["events"] = args.events
        _show(notifier)
        _warn_about(notifier)
        if not args.yes and not _confirm("Save notifier configuration above?", True):
            raise AimwatchError("aborted: nothing was saved")
        with config.edit() as raw:
            raw["notifications"]["notifiers"][notifier["id"]] = notifier
        print(
            f"added {kind} notifier {notifier['id']}; try it: {command_line()} notifiers test "
            f"{notifier['id'][:8]}"
        )
        if args.yes or args.type or not _confirm("Would you like to add another notifier?", False):
            return 0


def _new_id() -> str:
    import uuid

    return str(uuid.uuid4())


def _ask_type(args: Any) -> str:
    if args.yes:
        raise AimwatchError(f"with --yes the type must be given: {', '.join(NOTIFIER_FIELDS)}")
    while True:
        kind = _ask(f"Select notifier type to add ({', '.join(NOTIFIER_FIELDS)})").strip()
        if kind in NOTIFIER_FIELDS:
            return kind
        print(f"{printable(kind, 40)!r} is not one of {', '.join(NOTIFIER_FIELDS)}.")


def _arguments(kind: str, args: Any) -> Dict[str, Any]:
    """Return a notifier's arguments from flags, files and questions."""
    fields = NOTIFIER_FIELDS[kind]
    given = {}
    for flag, name in _FLAG_FIELDS.items():
        value = _flag_value(flag, args)
        if value is not None:
            if name not in [field.name for field in fields]:
                raise AimwatchError(f"--{flag.replace('_', '-')} has no meaning for type {kind}")
            given[name] = value
    arguments: Dict[str, Any] = {}
    for field in fields:
        value = _field_value(field, given.get(field.name), args, kind)
        if field.name == "message":
            value = value or AIM_DEFAULT_MESSAGE
        if value:
            # Aim reads a group ID as a number.
            arguments[field.name] = (
                int(value) if field.name == "group_id" and value.isdigit() else value
            )
    return arguments


def _flag_value(flag: str, args: Any) -> Optional[str]:
    value: Optional[str] = getattr(args, flag)
    path = getattr(args, f"{flag}_file", None)
    if path is None:
        return value
    if value is not None:
        name = flag.replace("_", "-")
        raise AimwatchError(f"--{name} and --{name}-file exclude each other")
    try:
        if path == "-":
            return sys.stdin.readline().rstrip("\n")
        with open(path, encoding="utf-8") as file:
            return file.read(MAX_ANSWER_BYTES).strip("\n")
    except OSError as error:
        raise AimwatchError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AimwatchError(f"cannot read {path}: it is not UTF-8 text") from None


def _field_value(field: Field, given: Optional[str], args: Any, kind: str) -> str:
    if given is not None:
        return field.check(given)
    if args.yes or (not field.required and field.name != "message"):
        if field.required:
            flag = {"url": "webhook-url"}.get(field.name, field.name.replace("_", "-"))
            also = f" or --{flag}-file" if field.secret else ""
            raise AimwatchError(f"notifiers add {kind} --yes needs --{flag}{also}")
        return ""
    while True:
        said = _ask(field.prompt, field.secret)
        try:
            if said or not field.required:
                return field.check(said)
            print("This is needed.")
        except ConfigError as error:
            print(f"Error: {error}")


def _show(notifier: Dict[str, Any]) -> None:
    print(f"\nType: {notifier['type']}")
    for name, value in masked(notifier["type"], notifier["arguments"]).items():
        print(f"{name.replace('_', ' ').capitalize()}: {printable(str(value), 300)}")
    print(f"Events: {', '.join(notifier.get('events', DEFAULT_EVENTS))}\n--------")


def _warn_about(notifier: Dict[str, Any]) -> None:
    for name in ("url", "base_url"):
        url = notifier["arguments"].get(name, "")
        host = re.sub(r"^http://(?:[^/@]*@)?(\[[^\]]*\]|[^/:]*).*$", r"\1", url)
        if host != url and host not in ("localhost", "127.0.0.1", "[::1]"):
            print(
                f"Warning: {host} is another machine, and over http:// everybody between reads "
                "what is sent, the address included: use https:// where you can."
            )
    if notifier["type"] == "workplace" and "base_url" not in notifier["arguments"]:
        print(
            "Note: Meta closed Workplace on 2026-06-01. This notifier reaches only a server that "
            "speaks its format, given with --base-url."
        )


def _edit_notifier(args: Any, change: Callable[[Dict[str, Any], str], None]) -> None:
    config = NotifierConfig(find_repo(args.repo))
    with config.edit() as raw:
        change(raw["notifications"]["notifiers"], config.find(args.id, raw))


def cmd_notifiers_remove(args: Any) -> int:
    """Remove a notifier; what waits for it is given up."""
    config = NotifierConfig(find_repo(args.repo))
    raw = config.read()
    notifier_id = config.find(args.id, raw)
    entry = raw["notifications"]["notifiers"][notifier_id]
    if not args.yes:
        notifier = read_notifier(notifier_id, entry)
        _show({"type": notifier.type, "arguments": notifier.arguments})
        if not _confirm("Remove notifier configuration above?", False):
            raise AimwatchError("aborted: nothing was removed")
    args.id = notifier_id
    _edit_notifier(args, lambda notifiers, found: notifiers.pop(found))
    print(f"removed notifier {notifier_id}")
    return 0


def cmd_notifiers_switch(args: Any) -> int:
    """Enable or disable a notifier."""

    def switch(notifiers: Dict[str, Any], notifier_id: str) -> None:
        if not isinstance(notifiers[notifier_id], dict):
            raise ConfigError(
                f"notifier {notifier_id} is not an object: remove it and add it again"
            )
        notifiers[notifier_id]["status"] = args.status

    _edit_notifier(args, switch)
    print(f"{args.status} notifier {args.id}")
    return 0


def cmd_notifiers_list(args: Any) -> int:
    """List the notifiers."""
    notifiers = NotifierConfig(find_repo(args.repo)).notifiers()
    if args.json:
        print(
            json.dumps(
                [
                    {
                        "id": item.id,
                        "type": item.type,
                        "status": "enabled" if item.enabled else "disabled",
                        "arguments": masked(item.type, item.arguments),
                        "events": item.events,
                        "problem": item.problem,
                    }
                    for item in notifiers
                ],
                indent=2,
            )
        )
        return 0
    rows = [
        (
            item.id.ljust(38),
            item.type.ljust(8),
            "enabled" if item.enabled else "disabled",
            ",".join(item.events),
            item.problem or "",
        )
        for item in notifiers
    ]
    print("\n".join(table(("NOTIFIER ID", "TYPE", "STATUS", "EVENTS", "PROBLEM"), rows)))
    if not rows:
        print(f"none yet: '{command_line()} notifiers add' sets one up", file=sys.stderr)
    return 0


def cmd_notifiers_dump(args: Any) -> int:
    """Print the configuration with its secrets masked."""
    raw = NotifierConfig(find_repo(args.repo)).read()
    for notifier_id, entry in raw["notifications"]["notifiers"].items():
        notifier = read_notifier(notifier_id, entry)
        if isinstance(entry, dict):
            entry["arguments"] = masked(notifier.type, notifier.arguments)
    print(json.dumps(raw, indent=2))
    return 0


def cmd_get_log_level(args: Any) -> int:
    """Print from which level on log messages of runs are told."""
    level = NotifierConfig(find_repo(args.repo)).read()["notifications"].get("log_level", 30)
    names = {number: name for name, number in LOG_LEVELS.items()}
    print(f"Log level: {names.get(level, level)}")
    return 0


def cmd_set_log_level(args: Any) -> int:
    """Set from which level on log messages of runs are told."""
    with NotifierConfig(find_repo(args.repo)).edit() as raw:
        raw["notifications"]["log_level"] = args.level
    return 0


def cmd_notifiers_test(args: Any) -> int:
    """Send a sample through the real transport and say what came back."""
    paths = find_repo(args.repo)
    config = NotifierConfig(paths)
    notifiers = config.notifiers()
    if args.id is not None:
        wanted = config.find(args.id, config.read())
        notifiers = [item for item in notifiers if item.id == wanted]
    else:
        notifiers = [item for item in notifiers if item.enabled] or [fallback_notifier()]
    _log_to_stderr(timed=True)
    now = time.time()
    sample = {
        "event": STALLED,
        "repo": paths.root,
        "run.hash": "0" * 24,
        "run.name": "sample, sent by 'notifiers test'",
        "run.experiment": "none",
        "run.host": this_host(),
        "run.pid": str(os.getpid()),
        "run.last_seen": local_time(now),
        "run.promised": human_s(60),
        "run.silent": human_s(160),
        "run.process": "unknown",
        "run.metrics": "loss=0.25 (step 100)",
    }
    failed = 0
    for item in notifiers:
        outcome = Outcome(BROKEN, item.problem) if item.problem else deliver(item, [sample])
        failed += outcome.kind != SENT
        verdict = "delivered" if outcome.kind == SENT else "NOT delivered"
        print(f"{item.type} {item.id}: {verdict}: {outcome.detail}")
    return 1 if failed else 0


# -------------------------------------------------------------------------- demo

#: What the demo's processes run: a training loop that meets the fate named by its argument.
DEMO_TRAINING = """\
import sys, time
from aimwatch import Run

fate = sys.argv[1]
with Run(experiment="demo") as run:
    run.name = fate
    for step in range(20):
        time.sleep(0.05)
        run.report_progress(expect_next_in=1)
        if step == 10:
            if fate == "raises":
                raise ValueError(f"loss is NaN at step {step}")
            if fate == "stalls":
                time.sleep(5)
            elif fate != "finishes":
                print("waiting", flush=True)
                time.sleep(3600)
"""
DEMO_GRACE_S, DEMO_POLL_S = 1.0, 0.2
#: How late a demo event may be told: some polls, and a busy machine.
DEMO_SLACK_S = 2.0


class Fate(NamedTuple):
    """One process of the demo: what becomes of it, by which signal, and what must be told."""

    name: str
    what: str
    signal: int
    told: Tuple[str, ...]


DEMO_FATES = (
    Fate("finishes", "reaches its end", 0, (FINISHED,)),
    Fate("raises", "raises an exception", 0, (FAILED,)),
    Fate("killed", "is sent SIGKILL", signal.SIGKILL, (STALLED,)),
    Fate("hangs", "stops working", 0, (STALLED,)),
    Fate("terminated", "is sent SIGTERM", signal.SIGTERM, (FAILED,)),
    Fate("stalls", "stalls and comes back", 0, (STALLED, RECOVERED, FINISHED)),
)


def cmd_demo(args: Any) -> int:
    """Watch six training processes end in six ways, and check what is told of them."""
    import shutil
    import tempfile

    root = tempfile.mkdtemp(prefix="aimwatch-demo-")
    begun = time.monotonic()
    try:
        with contextlib.ExitStack() as processes:
            _demo_run(find_repo(root, create=True), processes)
        ok = _demo_report(find_repo(root), time.monotonic() - begun)
    finally:
        if args.keep:
            print(f"\nThe repository is kept: {command_line()} --repo {root} status")
        else:
            shutil.rmtree(root, ignore_errors=True)
    return 0 if ok else 1


def _demo_run(paths: RepoPaths, processes: contextlib.ExitStack) -> None:
    import subprocess

    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "AIMWATCH_REPO": paths.root, "PYTHONUNBUFFERED": "1"}

    def start(*argv: str, **options: Any) -> Any:
        process = subprocess.Popen([sys.executable, *argv], env=env, text=True, **options)
        processes.callback(process.wait)
        processes.callback(process.kill)
        return process

    events = [STALLED, FAILED, RECOVERED, STARTED, FINISHED]
    with NotifierConfig(paths).edit() as raw:
        raw["notifications"]["notifiers"]["demo"] = {
            "id": "demo",
            "type": "logger",
            "status": "enabled",
            "events": events,
            "arguments": {"message": "{message}"},
        }
    print(
        f"Starting a watcher (grace {human_s(DEMO_GRACE_S)}) and {len(DEMO_FATES)} training "
        f"processes in {paths.root}.\nEach promises a check-in within 1 s. What the watcher "
        "tells, as it comes:\n",
        flush=True,
    )
    watcher = start(
        os.path.abspath(__file__),
        "start",
        "--grace",
        str(DEMO_GRACE_S),
        "--poll-interval",
        str(DEMO_POLL_S),
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    reader = threading.Thread(target=_demo_print, args=(watcher.stderr,), daemon=True)
    reader.start()
    _demo_wait(paths, lambda told: os.path.exists(paths.watcher))
    trainings = {
        fate: start(
            "-c", DEMO_TRAINING, fate.name, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for fate in DEMO_FATES
    }
    for fate, process in trainings.items():
        if fate.signal:
            process.stdout.readline()  # it has checked in and waits
            process.send_signal(fate.signal)
    expected = sum(len(fate.told) + 1 for fate in DEMO_FATES)
    _demo_wait(paths, lambda told: len(told) >= expected)
    watcher.send_signal(signal.SIGTERM)
    watcher.wait()
    reader.join()


def _demo_print(stream: Any) -> None:
    with stream:
        for line in stream:
            print(f"  {line}", end="", flush=True)


def _demo_wait(paths: RepoPaths, done: Callable[[List[Any]], bool]) -> None:
    deadline = time.monotonic() + 15
    while not done(_demo_told(paths)) and time.monotonic() < deadline:
        time.sleep(0.1)


def _demo_told(paths: RepoPaths) -> List[Tuple[str, str, float, float]]:
    """Return (run name, event, seconds after its check-in, seconds allowed) for each delivery, as
    the outbox records them."""
    events, told = {}, []
    try:
        with open(paths.outbox, "rb") as file:
            for line, whole in read_lines(file):
                record = json_object(line.decode()) or {} if whole else {}
                if "event" in record:
                    events[record["event"]] = record
                for event_id in record.get("sent", ()):
                    event = events[event_id]
                    utc_s = float(event_id.split("-")[2])
                    # The promise on disk: 1 s and the margin within which calls need not write.
                    silent_s = 2.0 + DEMO_GRACE_S if event["kind"] == STALLED else 0.0
                    name = event["facts"]["run.name"]
                    told.append((name, event["kind"], record["time"] - utc_s, silent_s))
    except FileNotFoundError:
        pass
    return told


def _demo_report(paths: RepoPaths, took_s: float) -> bool:
    by_run: Dict[str, List[Tuple[str, float, float]]] = {}
    for name, kind, after_s, silent_s in _demo_told(paths):
        if kind != STARTED:
            by_run.setdefault(name, []).append((kind, after_s, silent_s))
    rows, all_ok = [], True
    for fate in DEMO_FATES:
        told = by_run.get(fate.name, [])
        in_time = all(silent <= after <= silent + DEMO_SLACK_S for _, after, silent in told)
        ok = in_time and tuple(kind for kind, _, _ in told) == fate.told
        all_ok = all_ok and ok
        rows.append(
            (
                fate.name,
                fate.what,
                ", ".join(fate.told),
                ", ".join(kind for kind, _, _ in told),
                ", ".join(f"{after:.1f} s" for _, after, _ in told),
                ", ".join(
                    f"{silent:.0f} to {silent + DEMO_SLACK_S:.0f} s" for _, _, silent in told
                ),
                "ok" if ok else "WRONG",
            )
        )
    header = ("RUN", "WHAT IT DOES", "MUST BE TOLD", "WAS TOLD", "AFTER", "ALLOWED", "")
    print("\n" + "\n".join(table(header, rows)))
    print(
        f"\n{'Every event was told once, in time' if all_ok else 'Something is wrong'} "
        f"({took_s:.0f} s)."
    )
    return all_ok


# -------------------------------------------------------------------------- parser and main


def _seconds(least: float) -> Callable[[str], float]:
    def seconds(text: str) -> float:
        import argparse

        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= MAX_EXPECT_S:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number of seconds from {least:g} up"
            )
        return value

    return seconds


def _events(text: str) -> List[str]:
    import argparse

    events = [item.strip() for item in text.split(",") if item.strip()]
    for event in events:
        if event not in EVENTS:
            raise argparse.ArgumentTypeError(f"{event!r} is not one of {', '.join(EVENTS)}")
    return list(dict.fromkeys(events))


def _level(text: str) -> int:
    import argparse

    level = LOG_LEVELS.get(text.upper(), int(text) if text.isdigit() else -1)
    if not 0 <= level <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(LOG_LEVELS)}")
    return level


def _parser() -> Any:
    import argparse

    repo = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    repo.add_argument(
        "--repo",
        metavar="DIR",
        help="the folder that holds .aim (default: "
        "$AIMWATCH_REPO, else the nearest .aim here or above)",
    )
    parser = argparse.ArgumentParser(
        prog=command_line(),
        parents=[repo],
        description="Watch machine-learning training runs, and tell people when one fails or stalls.",
        epilog="Exit codes: 0 fine, 1 something is wrong, 2 wrong usage.",
    )
    parser.set_defaults(repo=None)
    parser.add_argument("--version", action="version", version=f"aimwatch {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, dest="command"
    )

    def add(group: Any, name: str, do: Callable[[Any], int], **options: Any) -> Any:
        summary = (do.__doc__ or "").strip().partition("\n\n")[0].replace("\n    ", " ")
        command = group.add_parser(
            name,
            parents=[repo],
            help=summary[:1].lower() + summary[1:].rstrip("."),
            description=summary,
            **options,
        )
        command.set_defaults(do=do)
        return command

    start = add(commands, "start", cmd_start)
    start.add_argument(
        "--grace",
        type=_seconds(0),
        default=DEFAULT_GRACE_S,
        metavar="S",
        help="seconds of silence beyond the promise before a run counts as stalled "
        "(default: %(default)g)",
    )
    start.add_argument(
        "--poll-interval",
        type=_seconds(0.05),
        default=DEFAULT_POLL_INTERVAL_S,
        metavar="S",
        help="seconds between two looks (default: %(default)g)",
    )
    start.add_argument(
        "--once",
        action="store_true",
        help="look once, tell, and exit: 1 when any run is stalled or failed; for cron",
    )
    status = add(
        commands,
        "status",
        cmd_status,
        epilog="Exits 1 when any run is stalled or failed, or no watcher is alive.",
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    add(commands, "init", cmd_init)
    demo = add(commands, "demo", cmd_demo)
    demo.add_argument("--keep", action="store_true", help="leave the repository for a look")
    notifiers = commands.add_parser(
        "notifiers",
        parents=[repo],
        help="say who is told, and how",
        description="Say who is told, and how.",
    )
    group = notifiers.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="sub")
    _add_notifier_commands(group, add)
    return parser


def _add_notifier_commands(group: Any, add: Callable[..., Any]) -> None:
    new = add(
        group,
        "add",
        cmd_notifiers_add,
        epilog="What is not given is asked for. A secret on the "
        "command line shows in process lists: use the -file flags, where - is standard input.",
    )
    new.add_argument(
        "type",
        nargs="?",
        choices=sorted(NOTIFIER_FIELDS),
        metavar="TYPE",
        help=", ".join(sorted(NOTIFIER_FIELDS)),
    )
    new.add_argument("--webhook-url", metavar="URL", help="slack: the incoming webhook's address")
    new.add_argument("--webhook-url-file", metavar="FILE", help="read the address from FILE")
    new.add_argument("--group-id", metavar="ID", help="workplace: the group's ID")
    new.add_argument("--access-token", metavar="TOKEN", help="workplace: the token")
    new.add_argument("--access-token-file", metavar="FILE", help="read the token from FILE")
    new.add_argument("--base-url", metavar="URL", help=f"workplace: instead of {WORKPLACE_URL}")
    new.add_argument(
        "--message",
        metavar="TEXT",
        help="a message template; it may name "
        + ", ".join("{%s}" % name for name in TEMPLATE_FIELDS),
    )
    new.add_argument(
        "--events",
        type=_events,
        metavar="LIST",
        help=f"what to tell: any of {','.join(EVENTS)} (default: {','.join(DEFAULT_EVENTS)})",
    )
    new.add_argument("--yes", action="store_true", help="ask nothing")
    listing = add(group, "list", cmd_notifiers_list)
    listing.add_argument("--json", action="store_true", help="print JSON")
    one_id = "its ID, or the first characters of it"
    remove = add(group, "remove", cmd_notifiers_remove)
    remove.add_argument("id", metavar="ID", help=one_id)
    remove.add_argument("--yes", action="store_true", help="ask nothing")
    for name, status in (("enable", "enabled"), ("disable", "disabled")):
        switch = add(group, name, cmd_notifiers_switch)
        switch.add_argument("id", metavar="ID", help=one_id)
        switch.set_defaults(status=status)
    add(group, "dump", cmd_notifiers_dump)
    add(group, "get-log-level", cmd_get_log_level)
    level = add(group, "set-log-level", cmd_set_log_level)
    level.add_argument("level", type=_level, metavar="LEVEL", help=", ".join(LOG_LEVELS))
    test = add(group, "test", cmd_notifiers_test)
    test.add_argument("id", nargs="?", metavar="ID", help=f"{one_id} (default: every enabled one)")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return its exit code.

    Arguments:
        argv: the arguments after the program's name; None: those of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    _log_to_stderr(timed=False)
    try:
        code: int = args.do(args)
        sys.stdout.flush()
        return code
    except AimwatchError as error:
        print(f"{command_line()}: {error}", file=sys.stderr)
    except (KeyboardInterrupt, EOFError):
        print(f"\n{command_line()}: aborted: nothing was changed", file=sys.stderr)
    except BrokenPipeError:
        # The reader has seen enough; what is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 1


if __name__ == "__main__":
    sys.exit(main())
