"""An OpenAI-compatible server of a pair."""

from dataclasses import dataclass

from ..model.routers import as_threshold
from ..runs import option


@dataclass(frozen=True)
class ServeOptions:
    """Options of `citer serve`.

    Raises:
        ValueError: for a limit that is not positive.
    """

    host: str = option("localhost", "Address to listen at; 0.0.0.0 lets other machines in.")
    port: int = option(8000, "Port; 0 takes a free one.", min=0, max=65535)
    router_threshold: float | None = option(
        None, "Threshold of requests that set none. [default: the router's own]", metavar="X"
    )
    max_new_tokens: int = option(4096, "Longest answer, in tokens.", metavar="N")
    max_request_bytes: int = option(4 * 2**20, "Largest request.", metavar="N")
    max_waiting: int = option(64, "Requests that may wait for their turn.", metavar="N")
    timeout: float = option(600.0, "Longest time from a request to the end of its answer, in seconds.", metavar="S")
    cache_implementation: str | None = option(None, "As for `generate`, such as static on a GPU.", metavar="NAME")

    def __post_init__(self) -> None:
        if self.router_threshold is not None:
            as_threshold(self.router_threshold)
        for name, least in (("max_new_tokens", 1), ("max_request_bytes", 1), ("timeout", 0.1), ("max_waiting", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected a number from {least} up, got {getattr(self, name)}.")
