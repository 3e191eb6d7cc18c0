"""Replicas of `citer serve` on Ray Serve: `serve run citer_hf.scale.ray_serve:app model=user/my-router replicas=4`."""

import time
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pydantic
import torch
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from ..model.loading import with_saved_router
from ..model.modeling import CiterForCausalLM
from ..model.references import REPOSITORY_ID
from ..runs import import_extra, is_address
from ..serving import ServeOptions
from ..serving.server import Server, build_app
from .remote import remote_llm

serve = import_extra("ray.serve", "ray")
# The same options, from texts of a command line too.
Serving: Any = pydantic.dataclasses.dataclass(ServeOptions, frozen=True, config={"extra": "forbid"})


class ReplicaOptions(pydantic.BaseModel, extra="allow"):
    """The pair and its replicas; more options are those of `ServeOptions`, but for host and port, which are Ray's."""

    # A router's directory on every machine or its id; or both models. An LLM may be http://HOST:PORT/v1#NAME.
    model: str | None = None
    slm: str | None = None
    llm: str | None = None
    router: str = "confidence"
    # More routers over the same two models, for requests whose `model` names them; a replica keeps some of them.
    routers: str = ""
    max_routers: int = 4
    dtype: str = "auto"
    device_map: str = "auto"
    keywords: dict[str, Any] = {}  # further ones of loading, such as revision
    replicas: int = 1
    max_replicas: int | None = None  # so many, when more requests are in flight
    num_cpus: float = 1
    num_gpus: float = 0
    stall_seconds: float = 300  # a replica that makes no step for so long is replaced

    @property
    def others(self) -> list[str]:
        return [*filter(None, self.routers.split(","))]

    def serving(self) -> ServeOptions:
        """Return the options of the server, after a check of all that a replica could not serve, or see."""
        llm = None if is_address(self.llm) else self.llm
        if [self.slm is None, (llm if self.model else self.llm) is None] != [self.model is not None] * 2:
            raise ValueError("model: expected either model=PATH_OR_ID, or slm=PATH_OR_ID and llm=PATH_OR_ID.")
        for source in filter(None, (self.model, self.slm, llm, *self.others)):
            path = Path(source)
            if not path.is_absolute() and (path.exists() or not REPOSITORY_ID.fullmatch(source)):
                raise ValueError(f"{source}: replicas see no relative path. Give an absolute one, or a repository id.")
            if path.is_absolute() and not path.is_dir():
                raise ValueError(f"{source}: expected a directory that every machine sees, found none here.")
        if {"host", "port"} & (self.model_extra or {}).keys():
            raise ValueError("host, port: they are those of Ray's proxy. Leave them out, or set its http_options.")
        return Serving(**self.model_extra or {})

    def load(self) -> CiterForCausalLM:
        keywords = {"dtype": self.dtype, "device_map": self.device_map, **self.keywords}
        llm = remote_llm(self.llm, keywords)
        if self.model is not None:
            keywords |= {} if llm is None else {"llm_name_or_path": llm}
            return CiterForCausalLM.from_pretrained(self.model, **keywords)
        return CiterForCausalLM.from_pair(str(self.slm), llm, router=self.router, **keywords)


class Shared(Server):
    """A server of one more router over the pair of a replica."""

    def __del__(self) -> None:
        """End within the grace time: Ray makes place for another router."""
        until = time.monotonic() + self.options.grace
        while self._requests and time.monotonic() < until:
            time.sleep(0.05)
        self.stopping = True
        self.close()


class Replica(Server):
    """The server of a pair in a process of Ray; requests may name other routers over the same pair."""

    def __init__(self, settings: dict[str, Any]):
        self.settings, self.gauges = ReplicaOptions(**settings), dict[str, Any]()
        options, model = self.settings.serving(), self.settings.load()
        name = self.settings.model or str(self.settings.llm).rpartition("#")[2]
        super().__init__(model, model.load_tokenizer(), name, options)
        self.offered += self.settings.others
        self.others = {name: one for one in self.offered[1:] for name in {one, Path(one).name} - {*self.names}}
        self.names += tuple(self.others)
        self.servers = WeakSet[Server]([self])
        for source in self.settings.others:
            with_saved_router(model, source)  # one that does not fit is an error before clients ask for it

        async def shared(source: str) -> Server:
            other = await run_in_threadpool(with_saved_router, model, source)
            self.servers.add(server := Shared(other, self.tokenizer, source, options, self.metrics))
            return server

        self.shared = serve.multiplexed(shared, max_num_models_per_replica=self.settings.max_routers)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = build_app(self)
        if origins := list(self.options.cors):
            app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        return app

    async def answer(self, request: Request, body: Any) -> Response:
        source = self.others.get(body.model)
        server: Any = super() if source is None else await self.shared(source)
        return await server.answer(request, body)

    def check_health(self) -> None:
        """Raise an error where this replica must be replaced, and tell Ray its counters; Ray asks often."""
        for server in self.servers:
            if server.status == "dead" or server.worker.silence > self.settings.stall_seconds:
                raise RuntimeError(f"The inference thread is {server.status}, for {server.worker.silence:.0f} s.")
        torch.zeros(1, device=self.model.device).item()  # a device that has failed raises an error
        for family in self.metrics.registry.collect():
            for name, labels, value, *_ in family.samples:
                if name not in self.gauges:
                    self.gauges[name] = serve.metrics.Gauge(name, family.documentation, tuple(labels))
                self.gauges[name].set(value, labels)


def app(options: ReplicaOptions) -> Any:
    """Return the application of Ray Serve that serves a pair, with options that `serve run` or a file gives."""
    serving, count = options.serving(), dict[str, Any](num_replicas=options.replicas)
    if options.max_replicas is not None:
        bounds = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
        count = {"autoscaling_config": {**bounds, "target_ongoing_requests": serving.max_batch_size}}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="citer",
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        # Some wait in a replica for the next free slot, and all others where any replica takes them.
        max_ongoing_requests=2 * serving.max_batch_size,
        max_queued_requests=serving.max_waiting,
        graceful_shutdown_timeout_s=serving.grace,
        **count,
    )
    return deployment.bind(options.model_dump())
