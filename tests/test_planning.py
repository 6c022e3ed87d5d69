"""What a plan draws by itself: seeds that every client can send back."""

from __future__ import annotations

from server.api.planning.draft import seeds


def test_a_drawn_seed_is_one_that_javascript_reads_exactly() -> None:
    drawn = {seed for _ in range(20) for seed in seeds(None, 1)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**53 for seed in drawn)


def test_seeds_follow_one_another_and_the_largest_int64_is_followed_by_the_smallest() -> None:
    assert seeds(5, 3) == (5, 6, 7)
    assert seeds(2**63 - 1, 2) == (2**63 - 1, -(2**63))
