"""The process that compares mathematical answers: started when first needed, and again when it had to be ended."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

__all__ = ["compare_in_process"]


class MathProcess:
    """One worker process, used by one thread at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0

    def compare(self, answer: str, response: str) -> tuple[bool, str | None]:
        """Compare what a response says with an answer; what takes more than ten seconds of work is wrong."""
        with self.lock:
            # After a fork the process is the parent's.
            if self.process is None or self.owner != os.getpid():
                self._start()
            try:
                line = self._exchange(json.dumps({"answer": answer, "response": response}))
            except BaseException:
                # A reply that comes after an interruption must not be taken for the next one's.
                self.stop()
                raise
        correct, extracted = json.loads(line)
        return correct, extracted

    def _exchange(self, request: str) -> str:
        """Send one line and return the reply."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if line:
            return line
        status = process.wait()
        self.stop()
        if status >= 0:
            raise RuntimeError(
                f"math: the process that compares answers ended with status {status}. "
                f"Does `{sys.executable} -c 'import math_verify'` work?"
            )
        return json.dumps((False, None))

    def _start(self) -> None:
        # As a file and not as a module of this package, which would load torch first.
        worker = Path(__file__).with_name("math_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(worker)] if sys.version_info >= (3, 11) else [sys.executable, str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self.owner = os.getpid()

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None


_PROCESS = MathProcess()
atexit.register(_PROCESS.stop)
compare_in_process = _PROCESS.compare
