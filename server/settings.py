"""All settings of an operator, read once from `PAELLERA_*` environment variables.

python -m server.settings > docs/settings.md
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from model.config import Encoders, Kernels
from server.environment import (
    PREFIX,
    given_settings,
    kubernetes_variables,
    refuse_unknown,
    without_blank,
)
from server.paths import (
    DOCS,
    IMAGES,
    LIVENESS,
    METRICS,
    OPEN_PATHS,
    OPENAPI,
    PLAYGROUND,
    PROBES,
    READINESS,
    OpenPaths,
)

MIB = 2**20
DAY_S = 86_400
MIN_KEY_LENGTH = 16
# Another name for a model, and the model's own.
ALIAS = re.compile(r"[^\s,=]{1,64}=[^\s,=]{1,64}")
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?|mps")
DEVICES = "auto, cpu, cuda, mps or a GPU such as cuda:1"
HOST = re.compile(r"\w([\w.-]*\w)?", re.ASCII)
# A host name, an address, or every name below a domain, without a port.
HOST_PATTERN = re.compile(r"\*|(\*\.)?\w([\w.-]*\w)?|\[[0-9A-Fa-f:.]+\]", re.ASCII)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s,/]+")
SIZE = re.compile(r"[0-9]{1,5}x[0-9]{1,5}")
URL = re.compile(r"https?://[^\s/?#@,]+(/[^\s?#]*)?")


def _items(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated list, in order."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parts(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated list, in order and without duplicates."""
    return tuple(dict.fromkeys(_items(text)))


def _is_valid_key(key: str) -> bool:
    return len(key) >= MIN_KEY_LENGTH and key.isascii() and key.isprintable() and " " not in key


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"


def _valid_keys(keys: SecretStr) -> SecretStr:
    # An error type of its own, because the messages of others quote the value.
    text = keys.get_secret_value()
    if text.strip() and not _parts(text):
        raise PydanticCustomError("secret", "the list has no key in it")
    # Docker's --env-file and Kubernetes keep the quotes that a shell removes.
    if any(map(_is_quoted, (text.strip(), *_parts(text)))):
        raise PydanticCustomError("secret", "remove the quotes around the value or a key")
    if not all(map(_is_valid_key, _parts(text))):
        message = f"a key is {MIN_KEY_LENGTH} or more visible ASCII characters without commas"
        raise PydanticCustomError("secret", message)
    return keys


def _each(is_valid: Callable[[str], object], words: str) -> AfterValidator:
    """Return a validator of comma-separated lists, spaces allowed. words: the permitted parts."""

    def checked(text: str | None) -> str | None:
        for part in _parts(text or ""):
            if not is_valid(part):
                raise _wrong(words if part == text else f"{words}, not {part[:80]!r}")
        return text

    return AfterValidator(checked)


def _wrong(words: str) -> PydanticCustomError:
    """Return the error of a setting that must be what the words say."""
    return PydanticCustomError("setting", "must be {words}", {"words": words})


def _valid_proxies(proxies: str) -> str:
    """Refuse what would match no client, and therefore be ignored."""
    for proxy in _parts(proxies) if proxies.strip() != "*" else ():
        try:
            network = ipaddress.ip_network(proxy, strict=False)
        except ValueError:
            words = "* alone, or addresses and networks such as 10.0.0.0/8"
            raise _wrong(f"{words}, not {proxy[:80]!r}") from None
        if ipaddress.ip_interface(proxy).ip != network.network_address:
            message = f"{proxy}: the bits after the prefix must be zero, as in {network}"
            raise PydanticCustomError("setting", "{message}", {"message": message})
    return proxies.strip()


def _valid_public_url(url: str) -> str:
    if "@" in url:
        # The message must not quote a password.
        raise PydanticCustomError("secret", "must have no user name and no password")
    if url and not URL.fullmatch(url):
        raise _wrong("an http:// or https:// URL without a query: https://images.example.com")
    return url


def _valid_host(host: str) -> str:
    if not HOST.fullmatch(host) and not _is_address(host):
        raise _wrong("an IP address or a host name, without a scheme, a port or brackets")
    return host


