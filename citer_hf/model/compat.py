"""The keywords that a router was fetched with, kept for what is fetched later."""

from __future__ import annotations

from typing import Any

SECRET = "token"


class FetchedWith(dict[str, Any]):
    """Keywords for fetching files, whose token stays in this process: it is neither shown nor pickled."""

    def __repr__(self) -> str:
        return repr(self._without_secret())

    def __reduce__(self) -> tuple[type[FetchedWith], tuple[dict[str, Any]]]:
        return FetchedWith, (self._without_secret(),)

    def __copy__(self) -> FetchedWith:
        return FetchedWith(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> FetchedWith:
        return FetchedWith(self)

    def _without_secret(self) -> dict[str, Any]:
        return {key: value for key, value in self.items() if key != SECRET}
