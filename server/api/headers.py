"""Read headers that list alternatives by weight, such as `Accept` and `Accept-Encoding`."""

from __future__ import annotations

from collections.abc import Iterator


def weighted(header: str) -> Iterator[tuple[str, float]]:
    """Yield the alternatives in lower case with their weights (RFC 9110, 12.4.2), as sent.

    The weight is 1 if none was sent, and 0 if it is no number from 0 to 1.
    """
    for entry in header.split(","):
        name, *options = (part.strip().lower() for part in entry.split(";"))
        sent = next((option[2:] for option in options if option.startswith("q=")), "1")
        try:
            weight = float(sent)
        except ValueError:
            weight = 0.0
        yield name, weight if 0 <= weight <= 1 else 0.0
