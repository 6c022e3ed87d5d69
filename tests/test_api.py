"""The HTTP contract, over the fake worker: answers, formats, refusals for lack of room or time,
operations, OpenAPI.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from server.api import create_app
from server.api.body import FORM, JSON
from server.api.openapi import EXAMPLES, IMAGE
from server.api.planning.operations import OPERATIONS
from server.api.schemas import as_list, file_bytes
from server.engine.errors import Draining
from server.engine.supervisor import Supervisor
from server.settings import Settings
from tests import fake_worker
from tests.conftest import NAME, NATIVE_SIZE, body_schema, serving, wait_until, write_bundle
from tests.support.images import opened
from tests.support.native_api import error_of, post
from tests.support.servers import metric, served

pytestmark = pytest.mark.process

INT64_MAX = 2**63 - 1
Configure = Callable[..., Settings]


def answers_counted(client: httpx.Client, status: str) -> float:
    """Return how many requests to /generate ended with the status."""
    name = "paella_request_duration_seconds_count"
    return metric(client, name, endpoint="/generate", status=status)


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


def test_one_image_comes_as_a_png_with_its_seed_and_its_parameters(client: httpx.Client) -> None:
    answer = post(client, seed=7, negative_prompt="blur", guidance_scale=[2, 8], temperature=0.5)
    assert (answer.status_code, answer.headers["content-type"], answer.headers["x-seed"]) == (
        200,
        "image/png",
        "7",
    )
    entry = client.get(f"/v1/models/{NAME}").json()
    picture = opened(answer.content)
    assert (picture.size, picture.getpixel((0, 0))) == (NATIVE_SIZE, tuple(fake_worker.colour(7)))
    assert json.loads(picture.info["parameters"]) == {
        "operation": "generate",
        "model": NAME,
        "model_sha256": entry["sha256"],
        "preset": "quality",
        "prompt": "a ball",
        "negative_prompt": "blur",
        "width": 64,
        "height": 32,
        "seed": 7,
        "num_inference_steps": 12,
        "guidance_scale": [2, 8],
        "guidance_steps": 12,
        "temperature": [0.5, 0.5],
        "sampler": "multinomial",
        "typical_mass": 0.2,
        "renoise_steps": 11,
        "renoise_mode": "start",
        "renoise_order": "random",
        "attention_weights": None,
        "deterministic": False,
        "truncated": [],
    }


def test_the_parameters_in_a_png_give_the_same_file_again(client: httpx.Client) -> None:
    first = post(client, num_inference_steps=5)
    sent = json.loads(opened(first.content).info["parameters"])
    del sent["truncated"], sent["operation"]
    assert post(client, **sent).content == first.content


def test_server_timing_names_every_stage(client: httpx.Client) -> None:
    began = time.perf_counter()
    timing = post(client).headers["server-timing"]
    elapsed_ms = 1000 * (time.perf_counter() - began)
    stages = dict(entry.split(";dur=") for entry in timing.split(", "))
    assert list(stages) == ["queue", "encode", "prior", "denoise", "decode", "image"]
    assert float(stages["encode"]) == 2.0
    assert 0 <= float(stages["image"]) <= elapsed_ms


def test_several_images_come_as_json_in_the_order_of_their_seeds(client: httpx.Client) -> None:
    answer = post(client, seed=5, n=3, headers={"X-Request-Id": "mine"}).json()
    assert (
        answer["id"],
        answer["model"],
        answer["parameters"]["n"],
        answer["parameters"]["seed"],
    ) == ("mine", NAME, 3, 5)
    assert set(answer["timings"]) == {"queue", "encode", "prior", "denoise", "decode", "image"}
    assert abs(answer["created"] - time.time()) < 60
    assert [entry["seed"] for entry in answer["images"]] == [5, 6, 7]
    for entry in answer["images"]:
        picture = opened(base64.b64decode(entry["b64_json"]))
        assert (*picture.size, picture.format) == (entry["width"], entry["height"], "PNG")
        assert picture.getpixel((0, 0)) == tuple(fake_worker.colour(entry["seed"]))


def test_image_i_of_seed_s_is_image_0_of_seed_s_plus_i(client: httpx.Client) -> None:
    second = post(client, seed=INT64_MAX, n=2).json()["images"][1]
    assert second["seed"] == -INT64_MAX - 1
    assert base64.b64decode(second["b64_json"]) == post(client, seed=second["seed"]).content


def test_an_absent_seed_is_drawn_anew_and_returned(client: httpx.Client) -> None:
    seeds = {post(client).headers["x-seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("accept", "fields", "media_type"),
    [
        ("*/*", {}, "image/png"),
        ("image/webp", {}, "image/webp"),
        ("image/jpeg;q=0.5, image/webp;q=0.9", {}, "image/webp"),
        ("image/jpeg;q=0.9, image/webp;q=1", {}, "image/webp"),
        ("image/png;q=much, image/jpeg;q=0.5", {}, "image/jpeg"),
        ("image/webp;level=1;q=0.1, image/jpeg;q=0.5", {}, "image/jpeg"),
        ("text/html, image/*;q=0.8", {}, "image/png"),
        ("application/json", {}, "application/json"),
        ("text/html", {}, "application/json"),
        ("application/*", {}, "application/json"),
        ("image/avif, */*;q=0.1", {}, "image/png"),
        ("image/jpg", {}, "image/jpeg"),
        ("image/avif", {"response_format": "jpg"}, "image/jpeg"),
        ("image/png;q=0, image/jpeg", {}, "image/jpeg"),
        ("image/png;q=0, */*", {}, "image/jpeg"),
        ("*/*, image/jpg;q=0, image/png;q=0", {}, "image/webp"),
        ("image/*;q=0, */*;q=0.1", {}, "application/json"),
        ("image/*, image/png;q=0.5", {}, "image/jpeg"),
        ("image/*;q=0.5, image/webp", {}, "image/webp"),
        ("image/webp, image/png", {}, "image/webp"),
        ("application/json, */*", {}, "application/json"),
        ("image/png;q=inf, image/jpeg;q=0.5", {}, "image/jpeg"),
        ("image/png;q=nan, image/jpeg;q=0.5", {}, "image/jpeg"),
        ("image/png;q=-1, image/jpeg;q=0.5", {}, "image/jpeg"),
        ("image/png;q=1.5, image/jpeg;q=0.5", {}, "image/jpeg"),
        ("image/webp", {"response_format": "jpeg"}, "image/jpeg"),
        ("image/webp", {"response_format": "json"}, "application/json"),
    ],
)
def test_the_format_is_what_was_asked_for(
    client: httpx.Client, accept: str, fields: dict[str, str], media_type: str
) -> None:
    answer = post(client, headers={"Accept": accept}, **fields)
    assert answer.headers["content-type"] == media_type
    content = (
        base64.b64decode(answer.json()["images"][0]["b64_json"])
        if media_type == "application/json"
        else answer.content
    )
    assert opened(content).format == (
        media_type.removeprefix("image/").upper() if media_type.startswith("image/") else "PNG"
    )


@pytest.mark.parametrize(
    "accept", ["image/avif", "image/heic, text/html", "IMAGE/AVIF;q=0.5", "image/png;q=0"]
)
def test_an_image_type_that_cannot_be_made_is_406(client: httpx.Client, accept: str) -> None:
    answer = post(client, headers={"Accept": accept})
    assert (answer.status_code, error_of(answer)["code"]) == (406, "not_acceptable")
    assert "image/png, image/jpeg" in error_of(answer)["message"]


def test_quality_changes_lossy_files(client: httpx.Client) -> None:
    tables = [
        opened(post(client, response_format="jpeg", quality=q).content).quantization
        for q in (10, 95)
    ]  # type: ignore[attr-defined]
    assert tables[0] != tables[1]


def test_a_truncated_prompt_is_reported(client: httpx.Client) -> None:
    answer = post(client, "cut this")
    assert answer.headers["x-prompt-truncated"] == "byt5, clip"
    assert json.loads(opened(answer.content).info["parameters"])["truncated"] == ["byt5", "clip"]
    assert "x-prompt-truncated" not in post(client).headers


def test_step_counts_not_asked_for_keep_the_recipes_share(client: httpx.Client) -> None:
    sent = post(client, num_inference_steps=24, response_format="json").json()["parameters"]
    assert (sent["renoise_steps"], sent["guidance_steps"]) == (22, 24)


# ── ids ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_sane_request_id_comes_back_even_with_an_error(client: httpx.Client) -> None:
    for answer in (
        post(client, headers={"X-Request-Id": "abc 1"}),
        client.get("/nowhere", headers={"X-Request-Id": "abc 1"}),
    ):
        assert answer.headers["x-request-id"] == "abc 1"


@pytest.mark.parametrize("sent", ["", "x" * 129, "tab\there", "\xe9"])
def test_any_other_request_id_is_replaced(client: httpx.Client, sent: str) -> None:
    answer = client.get("/healthz", headers=[(b"X-Request-Id", sent.encode("latin-1"))])
    assert len(answer.headers["x-request-id"]) == 32


def test_two_requests_may_use_one_id_at_once(client: httpx.Client) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(
            pool.map(
                lambda seed: post(client, "slow", {"X-Request-Id": "same"}, seed=seed), range(4)
            )
        )
    assert [answer.headers["x-seed"] for answer in answers] == ["0", "1", "2", "3"]


# ── when the engine says no ───────────────────────────────────────────────────────────────────────


def test_a_passed_deadline_is_504(client: httpx.Client) -> None:
    answer = post(client, "hold", timeout_s=0.1)
    assert (answer.status_code, error_of(answer)["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize(
    ("prompt", "code", "retry"), [("fail", "internal", "false"), ("oom", "out_of_memory", None)]
)
def test_a_failed_job_is_500_and_says_whether_to_retry(
    client: httpx.Client, prompt: str, code: str, retry: str | None
) -> None:
    answer = post(client, prompt)
    assert (answer.status_code, error_of(answer)["code"], answer.headers.get("x-should-retry")) == (
        500,
        code,
        retry,
    )
    assert "/home" not in answer.text
    assert "Traceback" not in answer.text


def test_a_full_queue_is_429_with_the_time_to_come_back(fake_settings: Configure) -> None:
    with served(fake_settings(queue_rows=2, drain_timeout_s=0)) as client:
        holder = threading.Thread(
            target=post, args=(client, "hold"), kwargs={"n": 2, "timeout_s": 1.0}
        )
        holder.start()
        wait_until(lambda: metric(client, "paella_rows_running") == 2)
        answer = post(client)
        holder.join()
        assert (answer.status_code, error_of(answer)["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) >= 1
        assert (
            0 < int(answer.headers["retry-after-ms"]) <= 1000 * int(answer.headers["retry-after"])
        )
        assert metric(client, "paella_rejected_total", reason="queue_full") == 1


def test_a_request_that_kills_worker_after_worker_is_500_and_the_next_one_serves(
    fake_settings: Configure,
) -> None:
    with served(fake_settings()) as client:
        answer = post(client, "die")
        assert (answer.status_code, error_of(answer)["code"], answer.headers["x-should-retry"]) == (
            500,
            "poison",
            "false",
        )
        assert post(client).status_code == 200
        assert metric(client, "paella_worker_restarts_total") == 2


def test_a_worker_that_is_not_replaced_in_time_is_503(fake_settings: Configure) -> None:
    with served(fake_settings(start_wait_s=0.05)) as client:
        answer = post(client, "die")
        assert (answer.status_code, error_of(answer)["code"]) == (503, "worker_lost")
        assert int(answer.headers["retry-after"]) >= 1


def test_a_deadline_that_cannot_be_met_is_429_at_once(fake_settings: Configure) -> None:
    with served(fake_settings()) as client:
        post(client)
        wait_until(lambda: metric(client, "paella_step_rows_count") > 0)
        # A row of the fake worker's takes at least ten milliseconds before and after its steps.
        answer = post(client, "hold", n=16, timeout_s=0.05)
        assert (answer.status_code, error_of(answer)["code"], answer.headers["x-should-retry"]) == (
            429,
            "deadline_unreachable",
            "false",
        )
        assert int(answer.headers["retry-after"]) >= 1
        assert (
            0 < int(answer.headers["retry-after-ms"]) <= 1000 * int(answer.headers["retry-after"])
        )
        assert metric(client, "paella_rejected_total", reason="deadline_unreachable") == 1


def test_a_running_request_can_be_deleted_by_its_id_and_its_rows_leave(
    fake_settings: Configure,
) -> None:
    with served(fake_settings()) as client, concurrent.futures.ThreadPoolExecutor() as threads:
        doomed = threads.submit(post, client, "hold", {"X-Request-Id": "doomed"}, n=2)
        other = threads.submit(post, client, "hold", {"X-Request-Id": "other"})
        wait_until(lambda: metric(client, "paella_rows_running") == 3)
        assert client.delete("/requests/doomed").status_code == 204
        assert (doomed.result().status_code, error_of(doomed.result())["code"]) == (
            499,
            "cancelled",
        )
        wait_until(lambda: metric(client, "paella_rows_running") == 1)
        assert not other.done()
        assert metric(client, "paella_cancel_duration_seconds_count") == 1
        assert metric(client, "paella_cancelled_total", stage="worker") == 1
        assert client.delete("/requests/doomed").status_code == 404
        assert client.delete("/requests/other").status_code == 204


def test_a_request_whose_id_has_slashes_can_be_deleted(fake_settings: Configure) -> None:
    with served(fake_settings()) as client, concurrent.futures.ThreadPoolExecutor() as threads:
        doomed = threads.submit(post, client, "hold", {"X-Request-Id": "b64+//=="})
        wait_until(lambda: metric(client, "paella_rows_running") == 1)
        assert client.delete("/requests/b64+%2F%2F==").status_code == 204
        assert doomed.result().status_code == 499


@pytest.mark.parametrize("id", ["unknown", "%00", "x" * 3000])
def test_deleting_a_request_that_does_not_run_is_404(client: httpx.Client, id: str) -> None:
    answer = client.delete(f"/requests/{id}")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "request_not_found")


def test_a_starting_server_lives_but_is_not_ready(fake_settings: Configure) -> None:
    with served(fake_settings(start_wait_s=0.05), fake_worker.slow_to_start, ready=False) as client:
        assert client.get("/healthz").status_code == 200
        not_ready, refused = client.get("/readyz"), post(client)
        assert (not_ready.status_code, error_of(not_ready)["message"]) == (
            503,
            "starting",
        )
        assert (refused.status_code, error_of(refused)["code"]) == (503, "starting")


def test_a_short_deadline_on_a_starting_server_is_no_timeout(fake_settings: Configure) -> None:
    with served(fake_settings(), fake_worker.slow_to_start, ready=False) as client:
        refused = post(client, timeout_s=0.1)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "starting")
        assert float(refused.headers["retry-after"]) > 0
        assert int(refused.headers["retry-after"]) >= 1


def test_a_client_that_goes_away_frees_its_rows(fake_settings: Configure) -> None:
    with served(fake_settings()) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/generate", json={"prompt": "hold", "n": 3}, timeout=0.3)
        wait_until(lambda: metric(client, "paella_rows_running") == 0)
        wait_until(lambda: answers_counted(client, "499") == 1)
        assert metric(client, "paella_cancelled_total", stage="worker") == 1


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_client_that_goes_away_in_the_midst_of_its_body_is_no_error_of_ours(
    fake_settings: Configure, kind: str
) -> None:
    with served(fake_settings()) as client:
        head = (
            "POST /generate HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: {kind}\r\nContent-Length: 100\r\n\r\n"
        )
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(head.encode() + b"--x")
        wait_until(lambda: answers_counted(client, "499") == 1)
        assert metric(client, "paella_cancelled_total", stage="upload") == 1


def test_a_hundred_requests_at_once_are_all_answered_rightly(client: httpx.Client) -> None:
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda seed: post(client, seed=seed), range(100)))
    for seed, answer in enumerate(answers):
        assert opened(answer.content).getpixel((0, 0)) == tuple(fake_worker.colour(seed))


# ── operations ────────────────────────────────────────────────────────────────────────────────────


def test_readiness_names_device_and_models(client: httpx.Client) -> None:
    assert client.get("/readyz").json() == {
        "status": "ready",
        "device": "fake",
        "dtype": "float32",
        "models": [NAME],
    }


def test_metrics_count_pictures_requests_and_steps(client: httpx.Client) -> None:
    before = metric(client, "paella_images_total", endpoint="/generate")
    post(client, n=3)
    client.get("/no/such/path")
    assert metric(client, "paella_images_total", endpoint="/generate") == before + 3
    assert (
        metric(client, "paella_request_duration_seconds_count", endpoint="/generate", status="200")
        > 0
    )
    assert (
        metric(client, "paella_request_duration_seconds_count", endpoint="unmatched", status="404")
        > 0
    )
    assert metric(client, "paella_step_rows_count") > 0
    assert metric(client, "paella_image_encode_duration_seconds_count") > 0
    assert metric(client, "paella_preset_images_total", model=NAME, preset="quality") >= 3
    assert metric(client, "paella_weights_info", model=NAME) == 1


def test_of_workers_that_were_replaced_nothing_is_left_and_nothing_is_counted_twice(
    fake_settings: Configure,
) -> None:
    def processes(client: httpx.Client) -> set[float]:
        families = text_string_to_metric_families(client.get("/metrics").text)
        return {
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "paella_worker_resident_memory_bytes"
        }

    def ready(client: httpx.Client) -> list[float]:
        return [metric(client, "paella_worker_ready", worker=worker) for worker in "01"]

    with served(fake_settings(devices="cpu,cpu")) as client:
        assert metric(client, "paella_images_total", endpoint="/generate") == 0
        post(client)
        # Idle workers send heartbeats too.
        wait_until(lambda: len(processes(client)) == 2)
        first = processes(client)
        assert error_of(post(client, "die"))["code"] == "poison"
        wait_until(lambda: ready(client) == [1, 1])
        post(client)
        wait_until(lambda: len(processes(client)) == 2)
        assert not processes(client) & first
        assert metric(client, "paella_worker_restarts_total") == 2
        assert metric(client, "paella_requests_replayed_total") == 1
        assert metric(client, "paella_images_total", endpoint="/generate") == 2
        assert metric(client, "paella_queue_duration_seconds_count") == 2
        assert ready(client) == [1, 1]


def test_a_request_that_is_refused_early_counts_for_its_endpoint(fake_settings: Configure) -> None:
    with served(
        fake_settings(api_keys="a-key-of-the-house", open_paths="/metrics,/readyz")
    ) as client:
        assert post(client).status_code == 401
        wait_until(lambda: answers_counted(client, "401") == 1)


def test_a_probe_before_the_worker_is_ready_is_no_refusal(fake_settings: Configure) -> None:
    with served(fake_settings(), fake_worker.slow_to_start, ready=False) as client:
        assert client.get("/readyz").status_code == 503
        assert metric(client, "paella_rejected_total", reason="not_ready") == 0
        assert "not_ready" not in client.get("/metrics").text


def test_every_request_is_logged_without_its_prompt(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.access")
    post(client, "a secret wish", {"X-Request-Id": "logged"})
    wait_until(
        lambda: any(
            record.__dict__["fields"]["request_id"] == "logged" for record in caplog.records
        )
    )
    fields = next(
        record.__dict__["fields"]
        for record in caplog.records
        if record.__dict__["fields"]["request_id"] == "logged"
    )
    assert (fields["path"], fields["status"], fields["method"]) == ("/generate", 200, "POST")
    assert (fields["model"], fields["images"], fields["preset"]) == (NAME, 1, "quality")
    assert "secret" not in str([record.__dict__ for record in caplog.records])


def test_openapi_documents_the_fields_their_bounds_and_the_errors(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    drawing = {
        path: methods["post"] for path, methods in document["paths"].items() if "post" in methods
    }
    assert set(drawing) == set(EXAMPLES)
    for path, operation in drawing.items():
        schema = body_schema(document, path)
        assert schema["additionalProperties"] is False
        assert schema["properties"]["seed"]["anyOf"][0]["minimum"] == -(2**63)
        assert {
            "200",
            "400",
            "401",
            "403",
            "404",
            "406",
            "408",
            "413",
            "415",
            "422",
            "429",
            "500",
            "503",
            "504",
        } <= set(operation["responses"])
        assert "event: " in operation["responses"]["200"]["content"]["text/event-stream"]["example"]
        assert {
            status
            for status, answer in operation["responses"].items()
            if "retry-after-ms" in answer.get("headers", {})
        } == {"429", "500", "503"}
        assert operation["requestBody"]["required"] is True
        (key,) = (each for each in operation["parameters"] if each["name"] == "Idempotency-Key")
        assert (key["in"], key["required"]) == ("header", False)
        assert (key["schema"]["minLength"], key["schema"]["maxLength"]) == (1, 255)
    generate = drawing["/generate"]
    schema = body_schema(document, "/generate")
    assert schema["properties"]["n"]["anyOf"][0]["maximum"] == 16
    assert {"type": "null"} in schema["properties"]["n"]["anyOf"]
    assert {"maximum": 30, "minimum": 0, "type": "number"} in schema["properties"][
        "guidance_scale"
    ]["anyOf"]
    assert schema["required"] == ["prompt"]
    assert {"image/png", "image/jpeg", "image/webp", "application/json"} <= set(
        generate["responses"]["200"]["content"]
    )
    assert client.get("/docs").status_code == 200


def test_the_documents_bounds_are_exact_and_its_forms_have_no_null(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    as_json, as_form = (
        body_schema(document, "/inpaint", kind)["properties"] for kind in (JSON, FORM)
    )
    bounds = {"type": "integer", "minimum": -INT64_MAX - 1, "exclusiveMaximum": INT64_MAX + 1}
    assert bounds in as_json["seed"]["anyOf"]
    assert {"type": "null"} in as_json["seed"]["anyOf"]
    assert bounds.items() <= as_form["seed"].items()
    assert "null" not in json.dumps(as_form["mask"])
    assert as_form["regions"]["maxItems"] == 8


def test_every_documented_error_has_the_one_shape(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    schema = {"$ref": "#/components/schemas/ErrorAnswer"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                if status >= "4":
                    assert answer["content"]["application/json"]["schema"] == schema, (path, status)
    assert "ValidationError" not in str(document["components"]["schemas"].keys())
    assert "403" in document["paths"]["/requests/{id}"]["delete"]["responses"]


@pytest.mark.parametrize(
    ("path", "default"),
    [
        ("/generate", "their native size"),
        ("/inpaint", "the image's"),
        ("/outpaint", "the canvas'"),
        ("/edit", "the image's"),
        ("/upscale", "follow from `scale`"),
    ],
)
def test_width_and_height_are_documented_as_each_endpoint_reads_them(
    client: httpx.Client, path: str, default: str
) -> None:
    properties = body_schema(client.get("/openapi.json").json(), path)["properties"]
    assert default in properties["width"]["description"]
    assert properties["height"]["description"] in ("As width", properties["width"]["description"])


def test_only_interpolate_is_documented_to_answer_with_gif(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    posts = {path: operations["post"] for path, operations in paths.items() if "post" in operations}
    assert {
        path for path, post in posts.items() if "image/gif" in post["responses"]["200"]["content"]
    } == {"/interpolate"}


def takes_files(field: dict[str, Any]) -> bool:
    """Return whether a form's documented field is a file, or a list of files."""
    return "binary" in (field.get("format"), field.get("items", {}).get("format"))


