"""The API reference at /docs, used as people use it: "Try it out" with the documented example."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, expect

from load_tests.browser import CHROMIUM
from server.api.openapi import EXAMPLES, IMAGE
from server.api.schemas import as_list

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


def choose_files(field: Locator, files: list[Path]) -> None:
    """Choose the files of a field, which may be a list without entries."""
    add = field.get_by_role("button", name="Add")
    for index, file in enumerate(files):
        if add.count():
            add.click()
        field.locator("input[type=file]").nth(index).set_input_files(file)


@pytest.mark.parametrize("path", EXAMPLES)
def test_every_form_works_with_its_example_and_files(
    chromium: Browser, plain_address: str, path: str, tmp_path: Path
) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(base64.b64decode(IMAGE))
    fields = EXAMPLES[path]
    page = chromium.new_page()
    page.goto(f"{plain_address}/docs")
    operation = page.locator(f'.opblock:has([data-path="{path}"])')
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_label("Request content type").select_option("multipart/form-data")
    for name in fields.keys() & {"image", "mask"}:
        field = operation.locator(f'[data-property-name="{name}"]')
        choose_files(field, [file] * len(as_list(fields[name])))
    with page.expect_response(f"**{path}") as answer:
        operation.get_by_role("button", name="Execute").click()
    assert answer.value.status == 200, answer.value.text()
    expect(operation.locator(".live-responses-table .response .response-col_status")).to_have_text(
        "200"
    )
    page.close()
