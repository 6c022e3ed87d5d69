"""Everything an operator can set, read once from `PAELLERA_*` variables. No other file reads the environment."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.config import Encoders, Kernels

MIB = 2**20
DEVICE = r"(auto|cpu|cuda(:\d+)?|mps)"
ORIGIN = r"https?://[^\s,/]+"
SHORTEST_KEY = 16


def _parts(text: str) -> tuple[str, ...]:
    """Of a comma list, in order and once each."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _whole_keys(keys: SecretStr) -> SecretStr:
    # A type of complaint of its own, because others quote what was sent.
    text = keys.get_secret_value()
    if text.strip() and not _parts(text):
        raise PydanticCustomError("secret", "a list without a key in it")
    if not all(len(key) >= SHORTEST_KEY and key.isascii() and key.isprintable() and " " not in key for key in _parts(text)):
        raise PydanticCustomError("secret", f"every key has {SHORTEST_KEY} or more visible ASCII characters, none of them a comma")
    return keys


class Settings(BaseSettings):
    """The server's settings; `Settings(port=9000)` overrides the environment. Raises pydantic.ValidationError naming the field."""

    model_config = SettingsConfigDict(env_prefix="PAELLERA_", frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    operations_port: Annotated[
        int | None,
        Field(ge=1, le=65535, description="Where /healthz, /readyz and /metrics are instead of beside the rest"),
    ] = None
    trusted_proxies: Annotated[
        str, Field(description="Comma list of addresses and networks whose X-Forwarded-For and -Proto are believed, or *")
    ] = ""
    weights: Annotated[str, Field(pattern=r"[^,\s]", description="Comma list of bundle names or paths; the first is the default model")] = (
        "tiny"
    )
    device: Annotated[str, Field(pattern=rf"^{DEVICE}$")] = "auto"
    devices: Annotated[
        str | None,
        Field(pattern=rf"^{DEVICE}(,{DEVICE})*$", description="Comma list, one worker each, such as cuda:0,cuda:1; in place of device"),
    ] = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    encoders: Annotated[
        Encoders, Field(description="Text encoders on the device, on the CPU, or on the device with the byte encoder's weights in int8")
    ] = "device"
    kernels: Annotated[
        Kernels, Field(description="What computes the steps: Triton's kernels on CUDA if it is installed, or torch alone")
    ] = "auto"
    threads: Annotated[int, Field(ge=0, description="CPU threads of the worker; 0: as many as step fastest just now")] = 0
    deterministic: Annotated[bool, Field(description="What requests get that do not say")] = False

    cuda_graphs: Annotated[bool, Field(description="Record the denoiser's step at start; off, every step is computed eagerly")] = True
    graph_sizes: Annotated[
        str,
        Field(pattern=r"^(\d+x\d+(,\d+x\d+)*)?$", description="Comma list of picture sizes recorded beside the native one: 128x256"),
    ] = ""

    queue_rows: Annotated[int, Field(ge=1, description="Images that may be unfinished at once before requests get 429")] = 256
    max_batch_rows: Annotated[int, Field(ge=1, description="Images that are stepped together")] = 16
    prompt_cache_bytes: Annotated[int, Field(ge=0, description="Encoded prompts and drawn priors a worker remembers; 0 is none")] = (
        256 * MIB
    )
    max_side: Annotated[int, Field(ge=1, description="Pixels; the longest width or height")] = 512
    # Room for one guided 512 × 512 picture of 64 steps (34 million) or sixteen guided 256 × 256 ones of 12 (25 million),
    # so that the embedded weights on a CPU can answer before the default timeout. On a GPU it may be far more.
    max_request_work: Annotated[int, Field(ge=1, description="Images times steps times pixels times branches of one request")] = 50_000_000
    max_body_bytes: Annotated[int, Field(ge=1)] = 32 * MIB
    max_image_bytes: Annotated[int, Field(ge=1, description="Of one uploaded picture's file")] = 16 * MIB
    max_image_pixels: Annotated[int, Field(ge=1, description="Width times height of one uploaded picture")] = 16 * MIB
    decode_threads: Annotated[int, Field(ge=1, description="Uploaded pictures that are decoded at once")] = 2

    api_keys: Annotated[
        SecretStr, AfterValidator(_whole_keys), Field(description="Comma list of bearer keys; without any, everybody may ask")
    ] = SecretStr("")
    open_paths: Annotated[str, Field(description="Comma list of paths that need no key; /x/* is all below /x/")] = (
        "/,/playground/*,/docs,/openapi.json,/healthz,/readyz,/metrics"
    )
    key_rate_per_minute: Annotated[float, Field(ge=0, description="POSTs of one key, on average; 0 is without limit")] = 0
    key_burst: Annotated[int, Field(ge=1, description="POSTs of one key that may come at once, after a pause")] = 10
    key_concurrency: Annotated[int, Field(ge=0, description="POSTs of one key that may be unanswered at once; 0 is without limit")] = 0
    cors_origins: Annotated[
        str,
        Field(
            pattern=rf"^(\*|{ORIGIN}(,{ORIGIN})*)?$",
            description="Comma list of origins whose pages may ask, or *",
        ),
    ] = ""

    timeout_s: Annotated[float, Field(ge=0.05, le=600, description="For requests that do not say")] = 60
    start_wait_s: Annotated[float, Field(ge=0, description="How long requests wait for a starting worker before they get 503")] = 30
    heartbeat_s: Annotated[float, Field(gt=0, description="A stream in which nothing happens for so long sends a comment")] = 15
    receive_timeout_s: Annotated[
        float, Field(gt=0, description="A client whose head takes longer, or whose body does not go on for so long, is let go")
    ] = 30
    send_timeout_s: Annotated[float, Field(gt=0, description="A reader of a stream that takes nothing for so long is let go")] = 30
    stall_timeout_s: Annotated[float, Field(gt=0, description="A worker that owes an answer and is silent for longer is replaced")] = 30
    drain_timeout_s: Annotated[float, Field(ge=0, description="How long a stopping server finishes what it has begun")] = 30
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_prompts: Annotated[bool, Field(description="Prompts in the log's line of every request")] = False

    @property
    def worker_devices(self) -> tuple[str, ...]:
        """The device of every worker; the same one twice is two workers on it."""
        return (self.device,) if self.devices is None else tuple(self.devices.split(","))

    @property
    def picture_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of `graph_sizes`, pixels."""
        pairs = [size.split("x") for size in self.graph_sizes.split(",") if size]
        return [(int(width), int(height)) for width, height in pairs]

    @property
    def bundles(self) -> tuple[str, ...]:
        """The bundles of `weights`, in order and once each."""
        return _parts(self.weights)

    @property
    def keys(self) -> tuple[str, ...]:
        """Of `api_keys`."""
        return _parts(self.api_keys.get_secret_value())

    @property
    def origins(self) -> tuple[str, ...]:
        """Of `cors_origins`."""
        return _parts(self.cors_origins)

    def is_open(self, path: str) -> bool:
        """Whether `open_paths` has it."""
        return any(path == entry or (entry.endswith("/*") and path.startswith(entry[:-1])) for entry in _parts(self.open_paths))
