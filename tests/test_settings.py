"""Settings come from PAELLERA_* and are checked where they enter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError, create_model, model_validator

from server.cli.errors import settings_problem
from server.settings import Settings, document
from tests.support.error_texts import JARGON

KEY = "a-key-of-sixteen-letters"


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


def problem(values: dict[str, object], settings: type[Settings] = Settings) -> str:
    """Return what the command line says of them."""
    with pytest.raises(ValidationError) as raised:
        settings.model_validate(values)
    return settings_problem(raised.value)


# What the validators of the whole object refuse.
WHOLE = {
    "_signature_is_whole": (
        {"c2pa_certificate": "cert.pem"},
        {"c2pa_certificate": "cert.pem", "c2pa_key": "key.pem", "mark": "false"},
    )
}


def test_no_error_of_the_whole_settings_prints_a_key() -> None:
    assert WHOLE.keys() == Settings.__pydantic_decorators__.model_validators.keys()
    for values in (values for cases in WHOLE.values() for values in cases):
        said = problem({"api_keys": KEY, **values})
        assert KEY not in said
        assert said.startswith("PAELLERA_")


@pytest.mark.parametrize("mode", ["before", "after"])
def test_no_later_validator_of_the_whole_settings_can_print_a_key(mode: str) -> None:
    def refuse(values: Any) -> Any:
        raise ValueError("these do not fit together")

    validators = {"refuse": model_validator(mode=mode)(refuse)}  # type: ignore[call-overload]
    strict = create_model("Settings", __base__=Settings, __validators__=validators)
    assert problem({"api_keys": KEY}, strict) == "these do not fit together"


SECRETS = [name for name, info in Settings.model_fields.items() if info.annotation is SecretStr]


@pytest.mark.parametrize("value", [[KEY], {"key": KEY}, f"{KEY},no key"])
@pytest.mark.parametrize("name", SECRETS)
def test_no_error_of_a_secret_setting_prints_it(name: str, value: object) -> None:
    assert KEY not in problem({name: value})


@pytest.mark.parametrize(
    "value",
    [f'"{KEY}"', f"'{KEY}'", f'"{KEY},{KEY}-2"', f'"{KEY}", "{KEY}-2"', f' "{KEY}"\r'],
)
def test_quotes_around_keys_are_refused_since_no_shell_has_removed_them(value: str) -> None:
    said = problem({"api_keys": value})
    assert said == "PAELLERA_API_KEYS: remove the quotes around the value or a key"
    assert Settings(api_keys=f'{KEY}"').keys == (f'{KEY}"',)


def test_no_error_prints_the_password_of_an_address() -> None:
    assert KEY not in problem({"public_url": f"https://user:{KEY}@images.example.com"})


@pytest.mark.parametrize("name", Settings.model_fields)
def test_an_error_names_the_variable_and_says_in_words_what_it_may_be(name: str) -> None:
    if name in ("c2pa_certificate", "c2pa_key", "compiled_dir"):  # Any text may be a path.
        return
    wrong = {"allowed_hosts": "a b", "weights": ",", "api_keys": "short"}
    said = problem({name: wrong.get(name, "no such value!")})
    assert re.match(rf"PAELLERA_{name.upper()}(, in (bytes|seconds))?: ", said)
    assert not JARGON.search(said)
    assert "^" not in said
    assert (", in bytes:" in said) == name.endswith("_bytes")
    assert (", in seconds:" in said) == name.endswith("_s")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("device", "gpu", "must be auto, cpu, cuda, mps or a GPU such as cuda:1"),
        ("devices", "cpu, gpu", "cuda:1, not 'gpu'"),
        ("cors_origins", "https://a.example/", "without a slash at the end"),
        ("public_url", "images.example.com", "https://images.example.com"),
        ("host", "http://localhost", "without a scheme, a port"),
        ("host", "localhost:9000", "without a scheme, a port"),
        ("queue_bytes", "2GB", "in bytes: must be a whole number of at least 1 (sent: '2GB')"),
        ("url_ttl_s", "0", "in seconds: must be a number above 0, at most 86400 (sent: '0')"),
        ("trusted_proxies", "10.0.0.5/8", "bits after the prefix must be zero, as in 10.0.0.0/8"),
        ("trusted_proxies", "proxy", "addresses and networks such as 10.0.0.0/8, not 'proxy'"),
    ],
)
def test_an_error_says_how_to_write_the_value(name: str, value: str, words: str) -> None:
    assert words in problem({name: value})


@pytest.mark.parametrize(
    ("name", "value", "attribute", "parts"),
    [
        ("devices", "cpu, cpu", "worker_devices", ("cpu", "cpu")),
        ("cors_origins", "https://a, https://b", "origins", ("https://a", "https://b")),
        ("graph_sizes", "64x32, 32x64", "captured_sizes", [(64, 32), (32, 64)]),
        ("weights", "a, b", "bundles", ("a", "b")),
        ("allowed_hosts", "a, b", "hosts", ("a", "b")),
        ("open_paths", "/a, /b", "paths_without_key", ("/a", "/b")),
        ("model_aliases", "a=b, c=d", "aliases", {"a": "b", "c": "d"}),
    ],
)
def test_every_list_may_have_spaces_after_its_commas(
    name: str, value: str, attribute: str, parts: object
) -> None:
    assert getattr(Settings.model_validate({name: value}), attribute) == parts


def test_the_log_level_may_be_in_capitals() -> None:
    assert Settings.model_validate({"log_level": "WARNING"}).log_level == "warning"


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


def test_every_time_is_described_with_its_unit() -> None:
    times = {
        name: str(i.description) for name, i in Settings.model_fields.items() if name[-2:] == "_s"
    }
    assert {name for name, text in times.items() if "seconds" not in text.lower()} == set()


def test_every_setting_is_described_and_the_page_of_settings_is_current() -> None:
    assert [name for name, info in Settings.model_fields.items() if not info.description] == []
    page = Path(__file__).parents[1] / "docs/settings.md"
    assert page.read_text() == document(), "python -m server.settings > docs/settings.md"
