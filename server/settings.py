"""All settings of an operator, read once from `PAELLERA_*` environment variables.

python -m server.settings > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.config import Encoders, Kernels

MIB = 2**20
DEVICE = r"(auto|cpu|cuda(:\d+)?|mps)"
ORIGIN = r"https?://[^\s,/]+"
MIN_KEY_LENGTH = 16
PREFIX = "PAELLERA_"


def _parts(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated list, in order and without duplicates."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _is_valid_key(key: str) -> bool:
    return len(key) >= MIN_KEY_LENGTH and key.isascii() and key.isprintable() and " " not in key


def _valid_keys(keys: SecretStr) -> SecretStr:
    # An error type of its own, because the messages of others quote the value.
    text = keys.get_secret_value()
    if text.strip() and not _parts(text):
        raise PydanticCustomError("secret", "the list has no key in it")
    if not all(map(_is_valid_key, _parts(text))):
        message = f"a key is {MIN_KEY_LENGTH} or more visible ASCII characters without commas"
        raise PydanticCustomError("secret", message)
    return keys


class Settings(BaseSettings):
    """The server's settings; `Settings(port=9000)` overrides the environment.

    Raises:
        pydantic.ValidationError: a value is invalid; the error names the field.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    # ── network ──

    host: Annotated[str, Field(description="Address to listen on")] = "127.0.0.1"
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
        Field(
            description="Comma-separated addresses and networks, or *, of proxies whose"
            " X-Forwarded-For and X-Forwarded-Proto headers are trusted"
        ),
    ] = ""
    cors_origins: Annotated[
        str,
        Field(
            pattern=rf"^(\*|{ORIGIN}(,{ORIGIN})*)?$",
            description="Comma-separated origins, or *, whose pages may call the API (CORS)",
        ),
    ] = ""

    # ── weights and devices ──

    weights: Annotated[
        str,
        Field(
            pattern=r"[^,\s]",
            description="Comma-separated bundle names or paths; the first is the default model",
        ),
    ] = "tiny"
    device: Annotated[str, Field(pattern=rf"^{DEVICE}$", description="Device of the worker")] = (
        "auto"
    )
    devices: Annotated[
        str | None,
        Field(
            pattern=rf"^{DEVICE}(,{DEVICE})*$",
            description="Devices, one worker each, such as cuda:0,cuda:1; replaces PAELLERA_DEVICE",
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
            description="Text encoders on the device, the CPU, or the device with int8 byte encoder"
        ),
    ] = "device"
    kernels: Annotated[
        Kernels,
        Field(description="Step kernels: Triton on CUDA if it is installed (auto), or torch alone"),
    ] = "auto"
    threads: Annotated[
        int, Field(ge=0, description="CPU threads of a worker; 0: measured, the fastest number")
    ] = 0
    deterministic: Annotated[
        bool, Field(description="Default of the request field `deterministic`")
    ] = False
    cuda_graphs: Annotated[
        bool, Field(description="Capture denoiser steps as CUDA graphs at start; off: run eagerly")
    ] = True
    graph_sizes: Annotated[
        str,
        Field(
            pattern=r"^(\d+x\d+(,\d+x\d+)*)?$",
            description="Comma-separated image sizes to capture beside the native one: 128x256",
        ),
    ] = ""

    # ── limits ──

    queue_rows: Annotated[
        int, Field(ge=1, description="Maximum of unfinished images; further requests get 429")
    ] = 256
    max_batch_rows: Annotated[
        int, Field(ge=1, description="Maximum of images per denoiser step")
    ] = 16
    prompt_cache_bytes: Annotated[
        int,
        Field(ge=0, description="Size of a worker's cache of encoded prompts and priors; 0: none"),
    ] = 256 * MIB
    max_side: Annotated[int, Field(ge=1, description="Maximum width and height in pixels")] = 512
    # Enough for one guided 512 × 512 image of 64 steps (34 million) or sixteen guided 256 × 256
    # ones of 12 (25 million), so that the embedded weights on a CPU answer before the default
    # timeout. A GPU allows far more.
    max_request_work: Annotated[
        int,
        Field(
            ge=1,
            description="Maximum work per request: images times steps times pixels times branches",
        ),
    ] = 50_000_000
    max_body_bytes: Annotated[int, Field(ge=1, description="Maximum size of a request's body")] = (
        32 * MIB
    )
    max_image_bytes: Annotated[
        int, Field(ge=1, description="Maximum size of one uploaded image file")
    ] = 16 * MIB
    max_image_pixels: Annotated[
        int, Field(ge=1, description="Maximum width times height of one uploaded image")
    ] = 16 * MIB
    decode_threads: Annotated[
        int, Field(ge=1, description="Requests whose uploaded images are decoded at once")
    ] = 2

    # ── keys ──

    api_keys: Annotated[
        SecretStr,
        AfterValidator(_valid_keys),
        Field(description="Comma-separated bearer keys; empty: requests need no key"),
    ] = SecretStr("")
    open_paths: Annotated[
        str,
        Field(description="Comma-separated paths without a key; /x/* is everything below /x/"),
    ] = "/,/playground/*,/docs,/openapi.json,/healthz,/readyz,/metrics"
    key_rate_per_minute: Annotated[
        float, Field(ge=0, description="POST requests per minute and key, on average; 0: no limit")
    ] = 0
    key_burst: Annotated[
        int, Field(ge=1, description="POST requests of one key at once, after a pause")
    ] = 10
    key_concurrency: Annotated[
        int, Field(ge=0, description="Unanswered POST requests of one key; 0: no limit")
    ] = 0

    # ── timeouts ──

    timeout_s: Annotated[
        float,
        Field(
            ge=0.05, le=600, description="Default of the request field `timeout_s`, its deadline"
        ),
    ] = 60
    start_wait_s: Annotated[
        float,
        Field(ge=0, description="Maximum wait of a request for a starting worker before 503"),
    ] = 30
    heartbeat_s: Annotated[
        float, Field(gt=0, description="Interval of comments in a stream without events")
    ] = 15
    receive_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            description="Timeout for reading a request's headers, and between chunks of its body",
        ),
    ] = 30
    send_timeout_s: Annotated[
        float,
        Field(gt=0, description="Timeout for a stalled client of a stream, which is disconnected"),
    ] = 30
    stall_timeout_s: Annotated[
        float,
        Field(gt=0, description="Timeout for a silent worker that owes an answer; it is replaced"),
    ] = 30
    drain_timeout_s: Annotated[
        float, Field(ge=0, description="Time for running requests when the server stops")
    ] = 30

    # ── log ──

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="Minimum severity of log lines"),
    ] = "info"
    log_prompts: Annotated[bool, Field(description="Log the prompts of every request")] = False

    @property
    def worker_devices(self) -> tuple[str, ...]:
        """The device of every worker; a device that is listed twice has two workers."""
        return (self.device,) if self.devices is None else tuple(self.devices.split(","))

    @property
    def picture_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of `graph_sizes`, in pixels."""
        pairs = [size.split("x") for size in self.graph_sizes.split(",") if size]
        return [(int(width), int(height)) for width, height in pairs]

    @property
    def bundles(self) -> tuple[str, ...]:
        """The bundles of `weights`, in order and without duplicates."""
        return _parts(self.weights)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `api_keys`."""
        return _parts(self.api_keys.get_secret_value())

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins of `cors_origins`."""
        return _parts(self.cors_origins)

    def is_open(self, path: str) -> bool:
        """Return whether `open_paths` includes the path."""
        return any(_matches(path, entry) for entry in _parts(self.open_paths))


def _matches(path: str, entry: str) -> bool:
    return path == entry or (entry.endswith("/*") and path.startswith(entry[:-1]))


# ── docs/settings.md ──────────────────────────────────────────────────────────────────────────────

HEAD = """\
# Settings

*For operators.* All environment variables of `paellera serve`, read once at start; an error names
an invalid one. Generated by `python -m server.settings > docs/settings.md`.

| variable | default | allowed | |
|---|---|---|---|
"""


def document() -> str:
    """Return docs/settings.md."""
    return HEAD + "\n".join(_rows()) + "\n"


def _rows() -> Iterator[str]:
    for name, info in Settings.model_fields.items():
        default, allowed = _default(info), _allowed(info)
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
    if low is not None:
        return f"≥ {low}"
    return "" if above is None else f"> {above}"


if __name__ == "__main__":
    print(document(), end="")
