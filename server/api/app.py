"""The app factory. Imports start nothing; the engine runs during the app's lifespan."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import Scope

from model.config import BundleConfig, find_bundle
from server.api import (
    routes_health,
    routes_images,
    routes_models,
    routes_native,
    routes_openai,
    static,
)
from server.api.auth import KeyGuard, Keys
from server.api.body_limit import BodyBudget, BodyLimit
from server.api.compression import Compression
from server.api.error_handlers import register_error_handlers
from server.api.head_guard import HeadGuard
from server.api.idempotency import HEADER, REPLAYED, Idempotency, IdempotencyTable
from server.api.images.admission import ImageDecoder, image_limits
from server.api.images.encode_queue import ImageEncoder
from server.api.images.marking import Marker
from server.api.images.url_store import UrlStore
from server.api.middleware import (
    CanonicalPath,
    HeadAsGet,
    HealthPort,
    InternalErrors,
    Observation,
    SecurityHeaders,
    WithHeader,
    logged_path,
)
from server.api.openapi import DocumentedApp
from server.api.origin_guard import CrossOrigin, OriginGuard
from server.api.origins import TrustedProxies
from server.api.planning.operations import OPERATIONS
from server.api.planning.work import DECODING_WORK, FILE_WORK
from server.api.sdapi import routes as sdapi_routes
from server.api.send_timeout import SendTimeout
from server.api.state import AppState, request_state
from server.engine.client import EngineClient
from server.engine.interface import MakeEngine
from server.engine.worker_process import WorkerMain, run_worker
from server.environment import PREFIX
from server.metrics import Metrics
from server.paths import HEALTH_PATHS
from server.settings import Settings

if TYPE_CHECKING:
    from server.tracing import Tracing

log = logging.getLogger(__name__)

DESCRIPTION = "Text-to-image with Paella, which generates images as VQGAN tokens."

# Seconds between two searches for answers and images whose time is over.
EXPIRY_INTERVAL_S = 30.0
# Headers of answers that pages of other origins may read.
EXPOSED_HEADERS = [
    "Content-Disposition",
    REPLAYED,
    "X-Request-Id",
    "X-Seed",
    "X-Preset",
    "X-Renoise-Order",
    "X-Model-Sha256",
    "X-Prompt-Read",
    "X-Prompt-Truncated",
    "Server-Timing",
    "Retry-After",
    "retry-after-ms",
    "x-should-retry",
]


def create_app(
    settings: Settings | None = None,
    *,
    worker: WorkerMain = run_worker,
    engine: MakeEngine | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Return the server as an ASGI app.

    Args:
        settings: default: from the environment.
        worker: main function of the worker process, importable there.
        engine: makes an engine outside this process, in place of one with a worker process.
        tracing: makes the spans; default: exports them, if the settings say so.

    Raises:
        FileNotFoundError: weights do not exist.
        pydantic.ValidationError: weights or settings are invalid.
        ValueError: settings exclude the weights or every request, ask for traces without the extra
            `otel`, or for signatures without the extra `provenance` or with an unfit certificate.
    """
    settings = settings or Settings()
    # Clients that may read the metrics must not learn each other's request ids.
    metrics = Metrics(exemplars=not settings.keys or settings.operations_port is not None)
    openai_paths = [
        f"{routes_openai.router.prefix}{endpoint.path}" for endpoint in routes_openai.ENDPOINTS
    ]
    other_paths = [*openai_paths, *(sdapi_routes.DRAWING_PATHS if settings.sdapi else ())]
    metrics.expect([f"/{operation}" for operation in OPERATIONS], other_paths)
    models = read_models(settings)
    for name, config in models.items():
        metrics.weights_info.labels(name, config.sha256).set(1)
        for preset in config.preset_names:
            metrics.preset_images.labels(name, preset)
    make_engine = engine or partial(EngineClient, worker=worker)
    tracing = tracing or _start_tracing(settings)
    made = make_engine(settings, metrics)
    state = AppState(
        settings,
        metrics,
        tracing.engine(made) if tracing else made,
        models,
        ImageDecoder(
            image_limits(settings),
            settings.decode_threads,
            settings.decode_queue_pixels,
            settings.decode_queue_bytes,
        ),
        ImageEncoder(settings.queue_rows),
        UrlStore(settings.url_store_bytes, settings.url_ttl_s),
        tracing=tracing,
        marker=Marker(settings),
    )
    metrics.url_store_bytes.set_function(lambda: state.url_store.bytes)
    idempotency = IdempotencyTable(settings.idempotency_bytes, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for warning in settings.warnings:
            log.warning("unsafe or ignored setting", extra={"fields": {"warning": warning}})
        expiry = asyncio.create_task(_expire(state.url_store, idempotency))
        try:
            for config in state.models.values():
                # Builds the indices of its vocabulary, which the first request would wait for.
                config.read_prompt("something that nobody wrote")
            try:
                await state.engine.start()
            except OSError as error:
                # For the command line, which prints it in place of a traceback.
                app.state.start_error = error
                raise
            yield
        finally:
            expiry.cancel()
            await state.engine.stop()
            state.decoder.close()
            state.encoder.close()
            if tracing:
                await tracing.stop()

    app = DocumentedApp(
        needs_key=Keys(settings.keys, settings.paths_without_key).needed_for,
        elsewhere=() if settings.operations_port is None else HEALTH_PATHS,
        title="Paellera",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.paellera = state
    app.state.start_error = None
    _add_middleware(app, settings, metrics, tracing, idempotency)
    register_error_handlers(app)
    app.include_router(routes_native.router)
    app.include_router(routes_openai.router)
    app.include_router(routes_images.router)
    app.include_router(routes_models.router)
    if settings.sdapi:
        sdapi_routes.include(app)
    app.include_router(routes_health.router)
    app.include_router(static.router)
    return app


def read_models(settings: Settings) -> dict[str, BundleConfig]:
    """Return the configurations of the served bundles by name, in the settings' order."""
    configs = [BundleConfig.read(find_bundle(bundle)) for bundle in settings.bundles]
    for config in configs:
        if max(config.native_size) > settings.max_side:
            native = f"the native size of {config.name}, {config.native_size}"
            raise ValueError(f"{PREFIX}MAX_SIDE {settings.max_side} excludes {native}")
        _check_work(config, settings)
    models = {config.name: config for config in configs}
    if len(models) < len(configs):
        raise ValueError(f"two of the bundles {', '.join(settings.bundles)} have the same name")
    for alias, name in settings.aliases.items():
        if name not in models or alias in models:
            loaded = ", ".join(models)
            message = f"{alias}={name} must be a new name for one of {loaded}"
            raise ValueError(f"{PREFIX}MODEL_ALIASES: {message}")
    return models


def _check_work(config: BundleConfig, settings: Settings) -> None:
    """Raise ValueError if even the smallest image is too much work, its steps left out."""
    side, allowed = config.smallest_side, settings.max_request_work
    if (least := side**2 * (DECODING_WORK + FILE_WORK["png"])) > allowed:
        message = f"{PREFIX}MAX_REQUEST_WORK {allowed} excludes every request to {config.name}"
        raise ValueError(f"{message}: the smallest, {side}x{side} pixels, costs over {least}")


async def _expire(store: UrlStore, idempotency: IdempotencyTable) -> None:
    """Free the memory of what is over, although nobody asks for it."""
    while True:
        await asyncio.sleep(EXPIRY_INTERVAL_S)
        store.expire()
        idempotency.answers.expire()


def _start_tracing(settings: Settings) -> Tracing | None:
    """Return what makes the spans. Raises ValueError without the packages that it needs."""
    if not settings.tracing:
        return None
    try:
        from server.tracing import Tracing
    except ModuleNotFoundError as error:
        message = "PAELLERA_TRACING needs the extra otel: pip install 'paellera[otel]'"
        raise ValueError(message) from error
    return Tracing()


def _span_attributes(scope: Scope) -> dict[str, str | None]:
    state = request_state(scope)
    return {
        "paellera.request_id": state.id,
        "paellera.key": state.client,
        "error.type": state.error_code,
        # Instead of the tracer's own.
        "url.path": logged_path(scope),
    }


def _add_middleware(
    app: FastAPI,
    settings: Settings,
    metrics: Metrics,
    tracing: Tracing | None,
    idempotency: IdempotencyTable,
) -> None:
    """Add the middleware, the innermost first."""
    app.add_middleware(HeadAsGet)
    if settings.idempotency_bytes:
        keep = partial(Idempotency, table=idempotency)
        app.add_middleware(WithHeader, header=HEADER, middleware=keep)
    app.add_middleware(
        BodyLimit,
        limit=settings.max_body_bytes,
        timeout_s=settings.receive_timeout_s,
        total_s=settings.body_timeout_s,
        # A budget below the bound of one body would reject that body even when it is alone.
        budget=BodyBudget(max(settings.body_budget_bytes, settings.max_body_bytes)),
    )
    app.add_middleware(KeyGuard, settings=settings)
    app.add_middleware(OriginGuard, settings=settings)
    if settings.operations_port is not None:
        app.add_middleware(HealthPort, port=settings.operations_port)
    app.add_middleware(HeadGuard)
    if tracing:
        app.add_middleware(tracing.middleware, untraced=HEALTH_PATHS, describe=_span_attributes)
    app.add_middleware(InternalErrors)
    if settings.origins:
        app.add_middleware(CrossOrigin, origins=settings.origins, exposed=EXPOSED_HEADERS)
    app.add_middleware(Observation, metrics=metrics)
    app.add_middleware(Compression)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(CanonicalPath)
    if settings.trusted_proxies:
        app.add_middleware(TrustedProxies, proxies=settings.trusted_proxies)
    app.add_middleware(
        SendTimeout, timeout_s=settings.send_timeout_s, budget=settings.answer_budget_bytes
    )
