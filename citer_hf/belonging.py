"""Whether results and provenance that lie beside a router are of this router, and not of another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .evaluation.provenance import anonymous, module_fingerprint
from .evaluation.results import Results
from .model.routers import CUSTOM_ROUTER, build_router
from .model.saved_router import choose_router, load_router_weights

__all__ = ["ForeignFactsError", "check_provenance", "method_in", "published", "saved_fingerprint", "saved_router"]

SHARDS = "model.safetensors.index.json"


class ForeignFactsError(ValueError):
    """A file beside a router tells of another one."""


def saved_router(directory: Path, hidden_size: int | None = None) -> nn.Module:
    """Load the router of a directory, without its base models."""
    chosen = choose_router(directory, None, {})
    router = build_router(chosen.spec, chosen.spec["hidden_size"] if hidden_size is None else hidden_size)
    if chosen.weights is not None:
        load_router_weights(router, chosen.weights, chosen.name)
    return router.eval()


def saved_fingerprint(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the router of a directory, as an evaluation notes it."""
    if config["router"]["type"] == CUSTOM_ROUTER or (directory / SHARDS).is_file():
        return None
    return module_fingerprint(saved_router(directory))


def method_in(results: Results, config: Mapping[str, Any], router: str | None) -> str | None:
    """Return the method under which results hold a router."""
    runs = results.provenance.get("runs") or [results.provenance]
    for role in ("slm", "llm"):
        for run in runs:
            _check_model(role.upper(), (run.get(role) or {}).get("reference"), config.get(f"{role}_reference"))
    measured = [(name, found) for run in runs for name, found in (run.get("routers_sha256") or {}).items()]
    if not measured or router is None:
        return None
    for name, found in measured:
        if found == router:
            return name
    others = ", ".join(f"{name} {found[:12]}" for name, found in measured)
    raise ForeignFactsError(
        f"results.json: it measured other routers (sha256: {others}) than the one here ({router[:12]}). Put the "
        "results of this router there, or remove results.json and curve.png."
    )


def _check_model(role: str, measured: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> None:
    """Refuse results of another base model, as far as repository ids tell: directories may be copies of anything."""
    adapters = [(one or {}).get("adapter") for one in (measured, saved)]
    if any(adapters):
        _check_model(f"{role}'s adapter", *adapters)
    then, now = published(measured), published(saved)
    if then is None or now is None:
        return
    if then[0] != now[0] or (then[1] and now[1] and then[1] != now[1]):
        was, is_now = (f"{name} at {commit[:12]}" if commit else name for name, commit in (then, now))
        raise ForeignFactsError(
            f"results.json: it measured the {role} {was}, but the router here has {is_now}. Put the results "
            "of this pair there, or remove results.json and curve.png."
        )


def published(reference: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """Return the repository id of a base model and its commit (or nothing), `None` where it is in a directory."""
    reference = anonymous(reference or {})
    if "origin" in reference:
        return reference["origin"], reference.get("origin_revision", "")
    name = reference.get("name_or_path", "")
    # A folder of another router's repository holds a model that is from somewhere else.
    return (name, reference.get("revision", "")) if "/" in name and "subfolder" not in reference else None


def check_provenance(provenance: Mapping[str, Any], router: str | None) -> None:
    """Refuse the provenance of another router."""
    trained = provenance.get("router_sha256")
    if trained and router and trained != router:
        raise ForeignFactsError(
            f"provenance.json: it tells of the training of another router (sha256 {trained[:12]}) than the one here "
            f"({router[:12]}). Remove provenance.json and training.png."
        )
