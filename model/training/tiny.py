"""Define the sizes of the embedded networks: the published system in small.

256×256 pixels are 16×16 tokens, 8×8 patches, 4×4 cells at the bottom.
"""

from __future__ import annotations

from model.config import Recipe
from model.network_config import (
    ByteEncoderConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    DenoiserConfig,
    PriorConfig,
    VQGANConfig,
)

# Pixels (width, height) that the networks are trained at, mostly.
NATIVE_SIZE = (256, 256)

VQGAN = VQGANConfig(
    levels=4, bottleneck_blocks=3, c_hidden=192, c_latent=8, codebook_size=4096, scale_factor=1.0
)

BYTE_ENCODER = ByteEncoderConfig(
    d_model=192, d_kv=32, d_ff=384, num_layers=3, num_heads=6, max_bytes=160
)

CLIP = CLIPConfig(
    embed_dim=192,
    # Four layers that are one deep are a small residual network: it learns to tell kinds from far
    # fewer pictures than a transformer.
    vision_cfg=CLIPVisionConfig(image_size=64, width=12, layers=(1, 1, 1, 1), head_width=32),
    text_cfg=CLIPTextConfig(
        context_length=48, vocab_size=1792, width=128, heads=4, layers=3, mlp_ratio=2.0
    ),
    merges="clip_merges.txt.gz",
)

PRIOR = PriorConfig(c_hidden=192, c_r=32, clip_r=192, num_blocks=2)

DENOISER = DenoiserConfig(
    byt5_embd=192,
    c_in=48,
    c_out=80,
    num_labels=4096,
    c_r=32,
    patch_size=2,
    c_cond=128,
    c_hidden=(160, 320),
    nhead=(-1, 5),
    blocks=(2, 3),
    level_config=("CT", "CTA"),
    clip_embd=192,
    clip_seq_len=4,
    kernel_size=3,
    self_attn=True,
)

RECIPE = Recipe(
    num_inference_steps=8,
    renoise_steps=8,
    guidance_scale=(2.0, 2.0),
    guidance_steps=8,
    temperature=(0.5, 0.2),
    prior_steps=4,
    prior_guidance=2.0,
    prior_temperature=0.0,
    averaged_start=True,
)