def _valid_origins(origins: str) -> str:
    for origin in _parts(origins) if origins.strip() != "*" else ():
        if not ORIGIN.fullmatch(origin):
            words = "* alone, or origins such as https://a.example, without a slash at the end"
            raise _wrong(f"{words}, not {origin[:80]!r}")
    return origins.strip()


def _valid_device(device: str) -> str:
    if not DEVICE.fullmatch(device):
        raise _wrong(DEVICES)
    return device


def _valid_weights(weights: str) -> str:
    if not _parts(weights):
        raise _wrong("names or paths of bundles")
    return weights


def _is_path(path: str) -> bool:
    return path.startswith("/") and "*" not in path.removesuffix("/*")


def _is_allowed_host(host: str) -> bool:
    return bool(HOST_PATTERN.fullmatch(host)) or _is_address(host)


def _lower(text: object) -> object:
    return text.lower() if isinstance(text, str) else text


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Environment(EnvSettingsSource):
    """Reads settings from `PAELLERA_*` variables; an empty variable counts as absent.

    Raises:
        UnknownVariableError: a variable with the prefix is neither a setting nor known otherwise.
    """

    def __init__(self, settings: type[BaseSettings]) -> None:
        super().__init__(settings)
        refuse_unknown(os.environ, settings.model_fields)
        given = given_settings(os.environ, settings.model_fields)
        self.env_vars = {
            f"{PREFIX}{field}".lower(): os.environ[name] for field, name in given.items()
        }


