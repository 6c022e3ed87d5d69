"""The HTTP API over many engines, on Ray Serve: `serve run server.ray_app:app max_replicas=8`.

Two deployments: `Api` is the FastAPI app, `Engine` one engine with its worker process per replica.
A job goes to the replica with the earliest expected finish; a lost replica costs time but no
answer, because jobs are seeded. docs/scale.md says how to run it.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import httpx
import ray
from fastapi import FastAPI, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingContext,
    AutoscalingPolicy,
    RequestRouterConfig,
)
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs
from server.api import create_app
from server.api.middleware import canonical_path
from server.engine.errors import EngineError
from server.engine.job import Job
from server.engine.messages import Finished
from server.engine.worker_process import WorkerMain, run_worker
from server.metrics import Metrics
from server.paths import IMAGES
from server.ray_serve.broadcast import Report, ask_all, best_answer
from server.ray_serve.engines import Call, LocalEngine, RemoteEngine
from server.ray_serve.routing import Load, WaitEstimator, replicas_for
from server.settings import Settings
from server.uvicorn_server import WRITE_TIMEOUT_S

# The engines' own queues reject requests with 429; Ray's would let them wait silently.
UNBOUNDED = 100_000
# In an update, one new replica starts before an old one stops, up to a hundred replicas.
SURGE_PERCENT = 1


class Scale(BaseModel):
    """Arguments of `serve run`. Replicas take `PAELLERA_*` settings from where it is run."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    min_replicas: Annotated[int, Field(ge=1, description="Minimum number of engines")] = 1
    max_replicas: Annotated[int, Field(ge=1, description="Maximum number of engines")] = 1
    target_rows: Annotated[
        float,
        Field(
            gt=0, description="Unfinished images per replica beyond which another one is started"
        ),
    ] = 16
    upscale_delay_s: Annotated[
        float, Field(ge=0, description="Delay before replicas are added")
    ] = 10
    downscale_delay_s: Annotated[
        float, Field(ge=0, description="Delay before replicas are removed")
    ] = 300
    look_back_s: Annotated[
        float,
        Field(
            gt=10, description="Averaging period of unfinished images; Ray requires more than 10"
        ),
    ] = 30
    cpus: Annotated[
        float,
        Field(ge=0, description="Ray CPUs per replica; set PAELLERA_THREADS to the same number"),
    ] = 1
    gpus: Annotated[
        float, Field(ge=0, description="Ray GPUs per replica; its one worker sees no other")
    ] = 0
    api_replicas: Annotated[
        int,
        Field(
            ge=1, description="HTTP processes; limits per key and idempotency keys apply to each"
        ),
    ] = 1
    start_timeout_s: Annotated[
        float, Field(gt=0, description="Timeout for a replica to load its weights")
    ] = 600
    worker: WorkerMain = run_worker


def app(scale: Scale) -> serve.Application:
    """Return the application. Raises the exceptions of `create_app` and `Settings`."""
    settings = Settings()
    both = {
        "max_ongoing_requests": UNBOUNDED,
        "max_surge_percent": SURGE_PERCENT,
        "logging_config": {"enable_access_log": False},
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + WRITE_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    engine = serve.deployment(
        health_check_period_s=5,
        autoscaling_config=_autoscaling(scale),
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=ShortestWait, request_routing_stats_period_s=1.0
        ),
        **both,
    )(Engine)
    api = serve.deployment(num_replicas=scale.api_replicas, **both)(serve.ingress()(Api))
    return api.bind(settings, engine.bind(settings, scale.start_timeout_s, scale.worker))


def _autoscaling(scale: Scale) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=scale.min_replicas,
        max_replicas=scale.max_replicas,
        upscale_delay_s=scale.upscale_delay_s,
        downscale_delay_s=scale.downscale_delay_s,
        look_back_period_s=scale.look_back_s,
        policy=AutoscalingPolicy(
            policy_function=ByRows, policy_kwargs={"target_rows": scale.target_rows}
        ),
    )


