"""What `citer serve` does: take the port, load the pair, serve."""

from __future__ import annotations

import ipaddress
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn

from citer_hf.chat import load_pair
from citer_hf.model.routers import as_threshold

from .app import build_app
from .engine import Engine
from .limits import Limits
from .metrics import Metrics

__all__ = ["serve"]

# Streams that are under way when the server is told to stop.
SECONDS_TO_LEAVE = 5


def serve(
    path: str,
    name: str,
    host: str,
    port: int,
    router_threshold: float | None,
    cache_implementation: str | None,
    limits: Limits,
    options: dict[str, Any],
) -> None:
    """Serve a pair until interrupted."""
    # Whoever cannot have the port learns it before minutes of loading.
    listener = listen(host, port)
    with listener:
        print(f"Loading {name} ...", file=sys.stderr)
        model, tokenizer = load_pair(path, options)
        if not tokenizer.is_fast:
            raise ValueError(f"{name}: {type(tokenizer).__name__} cannot stream; a tokenizer.json is needed.")
        if cache_implementation is not None:
            model.generation_config.cache_implementation = cache_implementation
        threshold = model.config.router_threshold if router_threshold is None else router_threshold
        engine = Engine(model, tokenizer, limits, Metrics())
        app = build_app(engine, names_of(path, name), as_threshold(threshold))
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, timeout_graceful_shutdown=SECONDS_TO_LEAVE
        )
        print(welcome(name, threshold, *listener.getsockname()[:2]), file=sys.stderr, flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
        finally:
            engine.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: {error}. Choose others; --port 0 takes a free one.") from error
    return listener


def names_of(path: str, name: str) -> tuple[str, ...]:
    """Return what requests may call the model: as the user does, or by the name of its directory."""
    return tuple(dict.fromkeys((name, path, Path(path).name)))


def welcome(name: str, threshold: float, host: str, port: int) -> str:
    """Say where the server is and how it is asked."""
    inside = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    warning = (
        "" if inside else "\nAnyone who reaches this address can use it: it asks for no key. Put a proxy before it."
    )
    place = f"[{host}]" if ":" in host else host
    return (
        f"Serving {name} at http://{place}:{port}/v1 with threshold {threshold:g}; also /health and /metrics. "
        f"Ctrl-C stops it.{warning}"
    )
