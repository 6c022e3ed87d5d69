"""The runner of `make client-test`: every client has a program and a snippet in the documentation,
and what they say becomes a table.
"""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from tests.clients.__main__ import (
    ADDRESS,
    FILES,
    PROGRAMS,
    NotInstalledError,
    Result,
    addressed,
    checked,
    columns,
    install,
    main,
    snippets,
    table,
)
from tests.clients.openai_tests import adapted
from tests.clients.registry import CALLS, CLIENTS, Client

KINDS = {
    "python": {"python", "yaml"},
    "node": {"javascript"},
    "java": {"java"},
    "go": {"go"},
    "ruby": {"ruby"},
    "php": {"php"},
    "shell": {"sh"},
}


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_every_client_has_a_program_and_a_snippet(client: Client) -> None:
    assert (PROGRAMS / client.program).exists()
    kind, code = snippets()[client.name]
    assert kind in KINDS[client.language]
    assert ADDRESS in code or "port=8000" in code
    # No folder of the machine that the snippet was written on.
    roots = {f"/{path.name}/" for path in Path("/").iterdir() if path.is_dir()}
    assert not [root for root in roots if re.search(rf"(?<![\w.:/-]){re.escape(root)}", code)]
    if kind == "python":
        ast.parse(code)


def test_every_snippet_belongs_to_a_client() -> None:
    assert set(snippets()) == {client.name for client in CLIENTS}
    assert {kind for kind, _ in snippets().values()} <= set(FILES)


def test_a_snippet_is_run_with_the_servers_address() -> None:
    code = f'URL = "http://{ADDRESS}/v1"; connect(port=8000)'
    assert addressed(code, "http://127.0.0.1:4321") == (
        'URL = "http://127.0.0.1:4321/v1"; connect(port=4321)'
    )


def test_results_become_a_table() -> None:
    results = [
        Result("one", {"generate": (True, "64x32"), "own": (False, "why")}),
        Result("two", {"snippet": (True, "")}),
        Result("three", skipped="no java"),
    ]
    assert columns(results) == ["snippet", "generate", "own"]
    assert [result.failed for result in results] == [True, False, False]
    shown = io.StringIO()
    Console(file=shown, width=120).print(table(results))
    lines = {line.split()[1]: line for line in shown.getvalue().splitlines() if "│" in line}
    assert "ok" in lines["one"]
    assert "FAILED" in lines["one"]
    assert "skipped" in lines["three"]
    assert list(CALLS) == list(dict.fromkeys(CALLS))


@pytest.mark.process
def test_a_client_that_cannot_be_installed_says_why(tmp_path: Path) -> None:
    with pytest.raises(NotInstalledError, match="no such-program"):
        install(Client("x", "shell", "curl.sh", commands=("such-program",)), tmp_path)
    with pytest.raises(NotInstalledError, match="such-installer"):
        checked(["such-installer"], tmp_path)


def test_unknown_clients_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "curl,netcat"])
    assert "unknown: netcat" in capsys.readouterr().err


def test_openais_own_tests_get_images_and_fields_that_mean_something_here() -> None:
    source = (
        "# generated\n"
        "from __future__ import annotations\n"
        "client.images.edit(\n"
        '    image=b"Example data",\n'
        '    background="transparent",\n'
        '    complexity="low",\n'
        '    markup=b"Example data",\n'
        '    output_format="png",\n'
        "    svg={\n"
        '        "reasoning": {"effort": "none"},\n'
        "    },\n"
        '    user="u",\n'
        ")\n"
    )
    changed = adapted(source)
    ast.parse(changed)
    call = changed[changed.index("client.images.edit(") :]
    assert call == (
        "client.images.edit(\n"
        "    image=PICTURE,\n"
        '    background="opaque",\n'
        '    output_format="png",\n'
        '    user="u",\n'
        ")\n"
    )