def parts(
    fields: dict[str, Any], files: Collection[str]
) -> list[tuple[str, tuple[str | None, str | bytes]]]:
    """Return fields as a form's parts, as httpx takes them. files: names of those that are."""
    return [
        (name, ("image.png", file_bytes(entry)))
        if name in files
        else (name, (None, entry if isinstance(entry, str) else json.dumps(entry)))
        for name, value in fields.items()
        for entry in as_list(value)
    ]


@pytest.mark.parametrize("path", EXAMPLES)
def test_the_documented_examples_work(client: httpx.Client, path: str) -> None:
    document = client.get("/openapi.json").json()
    content = document["paths"][path]["post"]["requestBody"]["content"]
    answer = client.post(path, json=content[JSON]["example"])
    assert answer.status_code == 200, answer.text
    fields = body_schema(document, path, FORM)["properties"]
    example = content[FORM]["example"]
    for files in ([name for name in fields if takes_files(fields[name])], []):
        answer = client.post(path, files=parts(example, files))
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", EXAMPLES)
def test_a_forms_documented_files_are_the_fields_that_take_files(
    client: httpx.Client, path: str
) -> None:
    fields = body_schema(client.get("/openapi.json").json(), path, FORM)["properties"]
    files = [name for name in fields if takes_files(fields[name])]
    for name in fields:
        others = {other: value for other, value in EXAMPLES[path].items() if other != name}
        file = (name, ("image.png", file_bytes(IMAGE)))
        answer = client.post(path, files=[*parts(others, files), file])
        refusals = "send it as text, not as a file", "not supported; leave it out"
        is_refused = any(text in answer.text for text in refusals)
        assert is_refused != (name in files), (name, answer.text[:200])


