"""A job that begins again tells its caller nothing twice, and nothing that is older than what
was told.
"""

from __future__ import annotations

from server.engine.hooks import HookName, Hooks, ReplayFilter
from server.engine.messages import Drawn, Image, Preview


def preview(number: int, index: int = 0) -> Preview:
    return Preview("id", number, number + 1, Image(index, 1, 1, b"abc"))


def drawn(index: int) -> Drawn:
    return Drawn("id", Image(index, 1, 1, b"abc"))


def told(*calls: tuple[HookName, object]) -> list[tuple[str, object]]:
    heard: list[tuple[str, object]] = []
    hooks = Hooks(
        on_admitted=lambda forecast: heard.append(("on_admitted", forecast)),
        on_preview=lambda preview: heard.append(("on_preview", preview)),
        on_drawn=lambda drawn: heard.append(("on_drawn", drawn)),
    )
    assert hooks.names == {"on_admitted", "on_preview", "on_drawn"}
    replay_filter = ReplayFilter(hooks)
    for name, *args in calls:
        replay_filter.call(name, *args)
    return heard


def test_previews_only_go_on() -> None:
    shown = [
        preview(1),
        preview(0),
        preview(1),
        preview(2),
        preview(0, index=1),
        preview(0, index=1),
    ]
    assert told(*(("on_preview", each) for each in shown)) == [
        ("on_preview", preview(1)),
        ("on_preview", preview(2)),
        ("on_preview", preview(0, index=1)),
    ]


def test_an_image_is_handed_out_once() -> None:
    assert told(("on_drawn", drawn(0)), ("on_drawn", drawn(1)), ("on_drawn", drawn(0))) == [
        ("on_drawn", drawn(0)),
        ("on_drawn", drawn(1)),
    ]


def test_a_job_is_admitted_once_and_what_nobody_asked_for_is_not_told() -> None:
    assert told(("on_admitted", 1), ("on_admitted", 2), ("on_started", None)) == [
        ("on_admitted", 1)
    ]
