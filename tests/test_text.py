"""Any text becomes bytes and tokens, cut where the encoder ends and said so; any picture becomes
an embedding.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.networks.text_encoders import BYTE_BUCKETS, CLIP, ByteEncoder, TextTower, bucket
from model.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("no_grad")

END = 1
LIMIT = 64  # of the random bundle's byte encoder, end mark included
TEXT = st.text(
    st.characters(exclude_categories=("Cs",)), max_size=80
)  # lone surrogates have no UTF-8


@pytest.fixture(scope="session")
def byt5(pipeline: Pipeline) -> ByteEncoder:
    return pipeline.bundle.byt5


@pytest.fixture(scope="session")
def clip(pipeline: Pipeline) -> CLIP:
    return pipeline.bundle.clip


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────────


@given(text=TEXT)
def test_a_prompt_is_its_utf8_bytes_plus_three_and_an_end_mark(byt5, text):
    tokens, mask, (truncated,) = byt5.tokenize([text])
    data = text.encode()
    kept = data[: LIMIT - 1]
    assert tokens[0][mask[0]].tolist() == [byte + 3 for byte in kept] + [END]
    assert truncated == (len(data) > LIMIT - 1)


@pytest.mark.parametrize("text", ["</s>", "<pad>", "<unk>", "<extra_id_0>", "a</s>b", " </s> "])
def test_what_looks_like_a_special_token_is_text(byt5, text):
    tokens, mask, _ = byt5.tokenize([text])
    assert tokens[0][mask[0]].tolist() == [byte + 3 for byte in text.encode()] + [END]


@pytest.mark.parametrize(
    "text", ["🍎" * 15, "تفاحة حمراء", "תפוח", "👩‍👩‍👧‍👦 e\u0301", "\x00\t\n\u200f", "ﷺ"]
)
def test_emoji_and_right_to_left_text_keep_every_byte(byt5, text):
    tokens, mask, (truncated,) = byt5.tokenize([text])
    assert not truncated
    assert bytes(t - 3 for t in tokens[0][mask[0]].tolist()[:-1]).decode() == text


@pytest.mark.parametrize(
    ("length", "truncated"), [(LIMIT - 2, False), (LIMIT - 1, False), (LIMIT, True), (4000, True)]
)
def test_a_prompt_is_cut_at_the_limit_end_mark_included(byt5, length, truncated):
    tokens, mask, cut = byt5.tokenize(["x" * length])
    assert cut == (truncated,)
    assert mask.sum() == min(length + 1, LIMIT)
    assert tokens[0][mask[0]][-1] == END


def test_a_character_may_be_cut_in_its_middle(byt5):
    out = byt5(["x" * (LIMIT - 2) + "🍎"])
    assert out.truncated == (True,)
    assert out.embeddings.isfinite().all()


@pytest.mark.parametrize("limit", [40, 64, 160, 768, 1000])
def test_lengths_are_padded_to_the_smallest_bucket_that_holds_them(limit):
    for length in range(1, limit + 1):
        chosen = bucket(length, limit)
        assert length <= chosen <= limit
        assert chosen == min(b for b in (*BYTE_BUCKETS, limit) if length <= b <= limit)


def test_the_mask_marks_exactly_the_padding(byt5):
    out = byt5(["", "red apple"])
    assert out.mask.sum(-1).tolist() == [1, 10]
    assert out.embeddings.shape == (2, 32, 16)


def test_a_prompt_s_embedding_does_not_depend_on_its_neighbours_length(byt5):
    alone, company = byt5(["red apple"]), byt5(["red apple", "x" * 60, ""])
    assert alone.embeddings.shape[1] < company.embeddings.shape[1]
    torch.testing.assert_close(
        company.embeddings[0, :10], alone.embeddings[0, :10], atol=1e-5, rtol=1e-5
    )


def test_every_byte_counts(byt5):
    red, bed = byt5(["red apple"]), byt5(["bed apple"])
    # Attention carries the change to the last position.
    assert not torch.allclose(red.embeddings[0, 9], bed.embeddings[0, 9], atol=1e-4)


# ── CLIP's text ───────────────────────────────────────────────────────────────────────────────────


def test_the_bundle_s_own_merges_are_used(clip):
    assert clip.tokenizer.vocab_size == clip.config.text_cfg.vocab_size
    assert len(clip.tokenizer.encode("red apple on the")) == 4
    assert clip.tokenizer.decode(clip.tokenizer.encode("red apple")) == "red apple "


@pytest.mark.parametrize(("words", "truncated"), [(0, False), (14, False), (15, True), (500, True)])
def test_clip_says_when_its_context_is_full(clip, words, truncated):
    prompt = " ".join(["red"] * words)
    tokens, cut = clip.tokenize([prompt])
    assert cut == (truncated,)
    assert torch.equal(tokens, clip.tokenizer([prompt]))


@pytest.mark.parametrize(
    "prompt",
    ["red " * 8000, "🎨" * 32_000, "x" * 32_000, "a\n" * 16_000, " " * 31_000 + "red apple"],
)
def test_a_long_prompt_is_read_as_far_as_the_context(clip, monkeypatch, prompt):
    cleaned = []
    clean = clip.tokenizer.clean_fn
    monkeypatch.setattr(
        clip.tokenizer, "clean_fn", lambda text: cleaned.append(text) or clean(text)
    )
    tokens, cut = clip.tokenize([prompt])
    assert all(len(text) <= 4000 and text.count("\n") <= 100 for text in cleaned)
    assert cut == (prompt.strip() != "red apple",)
    assert (tokens[0, -1] != 0) == cut[0]


def test_many_lines_are_the_same_words(clip):
    text = " ".join(["red apple on the"] * 3)
    assert torch.equal(clip.tokenize([text.replace(" ", "\n" * 40)])[0], clip.tokenize([text])[0])


@given(text=TEXT)
def test_any_text_has_an_embedding(clip, text):
    out = clip.encode_text([text])
    assert out.shape == (1, 16)
    assert out.isfinite().all()


def test_embeddings_of_one_batch_are_independent_and_not_normalised(clip):
    together = clip.encode_text(["red apple", "the " * 30])
    torch.testing.assert_close(together[:1], clip.encode_text(["red apple"]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together.norm(dim=-1), torch.ones(2), atol=0.01)


def test_text_beyond_the_context_changes_nothing(clip):
    assert torch.equal(clip.encode_text(["red " * 20 + "apple"]), clip.encode_text(["red " * 30]))


# ── few calls ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prompts", [["red apple"], ["", "an apple on the table", "x" * 100]])
def test_towers_compute_what_the_published_modules_do(byt5, clip, monkeypatch, prompts):
    towers = byt5(prompts).embeddings, clip.encode_text(prompts)
    for network in (byt5, clip):
        assert network.tower is not None
        monkeypatch.setattr(network, "tower", None)
    torch.testing.assert_close(
        towers, (byt5(prompts).embeddings, clip.encode_text(prompts)), atol=1e-5, rtol=1e-5
    )


def test_a_tower_without_copies_computes_the_same(clip):
    packed, plain = (
        TextTower(clip.model, copies)(clip.tokenize(["red apple"])[0]) for copies in (True, False)
    )
    torch.testing.assert_close(plain, packed, atol=1e-5, rtol=1e-5)


def test_autocast_is_obeyed(byt5, clip):
    exact = byt5(["red apple"]).embeddings, clip.encode_text(["red apple"])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = byt5(["red apple"]).embeddings.float(), clip.encode_text(["red apple"]).float()
    for one, other in zip(exact, rounded, strict=True):
        assert 0 < (one - other).abs().max() < 0.1 * one.abs().max()


# ── CLIP's pictures ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [(16, 16), (1, 1), (7, 200), (64, 48)])
def test_pictures_of_any_size_have_an_embedding(clip, size):
    image = torch.rand(2, 3, *size)
    out = clip.encode_image(image)
    assert out.shape == (2, 16)
    assert out.isfinite().all()


def test_a_picture_of_the_right_size_is_not_resampled(clip):
    image = torch.rand(1, 3, 16, 16)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    torch.testing.assert_close(
        clip.encode_image(image), clip.model.encode_image((image - mean) / std)
    )


def test_resizing_keeps_what_a_picture_shows(clip):
    flat = torch.tensor([0.9, 0.1, 0.2]).view(1, 3, 1, 1)
    small, large = (
        clip.encode_image(flat.expand(1, 3, 16, 16)),
        clip.encode_image(flat.expand(1, 3, 50, 90)),
    )
    torch.testing.assert_close(small, large, atol=1e-4, rtol=1e-4)


def test_resampled_pictures_stay_in_range(clip, monkeypatch):
    # Bicubic overshoots at edges.
    seen = []
    monkeypatch.setattr(
        clip.model, "encode_image", lambda image: (seen.append(image), torch.zeros(1, 16))[1]
    )
    clip.encode_image((torch.rand(1, 3, 40, 40) > 0.5).float())
    black, white = (
        [
            (level - m) / s
            for m, s in zip(
                (0.48145466, 0.4578275, 0.40821073),
                (0.26862954, 0.26130258, 0.27577711),
                strict=True,
            )
        ]
        for level in (0, 1)
    )
    low, high = seen[0].amin((0, 2, 3)), seen[0].amax((0, 2, 3))
    assert (low >= torch.tensor(black) - 1e-5).all()
    assert (high <= torch.tensor(white) + 1e-5).all()
