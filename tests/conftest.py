"""What several test files share: recorded outputs, bundles with weights and without, settings,
and an app over the fake worker.
"""

from __future__ import annotations

import gzip
import inspect
import json
import multiprocessing.process
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Never

import httpx
import hypothesis
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from safetensors import safe_open

from load_tests.serving import serving as serving_process
from model.bundle import Bundle, build, save_bundle
from model.config import (
    BundleConfig,
    BundleV1Config,
    BundleV3Config,
    ByteEncoderConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    DenoiserConfig,
    DenoiserV1Config,
    Preset,
    PriorConfig,
    Recipe,
    VQGANConfig,
    VQGANV1Config,
    find_bundle,
)
from model.pipeline import Pipeline
from model.runtime import prepare
from server.api import create_app
from server.engine.runner import Runner
from server.settings import Settings
from tests import fake_worker

# Fixtures of the browser tests, which need each other.
pytest_plugins = ("tests.support.browsers",)

pytest.register_assert_rewrite("tests.support")

# Tests that run beside others compute on one core each.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
# Before anything imports a kernel: without a device Triton's interpreter runs it. Where there is no
# Triton, no kernel can be tested.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
collect_ignore_glob = [] if find_spec("triton") else ["test_kernels_*.py"]

NAME = "fake"
NETWORKS = BundleV3Config.networks
NATIVE_SIZE = (64, 32)
MERGES = (
    "r e",
    "re d</w>",
    "o n</w>",
    "a p",
    "ap p",
    "app l",
    "appl e</w>",
    "t h",
    "th e</w>",
    "i n</w>",
)

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None, max_examples=100)
hypothesis.settings.register_profile("fast", deadline=None, max_examples=25)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="only tests without a browser, a process or training"
    )
    parser.addoption(
        "--screenshots",
        help=(
            "where to leave pictures of the playground: docs/playground to renew the "
            "documentation's"
        ),
    )


