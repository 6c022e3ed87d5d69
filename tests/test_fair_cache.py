"""The cache of answers and stored images: bounds, lifetime, and nobody displaces the others."""

from __future__ import annotations

from server.fair_cache import FairCache


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def cache(limit: int = 10, clock: Clock | None = None) -> FairCache[str, str]:
    return FairCache[str, str](limit, 60, clock or Clock())


def kept(cache: FairCache[str, str], names: str) -> str:
    return "".join(name for name in names if cache.get(name) is not None)


def add(cache: FairCache[str, str], owner: str, names: str, size: int = 1) -> bool:
    return cache.add(owner, {name: (name.upper(), size) for name in names})


def test_a_value_is_kept_until_its_time_is_over() -> None:
    clock = Clock()
    values = cache(clock=clock)
    add(values, "one", "a")
    clock.now = 59
    assert values.get("a") == ("A", 1)
    clock.now = 60
    assert values.get("a") is None
    assert values.bytes == 0


def test_expired_values_free_their_bytes_although_nobody_asks_for_them() -> None:
    clock = Clock()
    values = cache(clock=clock)
    add(values, "one", "ab")
    clock.now = 30
    add(values, "one", "c")
    clock.now = 60
    values.expire()
    assert (values.bytes, kept(values, "abc")) == (1, "c")


def test_the_oldest_values_make_room() -> None:
    values = cache()
    for name in "abcd":
        add(values, "one", name, 4)
    assert (kept(values, "abcd"), values.bytes) == ("cd", 8)


def test_who_holds_most_makes_room_for_the_others() -> None:
    values = cache()
    add(values, "small", "a", 2)
    for name in "bcdefgh":
        add(values, "large", name, 2)
    assert kept(values, "abcdefgh") == "aefgh"
    add(values, "third", "i", 2)
    assert kept(values, "abcdefghi") == "afghi"


def test_the_parts_of_one_answer_never_displace_each_other() -> None:
    values = cache()
    add(values, "other", "a", 4)
    assert add(values, "one", "bcd", 3)
    assert kept(values, "abcd") == "bcd"


def test_what_is_larger_than_all_of_it_is_refused_and_displaces_nothing() -> None:
    values = cache()
    add(values, "one", "a", 4)
    assert not add(values, "other", "bc", 6)
    assert (kept(values, "abc"), values.bytes) == ("a", 4)


def test_reserved_bytes_displace_values_and_are_not_displaced() -> None:
    values = cache()
    add(values, "one", "ab", 4)
    assert values.reserve("other", 6)
    assert (kept(values, "ab"), values.bytes) == ("b", 10)
    assert not values.reserve("other", 5)
    assert not add(values, "one", "c", 5)
    values.release(6)
    assert add(values, "one", "c", 5)
    assert kept(values, "bc") == "bc"


def test_a_value_replaces_the_one_of_its_key() -> None:
    values = cache()
    add(values, "one", "a", 3)
    values.add("other", {"a": ("new", 2)})
    assert values.get("a") == ("new", 60)
    assert values.bytes == 2
