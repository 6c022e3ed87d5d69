"""Train the prior to turn the code of a caption into that of its image (codes.py).

    python -m model.training.prior --minutes 6

CLIP's towers learn to predict these codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.bundle import load_v3
from model.config import find_bundle
from model.networks.prior import Prior, add_noise
from model.training import command, loop, tiny
from model.training.codes import Codes
from model.training.data import Scenes

_UNCONDITIONAL = 0.1
# The text tower is not as exact as the codes that it learns: noise up to this deviation.
_NOISE = 0.4
_BATCH = 512


def diffusion_loss(prior: Prior, clip_text: Tensor, clip_image: Tensor) -> Tensor:
    """Return the squared error of the predicted noise, for embeddings [B, D].

    A tenth of the texts are blanked, for guidance.
    """
    t = torch.rand(len(clip_image), device=clip_image.device)
    noise = torch.randn_like(clip_image)
    text = clip_text * (torch.rand_like(t) >= _UNCONDITIONAL)[:, None]
    return F.mse_loss(prior(add_noise(clip_image, t, noise), t, text).float(), noise)


def train(prior: Prior, scenes: Scenes, o: loop.Options, held_out: int = 1000) -> Prior:
    """Train until the budget is spent, and return the averaged prior.

    held_out: the number of scenes at the corpus's end that are not trained on.
    """
    codes = Codes(scenes.corpus)
    among = torch.arange(max(len(scenes.corpus) - held_out, 1), device=scenes.device)

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        index, which = scenes.some(o.batch, among)
        text = codes.text(index, which)
        text = text + _NOISE * torch.rand(len(text), 1, device=text.device) * torch.randn_like(text)
        return diffusion_loss(prior, text, codes.images(index)), {}

    trained: Prior = loop.fit(prior, loss, o).eval()  # type: ignore[assignment]
    return trained


@torch.no_grad()
def likeness(
    prior: Prior, scenes: Scenes, index: Tensor, guidance: float = 2.0, steps: int = 4
) -> dict[str, float]:
    """Return how close the prior's results are to the images' codes, over scenes [N].

    `cosine` is the mean cosine; `nearest` is how often the own image's code is the nearest of all.
    """
    from model.networks.prior import sample

    codes = Codes(scenes.corpus)
    text, image = codes.text(index, torch.zeros_like(index)), codes.images(index)
    imagined = sample(
        prior, text, torch.randn(steps + 1, *text.shape, device=text.device), guidance=guidance
    )
    cosines = F.normalize(imagined, dim=-1) @ F.normalize(image, dim=-1).T
    nearest = cosines.argmax(-1) == torch.arange(len(text), device=text.device)
    return {"cosine": float(cosines.diag().mean()), "nearest": float(nearest.float().mean())}


def main() -> None:
    """Train as the command line says, and print the likeness on held-out scenes."""
    p = loop.parser(__doc__, name="prior", batch=_BATCH, lr=1e-3, minutes=6)
    p.add_argument(
        "--from-bundle",
        metavar="BUNDLE",
        help="name or path of the bundle whose prior to go on with",
    )
    args = p.parse_args()
    o = loop.options(args)
    prior = Prior(tiny.PRIOR)
    if args.from_bundle:
        prior.load_state_dict(
            load_v3(
                find_bundle(args.from_bundle), torch.device("cpu"), torch.float32
            ).prior.state_dict()
        )
    scenes = Scenes.load(args.corpus, o.device, o.seed, images=False)
    trained = train(prior.to(o.device), scenes, o)
    if loop.rank() == 0:
        print(
            likeness(
                trained,
                scenes,
                torch.arange(max(len(scenes.corpus) - 512, 0), len(scenes.corpus), device=o.device),
            )
        )


if __name__ == "__main__":
    command.run(main)