def test_generated_clients_send_no_field_that_nobody_set(client: httpx.Client) -> None:
    # They require or send a field with a default, and cannot express that one of two is required.
    document = client.get("/openapi.json").json()
    requests = [
        schema
        for name, schema in document["components"]["schemas"].items()
        if name.endswith(("Request", "Form", "Entry")) and name not in ("ImageEntry", "ModelEntry")
    ]
    for schema in requests:
        assert "anyOf" not in schema
        assert all("default" not in field for field in schema["properties"].values())


def test_no_default_contradicts_its_field() -> None:
    for schema, _ in OPERATIONS.values():
        for name, field in schema.model_json_schema()["properties"].items():
            if "default" in field and field["default"] is None:
                assert {"type": "null"} in field["anyOf"], name


def test_every_operation_of_the_document_has_a_short_name_of_its_own(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    names = [operation["operationId"] for path in paths.values() for operation in path.values()]
    assert len(set(names)) == len(names)
    assert {"generate", "inpaint", "openai_edits", "show_model", "health", "healthz"} <= set(names)


def test_lists_are_documented_without_prefix_items_and_streams_as_text(
    client: httpx.Client,
) -> None:
    document = client.get("/openapi.json").json()
    assert "prefixItems" not in json.dumps(document)
    pairs = body_schema(document, "/generate")["properties"]["guidance_scale"]["anyOf"]
    number = {"maximum": 30, "minimum": 0, "type": "number"}
    assert {"type": "array", "items": number, "minItems": 2, "maxItems": 2} in pairs
    for path in EXAMPLES:
        answer = document["paths"][path]["post"]["responses"]["200"]
        assert answer["content"]["text/event-stream"]["schema"]["type"] == "string"


# ── the app ───────────────────────────────────────────────────────────────────────────────────────


def test_the_api_process_never_imports_torch() -> None:
    code = "import server.api, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unforeseen_error_is_500_without_a_trace(fake_settings: Configure) -> None:
    app = create_app(fake_settings(), worker=fake_worker.main)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("/secret/path")

    answer = TestClient(app).get("/broken")
    assert (
        answer.status_code,
        answer.headers["x-should-retry"],
        answer.json()["error"]["code"],
    ) == (500, "false", "internal")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]


