"""Train CLIP's towers on captioned scenes: both learn to predict the codes of `codes.py`.

    python -m model.training.clip --minutes 15

The text tower learns the codes of captions, the image tower those of images. A caption's code and
its image's code are mostly the same, so the towers match without being compared. The text tower's
vocabulary is learnt first, from captions.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.bundle import load_v3
from model.config import find_bundle
from model.networks.text_encoders import CLIP, PIXEL_STATISTICS
from model.training import command, loop, tiny
from model.training.checkpoint import averaged
from model.training.codes import KIND_WIDTH, Codes
from model.training.data import Scenes

_SPECIAL = 2 * 256 + 2  # open_clip's bytes, bytes at a word's end, start mark and end mark
# Scaled-down images are kept and used again with other captions; before every step some are
# rendered anew.
_KEPT, _RENEWED = 16, 0.25  # batches; share of a batch
_LEARNT_FROM = 20_000  # captions, for the vocabulary
_KIND_SHARE = 0.3  # weight of the kind's cross-entropy
_KIND_SCALE = 1 / 8  # of its logits
_CLEAR = 0.8  # likeness to a kind's own vector from which a code counts as that kind


def learn_merges(path: Path, vocabulary: int, captions: Iterable[str]) -> None:
    """Write the byte-pair merges of captions in the format of open_clip's tokenizer.

    That is a gzipped text: a header, then one pair a line. vocabulary: the number of tokens in all,
    open_clip's own among them. Raises ImportError without tokenizers.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer counts its own alphabet of letters into the size it is given, so it is asked for
    # more merges than are kept.
    trainer = trainers.BpeTrainer(
        vocab_size=2 * vocabulary, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    folder = path.parent / "merges"
    folder.mkdir(parents=True, exist_ok=True)
    merges_file = Path(tokenizer.model.save(str(folder))[1])
    merges = merges_file.read_text().splitlines()[1 : 1 + vocabulary - _SPECIAL]
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges]).encode(), mtime=0))


def tokenize(clip: CLIP, scenes: Scenes) -> Tensor:
    """Return the tokens of all captions, int16 [N, C, context], as `clip.tokenize` gives them.

    Every word is looked up once.
    """
    text, length = scenes.corpus.text.cpu().numpy(), scenes.corpus.length.cpu().numpy()
    N, C, _ = text.shape
    tokenizer, context = clip.tokenizer, clip.config.context_length
    first, last = tokenizer.sot_token_id, tokenizer.eot_token_id
    known: dict[str, list[int]] = {}
    tokens = torch.zeros(N * C, context, dtype=torch.int16)
    rows = tokens.numpy()
    for row, (line, count) in enumerate(
        zip(text.reshape(N * C, -1), length.reshape(-1).tolist(), strict=True)
    ):
        caption = line[:count].tobytes().decode(errors="replace")
        if (
            caption.isascii() and "&" not in caption
        ):  # the tokenizer's pattern spans no space, and its cleaning changes nothing here
            numbers = [first]
            for word in caption.lower().split():
                if word not in known:
                    known[word] = tokenizer.encode(word)
                numbers += known[word]
        else:
            numbers = [first, *tokenizer.encode(caption)]
        numbers = numbers[: context - 1]
        rows[row, : len(numbers)] = numbers
        rows[row, len(numbers)] = last
    return tokens.view(N, C, context)


def encode_tokens(clip: CLIP, tokens: Tensor, longest: int) -> Tensor:
    """Return the embeddings [B, D] that `clip.model.encode_text` gives for tokens [B, context].

    longest: no caption has more tokens; the columns behind are not computed.
    """
    model, tokens = clip.model, tokens[:, :longest].long()
    x = model.token_embedding(tokens) + model.positional_embedding[:longest]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:longest, :longest]))
    return x[torch.arange(len(x), device=x.device), tokens.argmax(-1)] @ model.text_projection


def found(image: Tensor, text: Tensor) -> Tensor:
    """Return the share of images that find their caption among all, by embeddings [B, D]."""
    likeness = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
    return (likeness.argmax(-1) == torch.arange(len(image), device=image.device)).float().mean()


