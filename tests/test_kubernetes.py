"""The Kubernetes manifests: valid by Kubernetes' own schemas, of one mind with each other, with the
image and with the server, and patient enough for a drain.
"""

from __future__ import annotations

import copy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics import Metrics
from server.paths import HEALTH_PATHS
from server.settings import PREFIX, Settings
from server.uvicorn_server import WRITE_TIMEOUT_S
from tests.support.dockerfile import stages

ROOT = Path(__file__).parents[1]
DIRECTORY = ROOT / "docker/kubernetes"
NAME = "app.kubernetes.io/name"

Manifest = dict[str, Any]

STRING = {"type": "string"}
LABELS = {"type": "object", "additionalProperties": STRING}
DURATION = {"type": "string", "pattern": r"^(\d+h)?(\d+m)?(\d+s)?$", "minLength": 2}


def closed(required: list[str], **properties: object) -> Manifest:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


# Kubernetes' schemas have no resources of the Prometheus operator: the fields in use, by its
# documentation of monitoring.coreos.com/v1.
SERVICE_MONITOR = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "monitoring.coreos.com/v1"},
    kind={"const": "ServiceMonitor"},
    metadata=closed(["name"], name=STRING, labels=LABELS),
    spec=closed(
        ["selector", "endpoints"],
        jobLabel=STRING,
        selector=closed(["matchLabels"], matchLabels=LABELS),
        endpoints={
            "type": "array",
            "minItems": 1,
            "items": closed(
                ["port", "path"],
                port=STRING,
                path={"type": "string", "pattern": "^/"},
                interval=DURATION,
                scrapeTimeout=DURATION,
            ),
        },
    ),
)


def read(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((DIRECTORY / name).read_text()))


KUSTOMIZATION = read("kustomization.yaml")[0]
MANIFESTS = [manifest for name in KUSTOMIZATION["resources"] for manifest in read(name)]

each_manifest = pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=[f"{m['kind']}-{m['metadata']['name']}" for m in MANIFESTS]
)


