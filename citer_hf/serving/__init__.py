"""An OpenAI-compatible server of a pair."""

from dataclasses import dataclass

from ..runs import CommandOptions, option


@dataclass(frozen=True)
class ServeOptions(CommandOptions):
    host: str = option("localhost", "Address to listen at; 0.0.0.0 lets other machines in.")
    port: int = option(8000, "Port; 0 takes a free one.", min=0, max=65535)
    router_threshold: float | None = option(
        None, "Threshold of requests that set none. [default: the router's own]", metavar="X"
    )
    max_new_tokens: int = option(4096, "Longest answer, in tokens.", metavar="N", min=1)
    max_request_bytes: int = option(4 * 2**20, "Largest request.", metavar="N", min=1)
    max_waiting: int = option(64, "Requests that may wait for their turn.", metavar="N", min=0)
    timeout: float = option(600.0, "Longest time from a request to the end of its answer, in seconds.", "S", min=0.1)
    cache_implementation: str | None = option(None, "As for `generate`, such as static on a GPU.", metavar="NAME")