class ByRows:
    """Autoscaling policy: `target_rows` unfinished images per replica.

    Ray applies bounds and delays.
    """

    def __init__(self, target_rows: float) -> None:
        self._target_rows = target_rows

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas wanted."""
        rows = sum(context.aggregated_metrics.get("rows", {}).values())
        return replicas_for(rows, self._target_rows), {}


class ShortestWait(RequestRouter):
    """Request router: the replica with the earliest expected finish, then the next ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waits = WaitEstimator(ray.get_runtime_context().get_actor_id())

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Rank the replicas for one job."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        job = next(arg for arg in pending_request.args if isinstance(arg, Job))
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        loads = {id: Load(**replica.routing_stats) for id, replica in by_id.items()}
        ranked = self._waits.rank(list(by_id), loads, job)
        # At once, not when the replica has accepted: simultaneous jobs must know of each other.
        self._waits.assign(pending_request.metadata.internal_request_id, ranked[0], job)
        return [[by_id[id]] for id in ranked]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Stop counting a completed job."""
        self._waits.complete(internal_request_id, replica_id)


class Engine:
    """One engine.

    Ray routes to it once its workers are ready, and replaces it if they stay lost.
    """

    async def __init__(  # type: ignore[misc]
        self, settings: Settings, start_timeout_s: float, worker: WorkerMain
    ) -> None:
        logs.configure(settings.log_level)
        self._engine = LocalEngine(settings, worker)
        await self._engine.start(start_timeout_s)

    async def __del__(self) -> None:
        await self._engine.stop()

    async def run(self, *args: Any) -> AsyncIterator[Call | Finished | EngineError]:
        """Run a job; yield hook calls, then the outcome."""
        async for message in self._engine.run(*args):
            yield message

    async def report(self) -> Report:
        """Return metrics, and the engine's status if there is one."""
        return self._engine.report(_name())

    async def record_routing_stats(self) -> dict[str, Any]:
        """Return the load, for routing."""
        return asdict(self._engine.load())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the unfinished images, for autoscaling."""
        return {"rows": self._engine.rows}

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine stays unready."""
        self._engine.check()


class Api:
    """The HTTP API; its engine is all replicas of `Engine`."""

    def __init__(self, settings: Settings, engines: Any) -> None:
        logs.configure(settings.log_level)
        context = serve.get_replica_context()
        self._peers = serve.get_deployment_handle(context.deployment, context.app_name)
        self._engines = engines
        # Ray's proxy has a single port.
        settings = settings.model_copy(update={"operations_port": None})
        self._app = create_app(settings, engine=self._make_engine)

    def _make_engine(self, settings: Settings, metrics: Metrics) -> RemoteEngine:
        self._engine = RemoteEngine(settings, metrics, self._engines, self._peers)
        return self._engine

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Front(self._app, self._peers)

    async def report(self) -> Report:
        """Return metrics, and the engine's status if there is one."""
        return Report(_name(), None, list(self._engine.own_metrics.collect()))

    async def answer(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """Return this replica's answer to a request without a body."""
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(self._app), base_url="http://peer"
        ) as client:
            plain = {**headers, "accept-encoding": "identity"}
            answer = await client.request(method, path, headers=plain)
        return answer.status_code, dict(answer.headers), answer.content


class Front:
    """ASGI app around each API replica.

    A DELETE goes to all, since any may have the request, and so does a GET of a stored image.
    """

    def __init__(self, app: FastAPI, peers: Any) -> None:
        self._app, self._peers = app, peers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or broadcast it."""

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Ray's proxy adds the same header.
                del MutableHeaders(scope=message)["X-Request-Id"]
            await send(message)

        if scope["type"] == "http" and _is_for_all(scope):
            await (await self._best(scope))(scope, receive, send_without_id)
        else:
            await self._app(scope, receive, send_without_id)

    async def _best(self, scope: Scope) -> Response:
        """Return the best of all answers."""
        method, path = scope["method"], scope["raw_path"].decode()
        answers = await ask_all(self._peers, "answer", method, path, dict(Headers(scope=scope)))
        return best_answer(answers or [])


def _is_for_all(scope: Scope) -> bool:
    is_image = canonical_path(scope).startswith(IMAGES)
    return scope["method"] == "DELETE" or (is_image and scope["method"] in ("GET", "HEAD"))


def _name() -> str:
    context = serve.get_replica_context()
    return f"{context.deployment}-{context.replica_tag}"
