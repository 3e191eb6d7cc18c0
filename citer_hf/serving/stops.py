"""Stop strings: the answer ends before them, and none of them is seen in a stream, not even its beginning."""

from __future__ import annotations

__all__ = ["StopText"]


class StopText:
    """Passes text on as far as it can be no part of a stop string."""

    def __init__(self, stops: tuple[str, ...] = ()):
        self.stops = stops
        self.met = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Take new text, and return what is now known to be part of the answer."""
        if self.met:
            return ""
        text = self._held + text
        found = [place for place in map(text.find, self.stops) if place >= 0]
        self.met = bool(found)
        end = min(found) if found else len(text) - max((begun(text, stop) for stop in self.stops), default=0)
        self._held = "" if self.met else text[end:]
        return text[:end]

    def rest(self) -> str:
        """Return what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(stop) - 1, len(text))
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
