"""The embedded networks at the smallest widths that can be trained, with scenes and art that no
network is needed to fetch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import (
    BundleV3Config,
    ByteEncoderConfig,
    CLIPConfig,
    CLIPVisionConfig,
    PriorConfig,
    VQGANConfig,
)
from model.training import art, corpus, tiny
from model.training.codes import WIDTH
from model.training.data import Scenes
from model.training.kinds import NAMES_OF_KINDS
from tests.conftest import micro_config

SCENES = 200


def small_config() -> BundleV3Config:
    """As tests.conftest.micro_config, but with the widths of the codes, and 16 pixels to a token,
    as scenes have."""
    c = micro_config()
    text = replace(c.clip.text_cfg, context_length=48)
    return replace(
        c,
        native_size=(256, 256),
        vqgan=VQGANConfig(
            levels=4,
            bottleneck_blocks=1,
            c_hidden=16,
            c_latent=4,
            codebook_size=64,
            scale_factor=1.0,
        ),
        byt5=ByteEncoderConfig(
            d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, max_bytes=160
        ),
        clip=CLIPConfig(
            embed_dim=WIDTH,
            vision_cfg=CLIPVisionConfig(image_size=32, width=4, layers=(1, 1, 1, 1), head_width=32),
            text_cfg=text,
            merges=c.clip.merges,
        ),
        prior=PriorConfig(c_hidden=32, c_r=16, clip_r=WIDTH, num_blocks=1),
        denoiser=replace(c.denoiser, byt5_embd=WIDTH, clip_embd=WIDTH),
    )


def use(monkeypatch: pytest.MonkeyPatch, config: BundleV3Config) -> None:
    """Makes these the shapes that trainers train."""
    shapes = {
        "VQGAN": config.vqgan,
        "BYTE_ENCODER": config.byt5,
        "CLIP": config.clip,
        "PRIOR": config.prior,
        "DENOISER": config.denoiser,
        "RECIPE": config.recipe,
        "NATIVE_SIZE": config.native_size,
    }
    for name, shape in shapes.items():
        monkeypatch.setattr(tiny, name, shape)


def drawn_art(side: int = 32) -> torch.Tensor:
    """A sprite for every kind, each a rectangle of its own colour, premultiplied RGBA uint8 [S, 4,
    side, side]."""
    generator = torch.Generator().manual_seed(0)
    sprites = torch.zeros(len(NAMES_OF_KINDS), 4, side, side, dtype=torch.uint8)
    colours = torch.randint(
        256, (len(NAMES_OF_KINDS), 3, 1, 1), generator=generator, dtype=torch.uint8
    )
    sprites[:, :3, 2:-2, 2:-2], sprites[:, 3, 2:-2, 2:-2] = colours, 255
    return sprites


@pytest.fixture(name="art_of_our_own", autouse=True)
def art_of_our_own_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(art, "atlas", drawn_art)


@pytest.fixture(name="corpus_file", scope="session")
def corpus_file_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.safetensors"
    corpus.generate(SCENES, 0, 1).save(path)
    return path


@pytest.fixture(name="scenes")
def scenes_fixture(corpus_file: Path) -> Scenes:
    return Scenes(corpus.load(corpus_file), drawn_art())
