#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of aimwatch, in the order of the module: `python3 -m unittest`.

Time is driven by hand wherever time is what a test is about; real processes, signals, files and
sockets on 127.0.0.1 are used wherever the promise is about those. `python3 test_aimwatch.py bench`
measures instead, each figure beside its baseline from the same run.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Any, Callable, Dict, List, Optional, Tuple
from unittest import mock

import aimwatch
from aimwatch import Run

HERE = os.path.dirname(os.path.abspath(__file__))


class Clock:
    """A clock that moves when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Webhook:
    """A loopback HTTP server that answers as told and keeps what it was sent.

    `answers` is used up from the front, its last item for ever; an item is (status, body), (status,
    body, headers), or a function of the handler.
    """

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers) or [(200, "ok")]
        self.requests: List[Tuple[str, str, Dict[str, str], str, float]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length).decode()
                headers = {name.lower(): value for name, value in self.headers.items()}
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                outer.requests.append((self.command, self.path, headers, body, time.monotonic()))
                with contextlib.suppress(OSError):
                    if callable(answer):
                        answer(self)
                        return
                    status, text, *more = answer
                    self.send_response(status)
                    for name, value in (more[0] if more else {}).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())

            do_GET = do_POST = do_CONNECT = handle_any

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/services/T000/B000/SECRETSECRET"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def texts(self) -> List[str]:
        """Return the `text` (or `message`) of every JSON body received."""
        bodies = [json.loads(request[3]) for request in self.requests]
        return [body.get("text", body.get("message")) for body in bodies]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Case(unittest.TestCase):
    """A test with a repository of its own, and what tests do to it."""

    def setUp(self) -> None:
        self.root = os.path.realpath(tempfile.mkdtemp(prefix="aimwatch-test-"))
        self.addCleanup(shutil.rmtree, self.root, ignore_errors=True)
        self.paths = aimwatch.find_repo(self.root, create=True)
        environ = mock.patch.dict(os.environ)
        environ.start()
        self.addCleanup(environ.stop)
        os.environ["PYTHONPATH"] = HERE
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name == "AIMWATCH_REPO":
                del os.environ[name]
        handlers, level, propagate = aimwatch.log.handlers[:], aimwatch.log.level, aimwatch.log.propagate
        self.addCleanup(self._restore_log, handlers, level, propagate)
        aimwatch.log.handlers[:] = [_NullHandler()]

    def _restore_log(self, handlers: Any, level: int, propagate: bool) -> None:
        aimwatch.log.handlers[:] = handlers
        aimwatch.log.setLevel(level)
        aimwatch.log.propagate = propagate

    # ---- runs

    def run_object(self, run_hash: Optional[str] = None, **options: Any) -> Run:
        """Return a run in this repository, closed with the test."""
        run = Run(run_hash, repo=self.root, **options)
        self.addCleanup(run.close)
        return run

    def check_ins(self, run_hash: str = "") -> List[str]:
        """Return the names in check_ins that start with a hash, by number."""
        names = [name for name in os.listdir(self.paths.check_ins) if name.startswith(run_hash)]
        return sorted(names, key=lambda name: name.split("-")[1:2])

    def flags(self, run_hash: str = "") -> List[str]:
        """Return the flags of a run's check-ins, by number."""
        return [name.split("-")[2] for name in self.check_ins(run_hash)]

    def check_in(self, run_hash: str, idx: int, flag: str = "check_in", expect: int = 0) -> str:
        """Put a check-in as another program would, in the place of the run's earlier ones."""
        for name in self.check_ins(f"{run_hash}-"):
            os.unlink(os.path.join(self.paths.check_ins, name))
        name = aimwatch.check_in_name(run_hash, idx, flag, 1795317394.84, expect)
        with open(os.path.join(self.paths.check_ins, name), "x"):
            return name

    def records(self, run_hash: str) -> List[Any]:
        """Return the lines of a run's log, parsed."""
        with open(self.paths.run_log(run_hash), encoding="ascii") as file:
            return [json.loads(line) for line in file if line.strip()]

    # ---- notifiers and watchers

    def webhook(self, *answers: Any) -> Webhook:
        """Return a server that is closed with the test."""
        server = Webhook(*answers)
        self.addCleanup(server.close)
        return server

    def configure(self, **notifiers: Dict[str, Any]) -> None:
        """Write config.json: id=dict(type=..., arguments={...}, events=[...])."""
        with aimwatch.NotifierConfig(self.paths).edit() as raw:
            for notifier_id, entry in notifiers.items():
                raw["notifications"]["notifiers"][notifier_id] = {
                    "id": notifier_id, "status": "enabled", "arguments": {}, **entry,
                }  # fmt: skip

    def watcher(self, clock: Optional[Clock] = None, **options: Any) -> aimwatch.Watcher:
        """Return a watcher driven by `clock`, closed with the test."""
        options.setdefault("grace_s", 2.0)
        clock = clock or Clock()
        watcher = aimwatch.Watcher(self.paths, clock=clock, **options)
        self.addCleanup(self._close_watcher, watcher)
        return watcher

    def _close_watcher(self, watcher: aimwatch.Watcher) -> None:
        with contextlib.suppress(OSError):
            watcher.close()

    def outbox(self) -> List[Dict[str, Any]]:
        """Return the lines of the outbox."""
        with open(self.paths.outbox, encoding="ascii") as file:
            return [json.loads(line) for line in file]

    # ---- processes

    def run_cli(self, *argv: str, stdin: str = "") -> Tuple[int, str, str]:
        """Run the command line on this repository in this process: (code, out, err)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(
            sys, "stdin", io.StringIO(stdin)
        ):
            code = aimwatch.main(["--repo", self.root, *argv])
        return code, out.getvalue(), err.getvalue()

    def process(self, code: str, *argv: str, **options: Any) -> Any:
        """Start `python -c code`, with the repository in $AIMWATCH_REPO; killed with the test."""
        return self.command(sys.executable, "-c", code, *argv, **options)

    def command(self, *command: str, **options: Any) -> Any:
        """Start a command; it is killed with the test. `stdout` and `stderr` are text pipes."""
        environ = {**os.environ, "AIMWATCH_REPO": self.root, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
        self.addCleanup(self._end, process)
        return process

    def start_watcher(self, *argv: str) -> Any:
        """Start a real watcher on this repository and return it once it has looked."""
        module = os.path.join(HERE, "aimwatch.py")
        process = self.command(sys.executable, module, "start", "--poll-interval", "0.1", *argv)
        process.first_line = process.stderr.readline()
        return process

    def _end(self, process: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()

    def wait_for(self, condition: Callable[[], Any], limit_s: float = 15.0) -> Any:
        """Wait until something real has happened, and fail the test where it does not."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            time.sleep(0.01)
        self.fail(f"did not happen within {limit_s} s")


class _NullHandler(aimwatch.logging.NullHandler):
    pass
