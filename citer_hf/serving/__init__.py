"""An OpenAI-compatible server of a pair."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..runs import CommandOptions, option


@dataclass(frozen=True)
class ServeOptions(CommandOptions):
    host: str = option("localhost", "Address to listen at; 0.0.0.0 lets other machines in.")
    port: int = option(8000, "Port; 0 takes a free one.", min=0, max=65535)
    router_threshold: float | None = option(
        None, "Threshold of requests that set none. [default: the router's own]", metavar="X"
    )
    llm_veto: float | None = option(None, "The same for the veto, from 0 to 1.", metavar="X", min=0)
    max_batch_size: int = option(8, "Answers that are written at once, each in a slot.", metavar="N", min=1)
    max_waiting: int = option(64, "Requests that may wait for their turn.", metavar="N", min=0)
    max_new_tokens: int = option(4096, "Longest answer, in tokens.", metavar="N", min=1)
    max_model_len: int | None = option(
        None, "Longest prompt with its answer, in tokens. [default: the models' context]", metavar="N", min=2
    )
    max_request_bytes: int = option(4 * 2**20, "Largest request.", metavar="N", min=1)
    timeout: float = option(600.0, "Longest time from a request to the end of its answer, in seconds.", "S", min=0.1)
    grace: float = option(30.0, "Longest time for what is in flight when the server is stopped.", "S", min=0)
    cors: Sequence[str] = option((), "Origin whose pages may ask; * is any. May be repeated.", metavar="ORIGIN")
    cache_implementation: str | None = option(None, "As for `generate`, such as static on a GPU.", metavar="NAME")
