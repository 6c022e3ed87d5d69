"""Settings come from PAELLERA_* and are checked where they enter."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings, document


def test_the_environment_is_read_with_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAELLERA_PORT", "9001")
    monkeypatch.setenv("PAELLERA_DETERMINISTIC", "true")
    monkeypatch.setenv("PORT", "1")
    settings = Settings()
    assert (settings.port, settings.deterministic) == (9001, True)


def test_arguments_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAELLERA_PORT", "9001")
    assert Settings(port=9002).port == 9002


def test_the_first_of_several_bundles_leads_and_repeats_count_once() -> None:
    assert Settings(weights=" big, tiny,big,").bundles == ("big", "tiny")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 70_000),
        ("weights", " , "),
        ("device", "gpu"),
        ("devices", "cpu,gpu"),
        ("drain_timeout_s", "inf"),
        ("heartbeat_s", "nan"),
        ("stall_timeout_s", 86_401),
        ("trusted_proxies", "10.0.0.0/33"),
        ("trusted_proxies", "10.0.0.1/8"),
        ("trusted_proxies", "proxy.example"),
        ("trusted_proxies", "*,10.0.0.1"),
        ("open_paths", "healthz"),
        ("open_paths", "/docs*"),
        ("public_url", "images.example.com"),
        ("public_url", "https://user:password@x"),
        ("cors_origins", "null"),
        ("graph_sizes", "9" * 5000 + "x64"),
        ("timeout_s", 601),
        ("queue_rows", 0),
        ("log_level", "loud"),
        ("prot", 1),
    ],
)
def test_what_is_out_of_bounds_or_unknown_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Settings.model_validate({field: value})


def test_the_operations_port_is_another_than_the_api_s() -> None:
    with pytest.raises(ValidationError, match="operations_port"):
        Settings(port=8001, operations_port=8001)


@pytest.mark.parametrize("proxies", ["", "*", "10.0.0.0/8, 127.0.0.1,fd00::/8"])
def test_addresses_and_networks_of_proxies_are_accepted(proxies: str) -> None:
    assert Settings(trusted_proxies=proxies).trusted_proxies == proxies


def test_settings_cannot_change_after_the_start() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_each_of_the_devices_is_a_worker_and_without_them_there_is_one() -> None:
    assert Settings(device="cpu").worker_devices == ("cpu",)
    assert Settings(device="cpu", devices="cuda:0,cuda:1").worker_devices == ("cuda:0", "cuda:1")


def test_every_setting_is_described_and_the_page_of_settings_is_current() -> None:
    assert [name for name, info in Settings.model_fields.items() if not info.description] == []
    page = Path(__file__).parents[1] / "docs/settings.md"
    assert page.read_text() == document(), "python -m server.settings > docs/settings.md"
