"""What a plan draws by itself, seeds that every client can send back; and what a result costs."""

from __future__ import annotations

import pytest

from model.config import BundleConfig, find_bundle
from server.api.planning.draft import draft, seeds
from server.api.schemas import AnyFormat, GenerateRequest
from server.settings import Settings


def test_a_drawn_seed_is_one_that_javascript_reads_exactly() -> None:
    drawn = {seed for _ in range(20) for seed in seeds(None, 1)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**53 for seed in drawn)


def test_seeds_follow_one_another_and_the_largest_int64_is_followed_by_the_smallest() -> None:
    assert seeds(5, 3) == (5, 6, 7)
    assert seeds(2**63 - 1, 2) == (2**63 - 1, -(2**63))


# In branches of a step for each pixel.
@pytest.mark.parametrize(
    ("output", "file"),
    [("png", 1), ("json", 1), ("url", 1), ("jpeg", 1), ("webp", 1), ("gif", 6)],
)
def test_a_result_costs_its_decoding_its_file_and_its_previews(
    output: AnyFormat, file: int
) -> None:
    config = BundleConfig.read(find_bundle("tiny"))
    models, settings = {config.name: config}, Settings()
    plain, streamed = (
        draft(request, "generate", models, settings, output).workload()
        for request in (
            GenerateRequest(prompt="a ball"),
            GenerateRequest(prompt="a ball", stream=True, partial_images=2),
        )
    )
    assert (plain.output, plain.enlarging) == (3 + file, 2 + file)
    assert (streamed.output, streamed.enlarging) == (3 + file + 2 * (3 + 1), 2 + file)
