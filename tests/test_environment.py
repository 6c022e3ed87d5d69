"""Environment variables fail closed: an unknown one is refused, an empty one is absent, Kubernetes'
own are ignored, and what is unsafe is said.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from load_tests.serving import PAELLERA, serving
from server.environment import UnknownVariableError
from server.settings import Settings

KEY = "a-key-of-sixteen-letters"
# What a pod gets for Services `paellera` and `paellera-operations` in its namespace.
KUBERNETES = {
    "PAELLERA_SERVICE_HOST": "10.96.12.3",
    "PAELLERA_SERVICE_PORT": "8000",
    "PAELLERA_SERVICE_PORT_HTTP": "8000",
    "PAELLERA_PORT": "tcp://10.96.12.3:8000",
    "PAELLERA_PORT_8000_TCP": "tcp://10.96.12.3:8000",
    "PAELLERA_PORT_8000_TCP_PROTO": "tcp",
    "PAELLERA_PORT_8000_TCP_PORT": "8000",
    "PAELLERA_PORT_8000_TCP_ADDR": "10.96.12.3",
    "PAELLERA_OPERATIONS_SERVICE_HOST": "fd00::12",
    "PAELLERA_OPERATIONS_PORT": "tcp://[fd00::12]:8001",
    "PAELLERA_OPERATIONS_PORT_8001_TCP_ADDR": "fd00::12",
}


def set_all(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def command(
    *arguments: str, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        env=os.environ | (variables or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("PAELLERA_API_KEY", "PAELLERA_API_KEYS"),
        ("PAELLERA_PROT", "PAELLERA_PORT"),
        ("PAELLERA_OPEN_PATH", "PAELLERA_OPEN_PATHS"),
        ("PAELLERA_URL", "PAELLERA_CLIENT_URL"),
        ("paellera_api_key", "PAELLERA_API_KEYS"),
    ],
)
def test_an_unknown_variable_is_refused_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, name: str, suggestion: str
) -> None:
    monkeypatch.setenv(name, KEY)
    with pytest.raises(UnknownVariableError) as error:
        Settings()
    assert name in str(error.value)
    assert f"did you mean {suggestion}?" in str(error.value)
    assert KEY not in str(error.value)


def test_all_unknown_variables_are_named_and_an_empty_one_is_unknown_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(monkeypatch, {"PAELLERA_XYZZY": "1", "PAELLERA_API_KEY": ""})
    with pytest.raises(ValueError, match=r"PAELLERA_API_KEY;.*PAELLERA_XYZZY; `paellera config`"):
        Settings()


def test_variables_of_clients_and_of_compose_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CLIENT_URL", "CLIENT_KEY", "BUNDLES", "ART")
    set_all(monkeypatch, {f"PAELLERA_{name}": "x" for name in names})
    assert not Settings().model_fields_set


@pytest.mark.parametrize("blank", ["", "  "])
def test_an_empty_variable_or_argument_is_the_default_for_every_setting(
    monkeypatch: pytest.MonkeyPatch, blank: str
) -> None:
    fields = Settings.model_fields
    defaults = Settings()
    set_all(monkeypatch, {f"PAELLERA_{field.upper()}": blank for field in fields})
    assert Settings() == defaults
    assert Settings.model_validate(dict.fromkeys(fields, blank)) == defaults


def test_an_empty_argument_leaves_the_environment_s_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAELLERA_WEIGHTS", "other")
    assert Settings(weights="").weights == "other"


def test_kubernetes_service_variables_are_ignored_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(monkeypatch, KUBERNETES)
    settings = Settings()
    assert (settings.port, settings.operations_port) == (8000, None)
    (warning,) = settings.warnings
    assert "PAELLERA_OPERATIONS_PORT," in warning
    assert "enableServiceLinks: false" in warning


@pytest.mark.parametrize(
    ("name", "value"), [("PAELLERA_PORT", "tcp:8000"), ("PAELLERA_HOST", "tcp://10.96.12.3:8000")]
)
def test_what_only_resembles_kubernetes_variables_is_a_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name.removeprefix("PAELLERA_").lower()):
        Settings()


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [
        ("127.0.0.1", "", False),
        ("127.8.9.1", "", False),
        ("::1", "", False),
        ("localhost", "", False),
        ("0.0.0.0", "", True),
        ("::", "", True),
        ("192.168.1.2", "", True),
        ("myhost", "", True),
        ("0.0.0.0", KEY, False),
    ],
)
def test_a_server_that_others_reach_without_keys_is_warned_of(
    host: str, keys: str, warned: bool
) -> None:
    exposure = Settings(host=host, api_keys=keys).exposure
    assert (exposure is not None) == warned
    assert not warned or f"listening on {host} without API keys" in str(exposure)


# ── commands ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.process
@pytest.mark.parametrize("name", ["serve", "config"])
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PAELLERA_API_KEY": KEY}, "did you mean PAELLERA_API_KEYS?"),
        ({"PAELLERA_DRAIN_TIMEOUT_S": "inf"}, "PAELLERA_DRAIN_TIMEOUT_S, in seconds: must be"),
        ({"PAELLERA_TRUSTED_PROXIES": "10.0.0.0/33"}, "10.0.0.0/33"),
        ({"PAELLERA_OPEN_PATHS": "/,healthz"}, "'healthz'"),
        (
            {"PAELLERA_API_KEYS": KEY, "PAELLERA_C2PA_KEY": "key.pem"},
            "PAELLERA_C2PA_CERTIFICATE and PAELLERA_C2PA_KEY are needed together",
        ),
        (
            {"PAELLERA_C2PA_CERTIFICATE": "/absent.pem", "PAELLERA_C2PA_KEY": "/absent.pem"},
            "PAELLERA_C2PA_CERTIFICATE: /absent.pem: No such file",
        ),
        ({"PAELLERA_HOST": "http://localhost"}, "PAELLERA_HOST: must be an IP address"),
        ({"PAELLERA_MAX_REQUEST_WORK": "1"}, "PAELLERA_MAX_REQUEST_WORK 1 excludes every request"),
        ({"PAELLERA_MAX_SIDE": "64"}, "PAELLERA_MAX_SIDE 64 excludes"),
    ],
)
def test_nonsense_is_refused_in_one_line_with_exit_code_2(
    name: str, variables: dict[str, str], words: str
) -> None:
    done = command(name, variables=variables)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("paellera: ")
    assert words in line
    assert KEY not in line
    assert done.stdout == ""


@pytest.mark.process
def test_config_refuses_weights_of_another_size_than_listed(
    random_bundle: Path, tmp_path: Path
) -> None:
    cut = shutil.copytree(random_bundle, tmp_path / "cut")
    with (cut / "vqgan.safetensors").open("r+b") as file:
        file.truncate(100)
    done = command("config", variables={"PAELLERA_WEIGHTS": str(cut)})
    assert done.returncode == 2
    assert "vqgan.safetensors has 100 bytes; bundle.json lists" in done.stderr
    (cut / "vqgan.safetensors").unlink()
    assert "is missing" in command("config", variables={"PAELLERA_WEIGHTS": str(cut)}).stderr


@pytest.mark.process
def test_config_prints_every_setting_with_its_source_and_no_secret() -> None:
    variables = {
        "PAELLERA_API_KEYS": KEY,
        "PAELLERA_HOST": "0.0.0.0",
        "PAELLERA_QUEUE_ROWS": "7",
        "PAELLERA_DTYPE": "",
    }
    done = command("config", "--port", "9000", "--json", variables=variables)
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    shown = json.loads(done.stdout)
    assert {name.removeprefix("PAELLERA_").lower() for name in shown} == set(Settings.model_fields)
    assert shown["PAELLERA_API_KEYS"] == {"value": "********", "source": "environment"}
    assert shown["PAELLERA_QUEUE_ROWS"] == {"value": 7, "source": "environment"}
    assert shown["PAELLERA_PORT"] == {"value": 9000, "source": "--port"}
    assert shown["PAELLERA_DTYPE"] == {"value": "auto", "source": "default"}
    assert "warning: requests may name any host" in done.stderr
    lines = command("config", variables=variables).stdout.splitlines()
    assert "PAELLERA_QUEUE_ROWS=7  # environment" in lines
    assert "# PAELLERA_DTYPE=auto  # default" in lines


@pytest.mark.process
def test_a_server_beyond_loopback_without_keys_says_so_in_log_and_readiness(
    random_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    variables = {"PAELLERA_WEIGHTS": str(random_bundle), "PAELLERA_THREADS": "1", **KUBERNETES}
    with serving(variables, (*PAELLERA[:-1], "0.0.0.0")) as server:
        (warning,) = httpx.get(f"{server.url}/readyz").json()["warnings"]
    assert "0.0.0.0 without API keys" in warning
    logged = [line for line in capfd.readouterr().err.splitlines() if '"level": "warning"' in line]
    said = [json.loads(line).get("warning", "") for line in logged]
    assert warning in said
    assert any("Kubernetes' service variables" in line for line in said)