def test_the_threads_for_images_end_with_the_server(fake_settings: Configure) -> None:
    def threads() -> set[str]:
        started = set(threading.enumerate()) - before
        return {thread.name.partition("_")[0] for thread in started} & working

    before, working = set(threading.enumerate()), {"sniff", "decode", "encode"}
    # Held: threads of an app that nothing refers to would end by themselves.
    app = create_app(fake_settings(), worker=fake_worker.main)
    with serving(app) as address:
        wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
        answer = httpx.post(f"{address}/edit", json=EXAMPLES["/edit"], timeout=20)
        assert answer.status_code == 200, answer.text
        assert threads() == working
    wait_until(lambda: not threads(), 10)


def test_a_start_that_fails_ends_the_workers_that_were_started_and_the_threads(
    fake_settings: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, start = list[Supervisor](), Supervisor.start

    async def start_one(worker: Supervisor) -> None:
        if started:
            raise OSError("no process")
        await start(worker)
        started.append(worker)

    monkeypatch.setattr(Supervisor, "start", start_one)
    app = create_app(fake_settings(devices="cpu,cpu"), worker=fake_worker.main)
    with pytest.raises(OSError, match="no process"), TestClient(app):
        pass
    assert started[0].pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)
    with pytest.raises(Draining):
        asyncio.run(app.state.paellera.decoder.run_large(lambda: None))


