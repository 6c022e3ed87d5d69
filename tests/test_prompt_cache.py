"""The prompt cache: least recently used out first, never more bytes than allowed, and nothing
computed twice.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.engine.messages import Count
from server.engine.prompt_cache import PromptCache


def cache(capacity: int) -> PromptCache:
    """Of texts, each as large as it is long."""
    return PromptCache(capacity, lambda _, value: len(str(value)), Counter[Count]())


def fetch(cache: PromptCache, *keys: str) -> list[str]:
    """The keys that had to be computed; a key's value is the key itself."""
    computed: list[str] = []

    def compute(missing: list[str]) -> list[str]:
        computed.extend(missing)
        return missing

    assert cache.fetch("text", keys, compute) == list(keys)
    return computed


def test_what_was_used_longest_ago_goes_first():
    held = cache(6)
    fetch(held, "aa", "bb", "cc")
    assert fetch(held, "aa") == []
    assert fetch(held, "dd") == ["dd"]
    assert fetch(held, "aa", "cc", "dd") == []
    assert fetch(held, "bb") == ["bb"]


def test_one_large_value_takes_the_place_of_several_small_ones():
    held = cache(6)
    fetch(held, "aa", "bb", "cc")
    assert fetch(held, "dddd") == ["dddd"]
    assert (held.held, len(held)) == (6, 2)
    assert fetch(held, "cc") == []


def test_what_is_larger_than_everything_allowed_drives_nothing_out():
    held = cache(6)
    fetch(held, "aa", "bb")
    assert fetch(held, "ddddddd") == ["ddddddd"]
    assert fetch(held, "aa", "bb") == []
    assert fetch(held, "ddddddd") == ["ddddddd"]


def test_no_capacity_holds_nothing():
    held = cache(0)
    assert fetch(held, "a", "a") == ["a"]
    assert fetch(held, "a") == ["a"]
    assert (held.held, len(held)) == (0, 0)


def test_keys_of_one_call_are_answered_though_they_do_not_fit_together():
    held = cache(4)
    assert fetch(held, "aa", "bb", "cc", "aa") == ["aa", "bb", "cc"]
    assert held.held <= 4


def test_hits_and_misses_are_counted_by_kind():
    counters = Counter[Count]()
    held = PromptCache(10, lambda _, value: len(str(value)), counters)
    held.fetch("text", ["a", "b", "a"], list)
    held.fetch("prior", ["c"], list)
    held.fetch("text", ["b"], list)
    assert counters == {
        ("prompt_cache_hits", "text"): 2,
        ("prompt_cache_misses", "text"): 2,
        ("prompt_cache_hits", "prior"): 0,
        ("prompt_cache_misses", "prior"): 1,
    }


@given(st.integers(0, 12), st.lists(st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)))
def test_the_bound_holds_whatever_is_fetched(capacity, calls):
    held = cache(capacity)
    for keys in calls:
        fetch(held, *keys)
        assert held.held == sum(len(str(value)) for _, value in held.items()) <= capacity
