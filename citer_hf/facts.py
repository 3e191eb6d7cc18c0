"""What the files of a router repository say, as far as they are of its router."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .belonging import ForeignFactsError, check_provenance, method_in, published, saved_fingerprint
from .evaluation.evaluate import METHODS
from .evaluation.points import Point
from .evaluation.results import Results
from .runs import read_json

__all__ = ["CURVE", "Facts"]

CURVE = "curve.png"


@dataclass(frozen=True)
class Facts:
    """What the files of a router repository say."""

    config: dict[str, Any]
    provenance: dict[str, Any] | None
    results: Results | None
    measured_as: str | None
    foreign: tuple[str, ...]
    has_curve: bool
    has_chat: bool

    @classmethod
    def read(cls, directory: Path) -> Facts:
        """Read a directory."""
        config = read_json(directory / "config.json")
        if config.get("model_type") != "citer":
            raise ValueError(f"directory: expected a router repository, got a {config.get('model_type')} model.")
        provenance, results = directory / "provenance.json", directory / "results.json"
        trained = read_json(provenance) if provenance.is_file() else None
        measured = Results.read(results) if results.is_file() else None
        measured_as, foreign = None, []
        router = saved_fingerprint(directory, config) if names_a_router(trained, measured) else None
        try:
            check_provenance(trained or {}, router)
        except ForeignFactsError as error:
            trained, foreign = None, [str(error)]
        try:
            measured_as = None if measured is None else method_in(measured, config, router)
        except ForeignFactsError as error:
            measured, foreign = None, [*foreign, str(error)]
        tokenizer = directory / "tokenizer_config.json"
        return cls(
            config=config,
            provenance=trained,
            results=measured,
            measured_as=measured_as,
            foreign=tuple(foreign),
            has_curve=(directory / CURVE).is_file(),
            has_chat=(directory / "chat_template.jinja").is_file()
            or (tokenizer.is_file() and "chat_template" in read_json(tokenizer)),
        )

    @property
    def method(self) -> str:
        """The method that the router belongs to, by the name that results use."""
        kind = self.config["router"]["type"]
        shipped = None if self.results is None else self.results.shipped
        return str(self.measured_as or shipped or (self.provenance or {}).get("objective") or METHODS.get(kind, kind))

    @property
    def points(self) -> list[Point]:
        """The measured points of this router, from few to many LLM tokens."""
        return [] if self.results is None else self.results.methods.get(self.method, [])

    def reference(self, role: str) -> dict[str, Any]:
        """Where a base model is."""
        return self.config.get(f"{role}_reference") or {}

    def adapter(self, role: str) -> dict[str, str]:
        """Where the adapter of a base model is; nothing when it has none."""
        return self.reference(role).get("adapter") or {}

    def base(self, role: str) -> tuple[str, str] | None:
        """Return the published model that a base model is, or was when it was saved along: its id and its commit."""
        reference = self.reference(role)
        if "name_or_path" in reference:
            return reference["name_or_path"], reference.get("revision", "")
        found = published(reference)
        if found is None and self.results is not None and self.measured_as is not None:
            # What was measured is what is here; without a commit, it may have been a directory.
            run = (self.results.provenance.get("runs") or [self.results.provenance])[0]
            found = published((run.get(role) or {}).get("reference"))
            return found if found is not None and found[1] else None
        return found


def names_a_router(provenance: dict[str, Any] | None, results: Results | None) -> bool:
    """Say whether any file tells by a fingerprint which router it is of; older ones do not."""
    runs = [] if results is None else [results.provenance, *results.provenance.get("runs", ())]
    return "router_sha256" in (provenance or {}) or any("routers_sha256" in run for run in runs)