class Settings(BaseSettings):
    """The server's settings; `Settings(port=9000)` overrides the environment.

    An empty value counts as absent.

    Raises:
        pydantic.ValidationError: a value is invalid; the error names the field.
        UnknownVariableError: a ValueError; an environment variable `PAELLERA_*` is no setting.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    # ── network ──

    host: Annotated[str, AfterValidator(_valid_host), Field(description="Address to listen on")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, le=65535, description="Port; 0 is any free one")] = 8000
    operations_port: Annotated[
        int | None,
        Field(
            ge=1,
            le=65535,
            description="Port of /healthz, /readyz and /metrics, in place of the server's port",
        ),
    ] = None
    trusted_proxies: Annotated[
        str,
        AfterValidator(_valid_proxies),
        Field(
            description="Comma-separated addresses and networks, or *, of proxies whose"
            " X-Forwarded-For, X-Forwarded-Proto and X-Forwarded-Host headers are trusted"
        ),
    ] = ""
    cors_origins: Annotated[
        str,
        AfterValidator(_valid_origins),
        Field(
            description="Comma-separated origins, or *, whose pages may call the API (CORS)",
        ),
    ] = ""
    allowed_hosts: Annotated[
        str,
        _each(_is_allowed_host, "*, host names, *.names or addresses without a port"),
        Field(
            description="Comma-separated names (*.example.com: every name below it; *: any) that"
            " requests may have in their Host header. Default: localhost, *.localhost and"
            " addresses if PAELLERA_HOST is loopback, else *"
        ),
    ] = ""
    public_url: Annotated[
        str,
        AfterValidator(_valid_public_url),
        Field(
            description="The server's own address for clients, if a proxy changes it:"
            " https://images.example.com",
        ),
    ] = ""

    # ── clients of other servers ──

    sdapi: Annotated[
        bool, Field(description="Serve AUTOMATIC1111's endpoints under /sdapi/v1 too")
    ] = False
    model_aliases: Annotated[
        str,
        _each(ALIAS.fullmatch, "pairs such as dall-e-3=tiny,*=tiny"),
        Field(
            description="Comma-separated aliases of models, such as dall-e-3=tiny; `*=tiny`: every"
            " unknown name means tiny"
        ),
    ] = ""
    sizes: Annotated[
        Literal["strict", "nearest"],
        Field(
            description="strict: reject sizes that the weights cannot draw; nearest: draw the"
            " nearest size near the native area, which the response reports"
        ),
    ] = "strict"

    # ── weights and devices ──

    weights: Annotated[
        str,
        AfterValidator(_valid_weights),
        Field(
            description="Comma-separated bundle names or paths; the first is the default model",
        ),
    ] = "tiny"
    device: Annotated[
        str,
        AfterValidator(_valid_device),
        Field(
            description="Device of the worker; auto: the first GPU of CUDA, else the CPU",
        ),
    ] = "auto"
    devices: Annotated[
        str | None,
        _each(DEVICE.fullmatch, DEVICES),
        Field(
            description="Devices, one worker each, such as cuda:0,cuda:1, or cpu,cpu: two workers"
            " that share the cores; replaces PAELLERA_DEVICE",
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(
            description="Precision; auto: float16 on CUDA, bfloat16 on CPUs with it, else float32"
        ),
    ] = "auto"
    encoders: Annotated[
        Encoders,
        Field(
            description="Place of the text encoders. device: PAELLERA_DEVICE; cpu: the CPU; int8:"
            " on the device, with the ByT5 encoder in int8"
        ),
    ] = "device"
    kernels: Annotated[
        Kernels,
        Field(description="Step kernels: Triton on CUDA if it is installed (auto), or torch alone"),
    ] = "auto"
    compiled: Annotated[
        bool,
        Field(
            description="Compute by what `paellera compile` has made for these weights, if anything"
        ),
    ] = True
    compiled_dir: Annotated[
        Path | None,
        Field(
            description="Folder of compiled networks; by default paellera/compiled in the user's"
            " cache ($XDG_CACHE_HOME, else ~/.cache)"
        ),
    ] = None
    threads: Annotated[
        int,
        Field(
            ge=0,
            description="CPU threads of a worker; 0: the server measures and uses the fastest"
            " number",
        ),
    ] = 0
    deterministic: Annotated[
        bool, Field(description="Default of the request field `deterministic`")
    ] = False
    cuda_graphs: Annotated[
        bool,
        Field(description="Capture denoiser steps as CUDA graphs at start; false: run eagerly"),
    ] = True
    graph_sizes: Annotated[
        str,
        _each(SIZE.fullmatch, "sizes in pixels such as 128x256"),
        Field(
            description="Comma-separated image sizes to capture beside the native one: 128x256",
        ),
    ] = ""

    # ── limits ──

    queue_rows: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum number of unfinished images, or tiles of enlarged ones; further"
            " requests get 429",
        ),
    ] = 256
    queue_bytes: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum size of unfinished requests' decoded images; further requests get"
            " 429",
        ),
    ] = 128 * MIB
    max_batch_rows: Annotated[
        int, Field(ge=1, description="Maximum number of images per denoiser step")
    ] = 16
    prompt_cache_bytes: Annotated[
        int,
        Field(ge=0, description="Size of a worker's cache of encoded prompts and priors; 0: none"),
    ] = 256 * MIB
    max_side: Annotated[int, Field(ge=1, description="Maximum width and height in pixels")] = 512
    upscale_max_side: Annotated[
        int, Field(ge=1, description="Maximum width and height of results of /upscale and `hires`")
    ] = 1024
    # Enough for 64 frames, the most of an interpolation, at 256 × 256 in 12 guided steps as a GIF,
    # or for sixteen 512 × 512 images in as many steps. Sixteen 256 × 256 images in the 2 guided
    # steps of the embedded weights' default preset are a sixteenth of it. These weights on a CPU
    # answer all of these before the default timeout. A GPU allows far more.
    max_request_work: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum work per request: images times pixels times (steps times branches,"
            " plus 4 for decoding and file, 9 for a GIF, 4 for each preview); enlarged images count"
            " by their tiles",
        ),
    ] = 64 * 256 * 256 * (12 * 2 + 9)
    max_body_bytes: Annotated[int, Field(ge=1, description="Maximum size of a request's body")] = (
        32 * MIB
    )
    body_budget_bytes: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum size of all bodies above 128 KiB whose answers have not begun,"
            " together",
        ),
    ] = 256 * MIB
    answer_budget_bytes: Annotated[
        int,
        Field(ge=1, description="Maximum size of all answers that clients have not read, together"),
    ] = 256 * MIB
    idempotency_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Maximum size of answers kept for repeats under an Idempotency-Key; 0: the"
            " header is ignored",
        ),
    ] = 64 * MIB
    url_store_bytes: Annotated[
        int,
        Field(
            ge=0,
            description="Maximum size of images kept for response_format url; 0: it is an error",
        ),
    ] = 64 * MIB
    url_ttl_s: Annotated[
        float,
        Field(
            gt=0, le=DAY_S, description="Seconds for which an image of response_format url is kept"
        ),
    ] = 3600
    max_connections: Annotated[
        int, Field(ge=1, description="Maximum number of open connections")
    ] = 1000
    max_image_bytes: Annotated[
        int, Field(ge=1, description="Maximum size of one uploaded image file")
    ] = 16 * MIB
    max_image_pixels: Annotated[
        int, Field(ge=1, description="Maximum width times height of one uploaded image")
    ] = 16 * MIB
    max_jpeg_pixels: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum width times height of one uploaded JPEG that is scaled down while"
            " it is decoded",
        ),
    ] = 64 * MIB
    max_heic_pixels: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum width times height of one uploaded HEIC photo (8 bits, 4:2:0) that"
            " is scaled down; PAELLERA_MAX_IMAGE_PIXELS if that is more",
        ),
    ] = 25 * MIB
    max_request_pixels: Annotated[
        int,
        Field(ge=1, description="Maximum width times height of all images of a request together"),
    ] = 64 * MIB
    decode_queue_pixels: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum number of pixels that wait to be decoded; further requests get"
            " 429",
        ),
    ] = 256 * MIB
    decode_queue_bytes: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum size of image files that wait to be decoded; further requests get"
            " 429",
        ),
    ] = 128 * MIB
    decode_threads: Annotated[
        int, Field(ge=1, description="Number of requests whose uploaded images are decoded at once")
    ] = 2

    # ── files ──

    mark: Annotated[
        bool,
        Field(description="Mark every generated file as made by AI, in XMP metadata"),
    ] = True
    embed_parameters: Annotated[
        bool,
        Field(description="Write the request's parameters, prompts included, into generated files"),
    ] = True
    c2pa_certificate: Annotated[
        str,
        Field(
            description="PEM file of a certificate and its issuers; generated files are then signed"
            " with C2PA, which needs the extra `provenance`"
        ),
    ] = ""
    c2pa_key: Annotated[str, Field(description="PEM file of that certificate's private key")] = ""
    c2pa_algorithm: Annotated[
        Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"],
        Field(description="Signature algorithm that fits the key"),
    ] = "es256"

    # ── keys ──

    api_keys: Annotated[
        SecretStr,
        AfterValidator(_valid_keys),
        Field(description="Comma-separated bearer keys; empty: requests need no key"),
    ] = SecretStr("")
    open_paths: Annotated[
        str | None,
        _each(_is_path, "paths that begin with /; * may only follow the last /"),
        Field(
            description="Comma-separated paths without a key; /x/* is everything below /x/."
            f" Default: {', '.join(OPEN_PATHS)}, and /metrics on PAELLERA_OPERATIONS_PORT. A value"
            " replaces the list; on PAELLERA_OPERATIONS_PORT the probes stay open"
        ),
    ] = None
    key_rate_per_minute: Annotated[
        float, Field(ge=0, description="POST requests per minute and key, on average; 0: no limit")
    ] = 0
    key_burst: Annotated[
        int,
        Field(
            ge=1, description="Maximum number of POST requests of one key at once, after a pause"
        ),
    ] = 10
    key_concurrency: Annotated[
        int,
        Field(
            ge=0, description="Maximum number of unanswered POST requests of one key; 0: no limit"
        ),
    ] = 0

    # ── timeouts ──

    timeout_s: Annotated[
        float,
        Field(
            ge=0.05,
            le=600,
            description="Default of the request field `timeout_s`, the deadline in seconds",
        ),
    ] = 60
    start_wait_s: Annotated[
        float,
        Field(
            ge=0,
            le=DAY_S,
            description="Seconds that a request waits at most for a starting worker, before 503",
        ),
    ] = 30
    heartbeat_s: Annotated[
        float,
        Field(gt=0, le=DAY_S, description="Seconds between comments in a stream without events"),
    ] = 15
    receive_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=DAY_S,
            description="Timeout in seconds for reading a request's headers, and between chunks"
            " of its body",
        ),
    ] = 30
    body_timeout_s: Annotated[
        float,
        Field(gt=0, le=DAY_S, description="Timeout in seconds for reading a request's whole body"),
    ] = 120
    send_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=DAY_S,
            description="Timeout in seconds for a client that reads nothing of its answer; it is"
            " disconnected",
        ),
    ] = 30
    keep_alive_s: Annotated[
        float,
        Field(
            ge=0,
            le=DAY_S,
            description="Timeout in seconds for an idle connection after an answer; must exceed the"
            " proxy's",
        ),
    ] = 75
    stall_timeout_s: Annotated[
        float,
        Field(
            gt=0, le=DAY_S, description="Timeout in seconds for a silent worker, which is replaced"
        ),
    ] = 30
    start_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=DAY_S,
            description="Timeout in seconds for a worker that loads its weights; it is replaced",
        ),
    ] = 600
    shutdown_delay_s: Annotated[
        float,
        Field(
            ge=0,
            le=DAY_S,
            description="Seconds after SIGTERM in which /readyz is 503, and requests are still"
            " accepted",
        ),
    ] = 0
    drain_timeout_s: Annotated[
        float,
        Field(ge=0, le=DAY_S, description="Seconds for running requests when the server stops"),
    ] = 30

    # ── log ──

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(_lower),
        Field(description="Minimum severity of log lines"),
    ] = "info"
    log_prompts: Annotated[bool, Field(description="Log the prompts of every request")] = False
    tracing: Annotated[
        bool,
        Field(
            description="Export OpenTelemetry spans by OTLP, as the OTEL_* variables say; needs the"
            " extra `otel`"
        ),
    ] = False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the arguments, then the environment."""
        assert isinstance(init_settings, InitSettingsSource)
        init_settings.init_kwargs = without_blank(init_settings.init_kwargs)
        return init_settings, Environment(settings_cls)

    @field_validator("operations_port")
    @classmethod
    def _ports_differ(cls, port: int | None, info: ValidationInfo) -> int | None:
        if port is not None and port == info.data.get("port"):
            raise PydanticCustomError("port", "must not be the port of the API")
        return port

    @model_validator(mode="after")
    def _signature_is_whole(self) -> Self:
        if bool(self.c2pa_certificate) != bool(self.c2pa_key):
            message = f"{PREFIX}C2PA_CERTIFICATE and {PREFIX}C2PA_KEY are needed together"
            raise ValueError(message)
        if self.c2pa_certificate and not self.mark:
            message = f"{PREFIX}MARK=false leaves nothing to sign: remove {PREFIX}C2PA_CERTIFICATE"
            raise ValueError(f"{message}, or set {PREFIX}MARK=true")
        return self

    @property
    def worker_devices(self) -> tuple[str, ...]:
        """The device of every worker; a device that is listed twice has two workers."""
        return (self.device,) if self.devices is None else _items(self.devices)

    @property
    def captured_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of `graph_sizes`, in pixels."""
        pairs = [size.split("x") for size in _items(self.graph_sizes)]
        return [(int(width), int(height)) for width, height in pairs]

    @property
    def bundles(self) -> tuple[str, ...]:
        """The bundles of `weights`, in order and without duplicates."""
        return _parts(self.weights)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `api_keys`."""
        return _parts(self.api_keys.get_secret_value())

    @cached_property
    def aliases(self) -> dict[str, str]:
        """The names of models by the other names in `model_aliases`."""
        pairs = [alias.partition("=") for alias in _parts(self.model_aliases)]
        return {alias: name for alias, _, name in pairs}

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins of `cors_origins`."""
        return _parts(self.cors_origins)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The entries of `allowed_hosts`; none: the default ones."""
        return _parts(self.allowed_hosts)

    @property
    def is_local(self) -> bool:
        """Return whether `host` is an address or a name of this machine's loopback interface."""
        name = self.host.lower().strip("[]")
        if _is_address(name):
            return ipaddress.ip_address(name).is_loopback
        return name == "localhost" or name.endswith(".localhost")

    @property
    def exposure(self) -> str | None:
        """The warning that other machines may send requests without a key, if they may."""
        if self.is_local or self.keys:
            return None
        return f"listening on {self.host} without API keys; set {PREFIX}API_KEYS"

    @property
    def warnings(self) -> list[str]:
        """The warnings that the log has at start, about these settings and the environment."""
        found = [self.exposure] if self.exposure else []
        if not self.is_local and not self.allowed_hosts:
            message = f"requests may name any host; set {PREFIX}ALLOWED_HOSTS"
            found.append(f"{message} against DNS rebinding")
        found += self._closed_paths()
        if ignored := kubernetes_variables(os.environ):
            shown = ", ".join(ignored[:5]) + (", …" if len(ignored) > 5 else "")
            message = f"Kubernetes' service variables are ignored: {shown}"
            found.append(f"{message}; enableServiceLinks: false in the pod avoids them")
        return found

    def _closed_paths(self) -> Iterator[str]:
        """Yield a warning for each use that a list of open paths leaves without its paths."""
        if not self.keys or self.open_paths is None:
            return
        scraped = () if self.operations_port is None else (METRICS,)
        linked = (IMAGES + "*",) if self.url_store_bytes else ()
        uses = {"probes": (LIVENESS, READINESS), "Prometheus": scraped, "images by URL": linked}
        opened = OpenPaths(self.paths_without_key)
        if DOCS in opened:
            uses[DOCS] = (OPENAPI, f"{PLAYGROUND}*")
        for use, paths in uses.items():
            if closed := [path for path in paths if path not in opened]:
                message = f"{PREFIX}OPEN_PATHS replaces the default list and lacks"
                yield f"{message} {', '.join(closed)}: {use} will get 401 without a key"

    @property
    def paths_without_key(self) -> tuple[str, ...]:
        """The entries of `open_paths`, or the default ones; probes on a port of their own too."""
        if self.open_paths is None:
            return OPEN_PATHS if self.operations_port is None else (*OPEN_PATHS, METRICS)
        opened = _parts(self.open_paths)
        return opened if self.operations_port is None else (*opened, *PROBES)