def pytest_configure(config: pytest.Config) -> None:
    # Jobs in the background and under nohup ignore these, and so would every process they start.
    for number, usual in (
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    hypothesis.settings.load_profile("fast" if config.getoption("--fast") else "untimed")


def examples(count: int) -> hypothesis.settings:
    """Return a decorator for that number of examples, fewer with --fast."""
    share = hypothesis.settings().max_examples / 100
    return hypothesis.settings(max_examples=max(10, round(count * share)))


NOT_FAST = ("browser", "gpu", "heavy", "observability", "process", "ray", "slow", "training")
_MODULE_MARKS = re.compile(r"^pytestmark = (\[.*?\]$|[^\n]*)", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session", autouse=True)
def _fast_tests_start_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --fast, fail a test that starts a process or a server: it lacks the mark `process`.

    Of the session's scope, so that no fixture is set up before it.
    """
    if not request.config.getoption("--fast"):
        yield
        return

    create = subprocess.Popen.__init__

    def refuse(*_: object, **__: object) -> Never:
        pytest.fail(
            "a fast test starts no process and no server: mark it with `process`", pytrace=False
        )

    def refuse_process(process: Any, args: Any, *rest: Any, **more: Any) -> None:
        if "uname" not in args:  # the standard library asks it for the processor's name
            refuse()
        create(process, args, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", refuse_process)
        patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        patch.setattr("tests.conftest.start_thread", refuse)
        yield


@pytest.fixture
def screenshots(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = Path(request.config.getoption("--screenshots") or tmp_path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def starts_a_server(item: pytest.Item) -> bool:
    """Return whether a test or one of its fixtures names what starts a server, directly or not."""
    if not isinstance(item, pytest.Function):
        return False
    fixtures = [
        fixture for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found
    ]
    return any(_starts_one_cached(each) for each in (item.obj, *(f.func for f in fixtures)))


@cache
def _starts_one_cached(function: Any) -> bool:
    return _starts_one(function)


def _starts_one(function: Any, seen: set[FunctionType] | None = None) -> bool:
    """Return whether a function starts a server, or names one of the tests that does."""
    seen = set() if seen is None else seen
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, FunctionType) or function in seen:
        return False
    seen.add(function)
    if function in (start_thread, inspect.unwrap(serving_process)):
        return True
    if not function.__module__.startswith("tests."):
        return False
    named = (function.__globals__.get(name) for name in _names(function.__code__))
    return any(_starts_one(each, seen) for each in named)


def _names(code: CodeType) -> set[str]:
    """Return what the code names, nested functions included."""
    nested = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*map(_names, nested))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --fast, do not import the modules without a fast test."""
    if not config.getoption("--fast") or collection_path.suffix != ".py":
        return None
    marks = _MODULE_MARKS.search(collection_path.read_text())
    return True if marks and set(NOT_FAST) & set(re.findall(r"mark\.(\w+)", marks[1])) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts a server; run tests that start a Ray only with `-m ray`; with --fast run
    the fast ones.
    """
    for item in items:
        if starts_a_server(item):
            item.add_marker("process")
    unwanted = set(NOT_FAST if config.getoption("--fast") else ())
    if "ray" not in config.option.markexpr:
        unwanted.add("ray")
    deselected = [item for item in items if unwanted & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


@pytest.fixture(scope="session", autouse=True)
def prepared() -> None:
    """Before anything imports open_clip or transformers."""
    prepare()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws at random is the same in every run and in any order of tests."""
    torch.manual_seed(0)


def golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A file of tests/data: (constructor arguments, state dict, recorded inputs and outputs)."""
    with safe_open(Path(__file__).parent / "data" / f"{name}.safetensors", framework="pt") as file:
        described = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    tensors = {
        key: t.long() if t.dtype == torch.int16 else t
        for key, t in (tensors | drawn_again(json.loads(described.get("drawn", "{}")))).items()
    }
    weights = {
        key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")
    }
    rest = {key: t for key, t in tensors.items() if not key.startswith("weights.")}
    return json.loads(described["config"]), weights, rest


def drawn_again(recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights that were drawn at random when they were recorded, drawn once more.

    recipe: seed, and for each parameter in order its name, shape, scale and offset; no scale where
    the file itself has it. Raises RuntimeError if this torch draws other numbers.
    """
    if not recipe:
        return {}
    generator, drawn = torch.Generator().manual_seed(recipe["seed"]), {}
    for name, shape, scale, offset in recipe["tensors"]:
        numbers = torch.randn(shape, generator=generator)
        if scale is not None:
            drawn[f"weights.{name}"] = offset + numbers * scale
    total = sum(float(t.double().abs().sum()) for t in drawn.values())
    if abs(total - recipe["total"]) > 1e-4 * recipe["total"]:
        raise RuntimeError(f"this torch draws other weights: {total}, recorded {recipe['total']}")
    return drawn


def micro_config(name: str = "random") -> BundleV3Config:
    """The embedded architecture at widths that cost nothing; the size step is 16 pixels."""
    return BundleV3Config(
        name=name,
        native_size=(32, 32),
        denoiser=DenoiserConfig(
            byt5_embd=16,
            c_in=16,
            c_out=16,
            num_labels=64,
            c_r=16,
            c_cond=16,
            c_hidden=(16, 32),
            nhead=(2, 4),
            blocks=(1, 2),
            level_config=("CTA", "CTA"),
            clip_embd=16,
        ),
        vqgan=VQGANConfig(bottleneck_blocks=1, c_hidden=16, codebook_size=64, scale_factor=1.0),
        prior=PriorConfig(c_hidden=16, c_r=16, clip_r=16, num_blocks=2),
        byt5=ByteEncoderConfig(
            d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, max_bytes=64
        ),
        clip=CLIPConfig(
            embed_dim=16,
            vision_cfg=CLIPVisionConfig(
                image_size=16, patch_size=8, width=16, layers=1, head_width=8, mlp_ratio=2.0
            ),
            text_cfg=CLIPTextConfig(
                context_length=16,
                vocab_size=514 + len(MERGES),
                width=16,
                heads=2,
                layers=1,
                mlp_ratio=2.0,
            ),
            merges="merges.txt.gz",
        ),
        recipe=Recipe(
            num_inference_steps=6,
            renoise_steps=5,
            guidance_scale=(4.0, 4.0),
            guidance_steps=6,
            temperature=(0.7, 0.3),
            attention_weights=(1.2, 0.4),
            prior_steps=4,
        ),
    )


def micro_preset_config(name: str = "presets", *, default: bool = False) -> BundleV3Config:
    """`micro_config` with a preset `fast`, which has a smaller denoiser and fewer prior steps."""
    config = micro_config(name)
    recipe = Recipe(
        num_inference_steps=3,
        renoise_steps=2,
        guidance_scale=(1.0, 1.0),
        guidance_steps=0,
        temperature=(0.5, 0.2),
        prior_steps=2,
        renoise_order="halton",
    )
    fast = Preset(recipe, steps=(1, 4), denoiser="fast")
    denoiser = replace(
        config.denoiser,
        c_hidden=(16,),
        nhead=(2,),
        blocks=(1,),
        level_config=("CTA",),
        clip_seq_len=2,
    )
    return config.with_preset("fast", fast, denoiser, default=default)


def micro_v1_config(name: str = "random-v1") -> BundleV1Config:
    """The v1 architecture at widths that cost nothing; the size step is 4 pixels."""
    return BundleV1Config(
        name=name,
        native_size=(32, 32),
        denoiser=DenoiserV1Config(
            num_labels=64, c_hidden=32, c_clip=16, c_r=16, down_levels=(1, 1), up_levels=(1, 1)
        ),
        vqgan=VQGANV1Config(
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
            resolution=32,
            attn_resolutions=(16,),
            z_channels=32,
            embed_dim=32,
            n_embed=64,
        ),
        clip=micro_config().clip,
        recipe=Recipe(
            num_inference_steps=6,
            renoise_steps=5,
            guidance_scale=(4.0, 4.0),
            guidance_steps=6,
            temperature=(1.0, 1.0),
            sampler="typical",
            schedule="cosine",
        ),
    )


def write_merges(directory: Path) -> Path:
    """A tokenizer's merges as open_clip reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "merges.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *MERGES]).encode(), mtime=0))
    return path


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights of which every one matters: a fresh network's last layers are zeros."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data.normal_(std=fan_in**-0.5, generator=generator)


def random_networks(merges: Path, config: BundleConfig | None = None) -> Bundle:
    bundle = build(config or micro_config(), merges.parent, "cpu")
    for _, module in bundle.networks():
        randomise(module)
    return bundle


@pytest.fixture(scope="module")
def no_grad() -> Iterator[None]:
    """No test of a module that uses it records gradients."""
    with torch.no_grad():
        yield


def write_random_bundle(directory: Path, config: BundleConfig | None = None) -> Path:
    """A directory with a whole bundle of random weights, and beside it a tokenizer's merges."""
    merges = write_merges(directory.parent / "merges")
    save_bundle(random_networks(merges, config), directory, torch.float32, merges)
    return directory


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory: pytest.TempPathFactory, prepared: None) -> Path:
    """A directory with a whole bundle of random weights."""
    return write_random_bundle(tmp_path_factory.mktemp("bundles") / "random")


@pytest.fixture(scope="session")
def preset_bundle(tmp_path_factory: pytest.TempPathFactory, prepared: None) -> Path:
    """As `random_bundle`, with the preset `fast` and its denoiser."""
    directory = tmp_path_factory.mktemp("bundles") / "presets"
    return write_random_bundle(directory, micro_preset_config())


@pytest.fixture(scope="session")
def random_v1_bundle(tmp_path_factory: pytest.TempPathFactory, prepared: None) -> Path:
    """As `random_bundle`, of the v1 family."""
    return write_random_bundle(tmp_path_factory.mktemp("bundles") / "random-v1", micro_v1_config())


@pytest.fixture(scope="session")
def pipeline(random_bundle: Path) -> Pipeline:
    return Pipeline.load(random_bundle)


@pytest.fixture(scope="session")
def random_settings(random_bundle: Path) -> Settings:
    """Settings that serve the bundle of random weights."""
    return Settings(weights=str(random_bundle), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def runner(random_settings: Settings) -> Runner:
    return Runner(random_settings)


def emptied(runner: Runner, capacity: int = 2**30) -> Runner:
    """The same weights without rows, and with nothing remembered."""
    settings = Settings(device="cpu", dtype="float32", prompt_cache_bytes=capacity, threads=1)
    return Runner(settings, runner.pipelines.values())


def write_bundle(directory: Path, name: str = NAME) -> Path:
    """A bundle.json as the smallest weights would have it; the size step is 16 pixels."""
    config = BundleV3Config(
        name=name,
        native_size=NATIVE_SIZE,
        denoiser=DenoiserConfig(
            byt5_embd=16,
            num_labels=64,
            clip_embd=16,
            c_hidden=(16, 32),
            nhead=(-1, 4),
            blocks=(1, 1),
            level_config=("CT", "CTA"),
        ),
        vqgan=VQGANConfig(c_hidden=16, codebook_size=64),
        prior=PriorConfig(c_hidden=16, clip_r=16, num_blocks=1),
        byt5=ByteEncoderConfig(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4),
        clip=CLIPConfig(16, CLIPVisionConfig(), CLIPTextConfig()),
        recipe=Recipe(
            num_inference_steps=12,
            renoise_steps=11,
            guidance_scale=(8.0, 8.0),
            guidance_steps=12,
            temperature=(0.7, 0.3),
        ),
    )
    directory.mkdir(parents=True, exist_ok=True)
    config.write(directory)
    return directory


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / NAME)


@pytest.fixture(scope="session")
def fake_settings(bundle: Path) -> Callable[..., Settings]:
    """`fake_settings(queue_rows=4)` → settings that serve the bundle without weights."""
    return lambda **changes: Settings(weights=str(bundle), **changes)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app behind a real server on a free port of the loopback; gives its address once it
    listens.
    """
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener, running(server, listener):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def running(server: uvicorn.Server, *listeners: socket.socket) -> Iterator[None]:
    """The server in a thread, once it listens."""
    thread = start_thread(server, listeners)
    try:
        wait_until(lambda: server.started)
        yield
    finally:
        server.should_exit = True
        thread.join()
        for listener in listeners:
            listener.close()


def start_thread(server: uvicorn.Server, listeners: Sequence[socket.socket]) -> threading.Thread:
    """Start a server in a thread; --fast refuses it."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": list(listeners)})
    thread.start()
    return thread


