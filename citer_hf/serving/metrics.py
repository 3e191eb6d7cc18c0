"""Counters for Prometheus."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .answers import Finished

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
SHARES = tuple(step / 10 for step in range(11))


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        seconds = partial(histogram, buckets=SECONDS)
        self.requests = counter("citer_requests", "Requests, by endpoint and HTTP status.", ["endpoint", "status"])
        self.requests_here = Gauge(
            "citer_requests_in_progress", "Requests that wait or are answered.", registry=self.registry
        )
        self.tokens = counter("citer_tokens", "Tokens written, by model.", ["model"])
        self.prompt_tokens = counter("citer_prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("citer_cached_tokens", "Tokens of prompts that a slot held already.")
        self.llm_calls = counter("citer_llm_calls", "Forward passes of the LLM.")
        self.llm_share = histogram(
            "citer_llm_share", "Share of an answer's tokens that the LLM wrote.", buckets=SHARES
        )
        arrival = "From a request's arrival to"
        self.request_seconds = seconds("citer_request_seconds", f"{arrival} the end of its answer.", ["endpoint"])
        self.first_token_seconds = seconds("citer_first_token_seconds", f"{arrival} its first token.")
        for model in ("slm", "llm"):
            self.tokens.labels(model)

    def count(self, finished: Finished) -> None:
        """Count an answer, also one whose client has gone."""
        self.tokens.labels("slm").inc(finished.tokens - finished.llm_tokens)
        self.tokens.labels("llm").inc(finished.llm_tokens)
        self.prompt_tokens.inc(finished.prompt_tokens)
        self.cached_tokens.inc(finished.cached_tokens)
        self.llm_calls.inc(finished.llm_calls)
        if not finished.tokens:
            return
        self.llm_share.observe(finished.llm_tokens / finished.tokens)
        self.first_token_seconds.observe(finished.first_token_seconds)