def one(kind: str, name: str = "paellera") -> Manifest:
    (found,) = (m for m in MANIFESTS if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return found


POD = one("Deployment")["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]
ENVIRONMENT = {entry["name"]: entry for entry in CONTAINER["env"]}
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
IMAGE = dict(part.split("=", 1) for part in shlex.split(dict(stages()[1])["ENV"]))


def seconds(name: str) -> float:
    """A setting's value in the pod, seconds."""
    return float(ENVIRONMENT[f"{PREFIX}{name}"]["value"])


def validate(manifest: Manifest, version: str | None = None) -> None:
    """Validate by a version of Kubernetes, the newest that is known by default.

    Raises jsonschema.ValidationError. Imports for seconds, so tests that call this are heavy.
    """
    import jsonschema
    import kubernetes_validate

    if manifest["kind"] == "ServiceMonitor":
        jsonschema.validate(manifest, SERVICE_MONITOR)
    else:
        known = version or kubernetes_validate.latest_version()
        kubernetes_validate.validate(manifest, known, strict=True)


@pytest.mark.heavy
@pytest.mark.parametrize("version", ["1.30", None], ids=["oldest with all in use", "newest"])
@each_manifest
def test_every_manifest_follows_its_schema(manifest: Manifest, version: str | None) -> None:
    validate(manifest, version)


@pytest.mark.heavy
@each_manifest
def test_a_misspelt_field_does_not_pass(manifest: Manifest) -> None:
    from jsonschema import ValidationError

    spoilt = copy.deepcopy(manifest)
    spoilt["spec"]["selektor"] = {}
    with pytest.raises(ValidationError):
        validate(spoilt)


def test_the_kustomization_lists_every_file() -> None:
    files = {path.name for path in DIRECTORY.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(KUSTOMIZATION["resources"]) == files
    assert {manifest["kind"] for manifest in MANIFESTS} == {
        "Deployment",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
        "ServiceMonitor",
    }


# ── the pod ───────────────────────────────────────────────────────────────────────────────────────


def test_the_pod_is_configured_by_settings_that_exist_and_by_nothing_that_kubernetes_adds() -> None:
    assert POD["spec"]["enableServiceLinks"] is False
    settings = {name.removeprefix(PREFIX).lower() for name in ENVIRONMENT}
    assert settings <= set(Settings.model_fields)
    values = {
        name.removeprefix(PREFIX).lower(): entry["value"]
        for name, entry in ENVIRONMENT.items()
        if "value" in entry
    }
    Settings(**values)


def test_a_pod_without_the_secret_of_keys_does_not_start() -> None:
    secret = ENVIRONMENT["PAELLERA_API_KEYS"]["valueFrom"]["secretKeyRef"]
    assert not secret.get("optional", False)


def test_ports_and_user_are_those_of_the_image() -> None:
    assert str(PORTS["http"]) == IMAGE["PAELLERA_PORT"] == ENVIRONMENT["PAELLERA_PORT"]["value"]
    operations = ENVIRONMENT["PAELLERA_OPERATIONS_PORT"]["value"]
    assert str(PORTS["operations"]) == IMAGE["PAELLERA_OPERATIONS_PORT"] == operations
    assert str(POD["spec"]["securityContext"]["runAsUser"]) == dict(stages()[1])["USER"]


def test_the_container_may_write_to_tmp_alone_and_has_no_privileges() -> None:
    context = CONTAINER["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert POD["spec"]["securityContext"]["runAsNonRoot"] is True
    assert POD["spec"]["automountServiceAccountToken"] is False
    assert [mount["mountPath"] for mount in CONTAINER["volumeMounts"]] == ["/tmp"]


def test_probes_ask_what_the_server_answers_on_the_operations_port() -> None:
    paths = {
        name: CONTAINER[name]["httpGet"]["path"]
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {
        "startupProbe": "/readyz",
        "readinessProbe": "/readyz",
        # Never /readyz: a server that drains or whose worker restarts would be killed.
        "livenessProbe": "/healthz",
    }
    assert set(paths.values()) <= set(HEALTH_PATHS)
    assert {CONTAINER[name]["httpGet"]["port"] for name in paths} == {"operations"}


def test_the_pod_is_out_of_the_service_before_the_server_stops_accepting() -> None:
    probe = CONTAINER["readinessProbe"]
    unready_s = probe["periodSeconds"] * probe["failureThreshold"]
    assert unready_s <= seconds("SHUTDOWN_DELAY_S")


def test_the_grace_period_holds_the_whole_drain() -> None:
    pre_stop_s = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = seconds("SHUTDOWN_DELAY_S") + seconds("DRAIN_TIMEOUT_S") + WRITE_TIMEOUT_S
    assert POD["spec"]["terminationGracePeriodSeconds"] >= pre_stop_s + drain_s


# ── around it ─────────────────────────────────────────────────────────────────────────────────────


def test_everything_selects_the_pod_and_names_its_ports() -> None:
    labels = POD["metadata"]["labels"].items()
    selectors = [
        one("Deployment")["spec"]["selector"]["matchLabels"],
        one("Service")["spec"]["selector"],
        one("Service", "paellera-operations")["spec"]["selector"],
        one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels for selector in selectors)
    services = [manifest for manifest in MANIFESTS if manifest["kind"] == "Service"]
    named = {port["targetPort"] for service in services for port in service["spec"]["ports"]}
    assert named == set(PORTS)
    rules = one("NetworkPolicy")["spec"]["ingress"]
    assert {port["port"] for rule in rules for port in rule["ports"]} == set(PORTS)
    # Anybody is what a rule without `from` lets in.
    assert all(rule["from"] for rule in rules)


def test_metrics_are_scraped_from_the_operations_service_as_the_alerts_job() -> None:
    monitor = one("ServiceMonitor")["spec"]
    labels = one("Service", "paellera-operations")["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert (
        not monitor["selector"]["matchLabels"].items()
        <= one("Service")["metadata"]["labels"].items()
    )
    scraped = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
    assert labels[monitor["jobLabel"]] == scraped["scrape_configs"][0]["job_name"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["path"] in HEALTH_PATHS
    ports = one("Service", "paellera-operations")["spec"]["ports"]
    assert endpoint["port"] in {port["name"] for port in ports}


def test_the_autoscaler_scales_the_deployment_by_a_metric_that_the_server_has() -> None:
    scaler = one("HorizontalPodAutoscaler")["spec"]
    deployment = one("Deployment")
    target = scaler["scaleTargetRef"]
    assert (target["kind"], target["name"], target["apiVersion"]) == (
        deployment["kind"],
        deployment["metadata"]["name"],
        deployment["apiVersion"],
    )
    # Applied again, it would undo the autoscaler's number.
    assert "replicas" not in deployment["spec"]
    (metric,) = scaler["metrics"]
    names = {family.name for family in Metrics().registry.collect()}
    assert metric["pods"]["metric"]["name"] in names
    # With one replica the disruption budget would let a drained node stop the service.
    assert scaler["minReplicas"] > one("PodDisruptionBudget")["spec"]["maxUnavailable"]


def test_the_documented_command_makes_a_prometheus_rule_of_all_rules_and_alerts() -> None:
    (_, rest) = (ROOT / "docs/kubernetes.md").read_text().split("```sh\n")
    command = rest.split("```")[0].replace("kubectl apply -f -", "cat")
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    made = yaml.safe_load(done.stdout)
    assert made["kind"] == "PrometheusRule"
    groups = [
        group
        for name in ("rules", "alerts")
        for group in yaml.safe_load((ROOT / f"docker/prometheus/{name}.yml").read_text())["groups"]
    ]
    assert made["spec"] == {"groups": groups}


def test_the_documented_adapter_rule_serves_the_autoscaler_s_metric() -> None:
    blocks = (ROOT / "docs/kubernetes.md").read_text().split("```yaml\n")[1:]
    documents = [yaml.safe_load(block.split("```")[0]) for block in blocks]
    (adapter,) = (each for each in documents if "rules" in each)
    (metric,) = one("HorizontalPodAutoscaler")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert adapter["rules"]["custom"][0]["seriesQuery"].startswith(f"{name}{{")
    (scaled,) = (each for each in documents if each.get("kind") == "ScaledObject")
    assert name in scaled["spec"]["triggers"][0]["metadata"]["query"]
