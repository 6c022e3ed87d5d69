"""The marks that tests/conftest.py sets: what starts a server has the mark `process`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
from fastapi import FastAPI

from load_tests.serving import serving as serving_process
from tests.conftest import serving, starts_a_server, wait_until


@contextmanager
def twice_removed() -> Iterator[str]:
    with serving(FastAPI()) as address:
        yield address


def starts_one() -> None:
    (lambda: twice_removed())().__enter__()


def starts_a_process() -> None:
    serving_process({}).__enter__()


def starts_none() -> None:
    wait_until(lambda: True)


def test_what_starts_a_server_is_found_through_functions(request: pytest.FixtureRequest) -> None:
    def marked(function: Callable[[], None]) -> bool:
        item = pytest.Function.from_parent(request.node.parent, name="x", callobj=function)
        return starts_a_server(item)

    assert marked(starts_one)
    assert marked(starts_a_process)
    assert not marked(starts_none)


def test_what_starts_a_server_is_found_in_fixtures() -> None:
    fixtures = {"server": [Mock(func=starts_one)]}
    item = Mock(spec=pytest.Function, obj=starts_none, _fixtureinfo=Mock(name2fixturedefs=fixtures))
    assert starts_a_server(item)
