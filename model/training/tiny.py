"""The shapes of the embedded networks: the published system in small. 128×128 pixels are 16×16 tokens, 8×8 patches, 4×4 at the bottom."""

from __future__ import annotations

from model.config import ByteEncoderConfig, CLIPConfig, DenoiserConfig, PriorConfig, Recipe, VQGANConfig

# Pixels (width, height) that the networks are trained at.
NATIVE_SIZE = (128, 128)

VQGAN = VQGANConfig(levels=3, bottleneck_blocks=3, c_hidden=96, c_latent=4, codebook_size=1024, scale_factor=1.0)

BYTE_ENCODER = ByteEncoderConfig(d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, max_bytes=160)

CLIP = CLIPConfig(
    embed_dim=128,
    vision_cfg={"image_size": 64, "patch_size": 8, "width": 128, "layers": 3, "head_width": 32, "mlp_ratio": 2.0},
    text_cfg={"context_length": 48, "vocab_size": 1024, "width": 128, "heads": 4, "layers": 3, "mlp_ratio": 2.0},
    merges="clip_merges.txt.gz",
)

PRIOR = PriorConfig(c_hidden=128, c_r=32, clip_r=128, num_blocks=4)

DENOISER = DenoiserConfig(
    byt5_embd=128,
    c_in=64,
    c_out=64,
    num_labels=1024,
    c_r=64,
    patch_size=2,
    c_cond=128,
    c_hidden=(128, 256),
    nhead=(-1, 4),
    blocks=(2, 2),
    level_config=("CT", "CTA"),
    clip_embd=128,
    clip_seq_len=4,
    kernel_size=3,
    self_attn=True,
)

RECIPE = Recipe(
    num_inference_steps=12,
    renoise_steps=11,
    # Chosen among nine on 180 prompts that are not those of the evaluation (docs/log.md).
    guidance_scale=(3.0, 3.0),
    guidance_steps=12,
    temperature=(0.5, 0.2),
    prior_steps=4,
    prior_guidance=2.0,
)
