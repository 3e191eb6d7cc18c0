r"""Compares mathematical answers in a process of its own. Run as a script; it reads and writes one JSON line a check.

SymPy may never come back from what a weak model writes (`10^{10^{10}}`), neither alarms nor threads stop it there, and
`math-verify` itself works in a main thread only, unless its time limits are off. A process has a main thread, and can
be ended by the system whatever it is doing.
"""

from __future__ import annotations

import json
import signal
import sys

from math_verify import parse, verify  # type: ignore[import-untyped]

SECONDS = 10.0


def compare(answer: str, response: str) -> tuple[bool, str | None]:
    """Compare what a response says with an answer."""
    given = parse(response, parsing_timeout=None)
    right = parse(f"${answer}$", parsing_timeout=None)
    return verify(right, given, timeout_seconds=None), str(given[-1]) if given else None


def main() -> None:
    """Answer requests until there are no more."""
    # An interrupted run decides itself when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        # Processor time: the same check must not fail on a busy machine. The signal's default is to end the process.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            found = compare(**json.loads(line))
        except Exception:
            # Whatever SymPy cannot read is no answer.
            found = (False, None)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