class Thumbnails:
    """A pool of images at the size of CLIP's image tower, and the numbers of their scenes.

    pixels: uint8 [capacity, 3, S, S]. index: [capacity]. members: the scenes to draw, by aspect.
    """

    def __init__(self, clip: CLIP, scenes: Scenes, batch: int, members: tuple[Tensor, ...]) -> None:
        self.clip = clip
        self.scenes = scenes
        self.members = members
        self.batch = batch
        self.count = max(1, round(_RENEWED * batch))
        S, device = clip.image_size, scenes.device
        self.capacity = _KEPT * batch
        self.pixels = torch.zeros(
            self.capacity, 3, S, S, dtype=torch.uint8, device=device
        ).contiguous(memory_format=torch.channels_last)
        self.index = torch.zeros(self.capacity, dtype=torch.long, device=device)
        self._next = 0
        self.mean, self.std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in PIXEL_STATISTICS
        )
        for _ in range(-(-self.capacity // self.count)):
            self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Replace the oldest images by new ones, mostly square as in the corpus."""
        weights = [len(own) for own in self.members]
        aspect = int(torch.multinomial(torch.tensor(weights, dtype=torch.float), 1))
        index, _ = self.scenes.some(self.count, self.members[aspect])
        place = (
            torch.arange(self._next, self._next + self.count, device=index.device) % self.capacity
        )
        scaled = self.clip.scale(self.scenes.small_images(index, aspect))
        self.pixels[place], self.index[place] = scaled.mul(255).round().to(torch.uint8), index
        self._next = (self._next + self.count) % self.capacity

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return images [B, 3, S, S] for the image tower, and their scenes' numbers [B]."""
        chosen = (torch.rand(self.batch, device=self.index.device) * self.capacity).long()
        return (self.pixels[chosen].float() / 255 - self.mean) / self.std, self.index[chosen]


def tower_loss(said: Tensor, code: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Return the loss of embeddings [B, D] against codes [B, D], and the accuracy of the kind.

    The loss is the squared distance, plus the cross-entropy of the kind with the largest share.
    """
    said = said.float()
    wanted = code[:, :KIND_WIDTH]
    likeness = wanted @ codes.kinds.T
    best = likeness.max(-1)
    clear = (
        best.values > _CLEAR * KIND_WIDTH
    ).float()  # not where several kinds are mixed, nor where nothing is there
    logits = said[:, :KIND_WIDTH] @ codes.kinds.T * _KIND_SCALE
    errors = F.cross_entropy(logits, best.indices, reduction="none")
    right = ((logits.argmax(-1) == best.indices) * clear).sum() / clear.sum().clamp_min(1)
    return F.mse_loss(said, code) + _KIND_SHARE * (errors * clear).mean(), right


def pair_loss(
    clip: CLIP, scenes: Scenes, codes: Codes, index: Tensor, image: Tensor | None, longest: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (the objective, figures) for scenes [B], each with one of its captions.

    image: their images [B, 3, S, S] as the image tower takes them; None trains the text tower
    alone. longest: no caption has more tokens. Raises ValueError if the captions' tokens are not
    known.
    """
    if scenes.clip_tokens is None:
        raise ValueError("the captions' tokens are not known")
    which = (torch.rand(len(index), device=index.device) * scenes.corpus.text.shape[1]).long()
    said = encode_tokens(clip, scenes.clip_tokens[index, which], longest)
    loss, read = tower_loss(said, codes.text(index, which), codes)
    if image is None:
        return loss, {"text": read}
    shown = clip.model.encode_image(image)
    seen_loss, seen = tower_loss(shown, codes.images(index), codes)
    return loss + seen_loss, {
        "image": seen,
        "text": read,
        "found": found(shown.detach(), said.detach()),
    }


@torch.no_grad()
def retrieval(clip: CLIP, scenes: Scenes, index: Tensor, among: int = 256) -> float:
    """Return how often an image finds its own caption among `among`, over square scenes [N].

    Raises ValueError if the captions' tokens are not known.
    """
    if scenes.clip_tokens is None:
        raise ValueError("the captions' tokens are not known")
    shares = []
    for part in index.split(among):
        image = torch.cat([clip.encode_image(scenes.images(few)) for few in part.split(32)])
        shares.append(found(image, clip.model.encode_text(scenes.clip_tokens[part, 0].long())))
    return float(sum(shares)) / len(shares)


def matrices(module: nn.Module) -> list[str]:
    """Return the names of the text layers' maps, for Muon."""
    return [name for name, p in module.named_parameters() if p.ndim == 2 and ".resblocks." in name]


def train(
    clip: CLIP, scenes: Scenes, o: loop.Options, held_out: int = 1000, *, text_only: bool = False
) -> CLIP:
    """Train until the budget is spent, and return the averaged towers.

    scenes: with the captions' tokens. held_out: the number of scenes at the corpus's end that are
    not trained on. text_only: leave the image tower as it is. Raises ValueError if the captions'
    tokens are not known.
    """
    clip.train()
    clip.model.visual.to(memory_format=torch.channels_last)
    if scenes.clip_tokens is None:
        raise ValueError("the captions' tokens are not known")
    bound = max(len(scenes.corpus) - held_out, 1)
    codes, longest = Codes(scenes.corpus), int(scenes.clip_tokens.argmax(-1).max()) + 1
    if text_only:
        clip.model.visual.requires_grad_(False)
        among = torch.arange(bound, device=scenes.device)

        def read() -> tuple[Tensor, dict[str, Tensor]]:
            return pair_loss(clip, scenes, codes, scenes.some(o.batch, among)[0], None, longest)

        trained: CLIP = loop.fit(clip, read, o, matrices=matrices(clip)).eval()  # type: ignore[assignment]
        return trained
    thumbnails = Thumbnails(
        clip, scenes, o.batch, tuple(own[own < bound] for own in scenes.of_aspect)
    )

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        image, index = thumbnails.draw()
        return pair_loss(clip, scenes, codes, index, image, longest)

    trained = loop.fit(clip, loss, o, matrices=matrices(clip), before=thumbnails.renew).eval()  # type: ignore[assignment]
    return trained


def with_tokens(scenes: Scenes, clip: CLIP) -> Scenes:
    """Return the scenes with their captions' tokens."""
    return loop.replace(scenes, clip_tokens=tokenize(clip, scenes).to(scenes.device))


def main() -> None:
    """Train as the command line says, and print the share of images found among 256."""
    p = loop.parser(__doc__, name="clip", batch=128, lr=1e-3, minutes=15)
    p.add_argument(
        "--from-bundle",
        metavar="BUNDLE",
        help="name or path of the bundle whose pair and vocabulary to go on with",
    )
    p.add_argument(
        "--start", type=Path, help="checkpoint of this trainer whose averaged weights to begin with"
    )
    p.add_argument(
        "--text-only",
        action="store_true",
        help="leave the image tower as it is, and draw no images",
    )
    args = p.parse_args()
    o = loop.options(args)
    scenes = Scenes.load(args.corpus, o.device, o.seed, images=not args.text_only)
    merges = o.checkpoint.parent / str(tiny.CLIP.merges)
    kept = find_bundle(args.from_bundle) if args.from_bundle else None
    if kept is not None:
        merges.parent.mkdir(parents=True, exist_ok=True)
        merges.write_bytes((kept / str(tiny.CLIP.merges)).read_bytes())
    elif not merges.exists():
        learn_merges(merges, tiny.CLIP.text_cfg.vocab_size, scenes.captions(_LEARNT_FROM))
    clip = CLIP(tiny.CLIP, o.checkpoint.parent)
    if kept is not None:
        clip.load_state_dict(load_v3(kept, torch.device("cpu"), torch.float32).clip.state_dict())
    if args.start is not None:
        clip.load_state_dict(averaged(loop.load(args.start), ""))
    scenes = with_tokens(scenes, clip)
    trained = train(clip.to(o.device), scenes, o, text_only=args.text_only)
    if loop.rank() == 0 and not args.text_only:
        print(f"found among 256: {retrieval(trained, scenes, scenes.of_aspect[0][-256:]):.3f}")


if __name__ == "__main__":
    command.run(main)
