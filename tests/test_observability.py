"""Prometheus itself reads the server, evaluates every rule and answers every query of the
dashboard.
"""

from __future__ import annotations

import json
import re
import runpy
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard

from server.api import create_app
from server.api.errors import NOT_READY
from server.metrics import KEY_REJECTIONS, LOAD_REJECTIONS, WORKER_METRICS, Metrics
from server.settings import Settings
from tests import fake_worker
from tests.conftest import wait_until
from tests.support.prometheus import needs_prometheus

ROOT = Path(__file__).parents[1]
PROMETHEUS, GRAFANA = ROOT / "docker/prometheus", ROOT / "docker/grafana"
RULES = [
    rule
    for name in ("rules", "alerts")
    for group in yaml.safe_load((PROMETHEUS / f"{name}.yml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDS = sorted({rule["record"] for rule in RULES if "record" in rule})
DASHBOARD = GRAFANA / "dashboards/paellera.json"
PANELS = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
QUERIES = sorted(
    {
        target["expr"].replace("$__rate_interval", "1m")
        for panel in PANELS
        for target in panel["targets"]
    }
)
# Selectors of the requests' durations.
READ = r"paella_request_duration_seconds_(?:bucket|count|sum)(?:{[^}]*})?"
# On a machine that is busy with everything else.
PATIENCE_S = 300

pytestmark = [pytest.mark.process, pytest.mark.observability]


def promtool(*arguments: str | Path, stdin: str | None = None) -> None:
    done = subprocess.run(
        ["promtool", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """One that runs, asked over HTTP."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    @property
    def answers(self) -> bool:
        try:
            return self._client.get("/status/runtimeinfo").status_code == 200
        except httpx.TransportError:
            return False

    def series(self, query: str) -> list[dict[str, Any]]:
        """Those with a number in them: a ratio of two zeros is none."""
        answer = (
            self._client.get("/query", params={"query": query})
            .raise_for_status()
            .json()["data"]["result"]
        )
        return [series for series in answer if series["value"][1] != "NaN"]

    def rules(self) -> list[dict[str, Any]]:
        return [
            rule
            for group in self._client.get("/rules").json()["data"]["groups"]
            for rule in group["rules"]
        ]

    def exemplars(self, query: str) -> list[dict[str, Any]]:
        params = {"query": query, "start": "0", "end": "9999999999"}
        return [
            one
            for series in self._client.get("/query_exemplars", params=params).json()["data"]
            for one in series["exemplars"]
        ]


@pytest.fixture(scope="module")
def prometheus(
    client: httpx.Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Debian's, with the committed configuration but for the target and for how often it looks."""
    directory = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {
        "scrape_interval": "2s",
        "evaluation_interval": "1s",
        "scrape_timeout": "2s",
    }
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [
        f"{client.base_url.host}:{client.base_url.port}"
    ]
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=20) as asking:
            running = Prometheus(asking)
            wait_until(lambda: running.answers or process.poll() is not None, PATIENCE_S)
            assert process.poll() is None, (directory / "log").read_text()
            yield running
    finally:
        process.terminate()
        process.wait()


@needs_prometheus
def test_prometheus_own_tool_finds_nothing_wrong_with_configuration_rules_and_names(
    client: httpx.Client,
) -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "metrics", stdin=client.get("/metrics").text)


@needs_prometheus
def test_the_documented_alertmanager_is_one_that_prometheus_accepts(tmp_path: Path) -> None:
    blocks = (ROOT / "docs/deploy.md").read_text().split("```yaml\n")[1:]
    alerting, routing = (yaml.safe_load(block.split("```")[0]) for block in blocks)
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["rule_files"] = []
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({**config, **alerting}))
    promtool("check", "config", tmp_path / "prometheus.yml")
    receivers = {receiver["name"] for receiver in routing["receivers"]}
    routes = (routing["route"], *routing["route"]["routes"])
    assert {route["receiver"] for route in routes} == receivers


@needs_prometheus
def test_every_alert_goes_off_when_it_should_and_not_otherwise() -> None:
    promtool("test", "rules", PROMETHEUS / "alerts_test.yml")
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    assert fired == ALERTS.keys()


def test_every_alert_says_how_urgent_it_is_and_has_its_section_in_the_runbook() -> None:
    anchors = {
        heading.lower()
        for heading in re.findall(
            r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE
        )
    }
    assert anchors == {name.lower() for name in ALERTS}
    for name, alert in ALERTS.items():
        assert alert["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        assert alert["labels"]["severity"] in ("page", "ticket")


@needs_prometheus
def test_a_loaded_server_gives_every_query_of_the_dashboard_and_every_rule_its_data(
    client: httpx.Client, prometheus: Prometheus
) -> None:
    def without_data() -> list[str]:
        client.post(
            "/generate", json={"prompt": "a ball", "n": 2}, headers={"X-Request-Id": "an-exemplar"}
        ).raise_for_status()
        return [
            query
            for query in (*QUERIES, *RECORDS, *read_by_alerts())
            if not prometheus.series(query)
        ]

    try:
        wait_until(lambda: not without_data(), PATIENCE_S)
    except TimeoutError:
        pytest.fail(f"without data: {without_data()}")
    assert {rule["name"]: rule["health"] for rule in prometheus.rules()} == dict.fromkeys(
        (*ALERTS, *RECORDS), "ok"
    )
    exemplars = prometheus.exemplars('paella_request_duration_seconds_bucket{endpoint="/generate"}')
    assert {"request_id": "an-exemplar"} in [exemplar["labels"] for exemplar in exemplars]


@pytest.fixture
def endpoints(fake_settings: Callable[..., Settings]) -> tuple[dict[str, Any], frozenset[str]]:
    """The methods of every path of the app, and the paths that draw."""
    app = create_app(fake_settings(sdapi=True), worker=fake_worker.main)
    return app.openapi()["paths"], app.state.paellera.metrics.endpoints


def test_the_rules_read_every_endpoint_that_draws_and_no_other(
    endpoints: tuple[dict[str, Any], frozenset[str]],
) -> None:
    paths, drawing = endpoints
    of_all = [rule["expr"] for rule in RULES if "objective" not in rule.get("record", "")]
    read = [found for expr in of_all for found in re.findall(READ, expr)]
    assert read
    for selector in read:
        (pattern,) = re.findall(r'endpoint=~"([^"]*)"', selector)
        assert {path for path in paths if re.fullmatch(pattern, path)} == drawing


def test_every_endpoint_that_takes_a_job_counts_as_drawing(
    endpoints: tuple[dict[str, Any], frozenset[str]],
) -> None:
    paths, drawing = endpoints
    posts = {path for path, methods in paths.items() if "post" in methods}
    words = "png-info|interrogate|interrupt|skip|options|(refresh|reload|unload)-.*"
    assert {path for path in posts if not re.fullmatch(f"/sdapi/v1/({words})", path)} == drawing


def test_the_objective_counts_every_endpoint_that_draws_from_text_alone(
    endpoints: tuple[dict[str, Any], frozenset[str]],
) -> None:
    _, drawing = endpoints
    from_text = {path for path in drawing if re.search(r"/(generate|generations|txt2img)$", path)}
    read = [found for rule in RULES for found in re.findall(READ, rule["expr"])]
    patterns = {pattern for each in read for pattern in re.findall(r'endpoint=~"([^"]*)"', each)}
    (objective,) = (pattern for pattern in patterns if "edit" not in pattern)
    assert {path for path in drawing if re.fullmatch(objective, path)} == from_text


def test_the_rules_count_every_refusal_for_lack_of_room_time_or_a_worker() -> None:
    # 429 and 503, as api.md lists them. A key's own limits, and probes, are not the server's load.
    rows = re.findall(r"^\| (?:429|503) \| (.*?) \|", (ROOT / "docs/api.md").read_text(), re.M)
    documented = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert documented - {*KEY_REJECTIONS, NOT_READY} == {*LOAD_REJECTIONS}
    patterns = re.findall(r'reason=~"([^"]*)"', " ".join(rule["expr"] for rule in RULES))
    assert patterns
    for pattern in patterns:
        assert set(pattern.split("|")) == {*LOAD_REJECTIONS}


def read_by_alerts() -> list[str]:
    """The series in their expressions, with their labels."""
    return sorted(
        {
            found
            for alert in ALERTS.values()
            for found in re.findall(r"paella[_:][a-z0-9_:]+(?:{[^}]*})?", alert["expr"])
        }
    )


def test_the_dashboard_is_what_its_script_writes_and_grafana_s_types_lose_nothing_of_it() -> None:
    script = runpy.run_path(str(GRAFANA / "dashboard.py"))
    written = script["document"]()
    assert DASHBOARD.read_text() == written, (
        "python docker/grafana/dashboard.py > docker/grafana/dashboards/paellera.json"
    )
    assert json.loads(
        script["JSONEncoder"]().encode(Dashboard.from_json(json.loads(written)))
    ) == json.loads(written)


def test_the_dashboard_leaves_out_no_figure_and_shows_the_line_at_500_ms() -> None:
    read = " ".join((*QUERIES, *(rule["expr"] for rule in RULES)))
    figures = {figure.name for figure in (*Metrics().infos, *WORKER_METRICS)} - {
        "paella_weights_info",
        "paella_cancel_duration_seconds",
    }
    assert {name for name in figures if name not in read} == set()
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    lines = [
        step["value"]
        for panel in PANELS
        for step in panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    ]
    assert 0.5 in lines


def test_panels_of_workers_name_the_server_and_the_worker() -> None:
    targets = [target for panel in PANELS for target in panel["targets"]]
    by_worker = [
        each for each in targets if re.search(r"paella_(worker|gpu)_(?!rest)", each["expr"])
    ]
    assert by_worker
    for target in by_worker:
        assert "{{instance}} worker {{worker}}" in target["legendFormat"]


def test_grafana_is_given_the_source_that_its_dashboard_asks() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    # A Prometheus that the viewer can choose; the only one, or the default, unless they do.
    (variable,) = json.loads(DASHBOARD.read_text())["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", source["type"])
    assert {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]} == {
        f"${{{variable['name']}}}"
    }
    assert source["url"] == "http://prometheus:9090"
