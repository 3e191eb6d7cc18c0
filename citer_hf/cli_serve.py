"""The command that serves a router: `citer serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from .cli_shared import DeviceMap, Dtype, Threshold, TrustRemoteCode, plain_errors, resolve_model
from .runs import import_extra

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Argument(help="A router's directory or repository id, or `demo`.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    router_threshold: Threshold = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 4096,
    max_request_bytes: Annotated[int, typer.Option(min=1, metavar="N", help="Largest request.")] = 4 * 2**20,
    max_waiting: Annotated[int, typer.Option(min=0, metavar="N", help="Requests that may wait for their turn.")] = 64,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Longest time from a request to the end of its answer.")
    ] = 600.0,
    cache_implementation: Annotated[
        str | None, typer.Option(metavar="NAME", help="As for `generate`, such as static on a GPU.")
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a pair to OpenAI clients: chat completions and completions, with `router_threshold` in each request."""
    with plain_errors():
        for library in ("fastapi", "uvicorn", "pydantic", "prometheus_client"):
            import_extra(library, "serve")
        from .model.modeling import CiterForCausalLM
        from .serving.server import serve as run

        path = resolve_model(model)
        loading = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        run(
            lambda: CiterForCausalLM.from_pretrained(path, **loading),
            model,
            host=host,
            port=port,
            router_threshold=router_threshold,
            max_new_tokens=max_new_tokens,
            max_request_bytes=max_request_bytes,
            max_waiting=max_waiting,
            timeout=timeout,
            cache_implementation=cache_implementation,
        )