def test_what_is_over_leaves_the_memory_although_nobody_asks_for_it(
    fake_settings: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.app.EXPIRY_INTERVAL_S", 0.05)
    monkeypatch.setattr("server.api.idempotency.LIFETIME_S", 0.1)
    with served(fake_settings(url_ttl_s=0.1)) as client:
        headers = {"Idempotency-Key": "mine"}
        assert post(client, response_format="url", headers=headers).status_code == 200
        wait_until(lambda: metric(client, "paella_url_store_bytes") == 0, 10)
        wait_until(lambda: metric(client, "paella_idempotency_bytes") == 0, 10)


def test_several_bundles_are_served_by_name_the_first_by_default(tmp_path: Path) -> None:
    paths = [str(write_bundle(tmp_path / name, name)) for name in ("one", "two")]
    with served(Settings(weights=",".join(paths))) as client:
        assert post(client, response_format="json").json()["model"] == "one"
        assert post(client, response_format="json", model="two").json()["model"] == "two"


def test_weights_that_cannot_be_served_stop_the_start(
    tmp_path: Path, fake_settings: Configure
) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        create_app(Settings(weights="nothing"))
    with pytest.raises(ValueError, match="PAELLERA_MAX_SIDE"):
        create_app(fake_settings(max_side=48))
    create_app(fake_settings(max_side=max(NATIVE_SIZE)))
    same = [str(write_bundle(tmp_path / directory)) for directory in ("a", "b")]
    with pytest.raises(ValueError, match="same name"):
        create_app(Settings(weights=",".join(same)))