def wait_until(
    condition: Callable[[], bool], timeout_s: float = 60, interval_s: float = 0.01
) -> None:
    """Raises TimeoutError if the condition does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(interval_s)


async def raised(task: Awaitable[object], kind: type[Exception]) -> Any:
    """Return the error of that kind with which the task ends."""
    with pytest.raises(kind) as caught:
        await task
    return caught.value


@pytest.fixture(scope="session")
def fake_server(fake_settings: Callable[..., Settings]) -> Iterator[str]:
    """The address of a server with a fake worker, ready, shared by all the tests that leave no
    trace in it.
    """
    with serving(create_app(fake_settings(), worker=fake_worker.main)) as address:
        wait_until(lambda: httpx.get(f"{address}/readyz", timeout=60).status_code == 200)
        yield address


@pytest.fixture(scope="session")
def client(fake_server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake_server, timeout=20) as client:
        yield client


def body_schema(
    document: dict[str, Any], path: str, media_type: str = "application/json"
) -> dict[str, Any]:
    """Return the JSON Schema of a path's request body in the server's OpenAPI document."""
    body = document["paths"][path]["post"]["requestBody"]["content"][media_type]
    name = body["schema"]["$ref"].rpartition("/")[2]
    return dict(document["components"]["schemas"][name])


@pytest.fixture(scope="session")
def embedded() -> BundleConfig:
    """The configuration of the embedded weights."""
    return BundleConfig.read(find_bundle("tiny"))


@pytest.fixture(scope="session")
def native(embedded: BundleConfig) -> tuple[int, int]:
    """(width, height) of the embedded weights' images, in pixels."""
    return embedded.native_size


@pytest.fixture(scope="session")
def step(embedded: BundleConfig) -> int:
    """The embedded weights' size step, in pixels."""
    return embedded.size_step


@pytest.fixture(scope="session")
def live_server() -> Iterator[str]:
    """The address of a server with the embedded weights and a real worker, ready, shared
    likewise. It computes with one thread, because tests run beside it, and another number of
    threads rounds otherwise.
    """
    with serving(create_app(Settings(port=0, threads=1))) as address:
        wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200, timeout_s=600)
        yield address