# ── docs/settings.md ──────────────────────────────────────────────────────────────────────────────

HEAD = """\
# Settings

*For operators.* All environment variables of `paellera serve`, read once at start; an error names
an invalid one. Generated by `python -m server.settings > docs/settings.md`. The
[glossary](architecture.md#glossary) explains row, branch, native size, size step, prior, recipe and
bundle.
"""
TABLE = """\
| variable | default | allowed | |
|---|---|---|---|"""
# The headings, by the first setting below each.
GROUPS = {
    "host": "Network",
    "sdapi": "Clients of other servers",
    "weights": "Weights and devices",
    "queue_rows": "Limits",
    "mark": "Files",
    "api_keys": "Keys",
    "timeout_s": "Timeouts",
    "log_level": "Log and traces",
}
# Values that a setting's type does not tell.
ALLOWED = {
    "device": "`auto`, `cpu`, `cuda`, `cuda:1` …, `mps`",
    "devices": "each as `PAELLERA_DEVICE`",
}


def document() -> str:
    """Return docs/settings.md."""
    return HEAD + "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    for name, info in Settings.model_fields.items():
        if name in GROUPS:
            yield f"\n## {GROUPS[name]}\n\n{TABLE}"
        default, allowed = _default(info), ALLOWED.get(name) or _allowed(info)
        yield f"| `{PREFIX}{name.upper()}` | {default} | {allowed} | {info.description} |"


def _default(info: FieldInfo) -> str:
    value = info.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and value >= MIB and not value % MIB:
        return f"`{value}` ({value // MIB} Mi)"
    return f"`{value}`"


def _allowed(info: FieldInfo) -> str:
    if choices := get_args(info.annotation):
        literals = [choice for choice in choices if isinstance(choice, str)]
        if literals:
            return ", ".join(f"`{choice}`" for choice in literals)
    if info.annotation is bool:
        return "`true`, `false`"
    bounds: dict[str, Any] = {}
    for constraint in info.metadata:
        for kind in ("ge", "gt", "le"):
            if (bound := getattr(constraint, kind, None)) is not None:
                bounds[kind] = bound
    low, above, high = (bounds.get(kind) for kind in ("ge", "gt", "le"))
    if low is not None and high is not None:
        return f"{low}…{high}"
    if above is not None and high is not None:
        return f"> {above}, ≤ {high}"
    if low is not None:
        return f"≥ {low}"
    return "" if above is None else f"> {above}"


if __name__ == "__main__":
    print(document(), end="")
