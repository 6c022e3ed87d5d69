"""Serve the same pipeline and weights with LitServe, batched by whole requests, for comparison.

    python -m load_tests.peer --port 8100

LitServe collects a batch (up to `max_batch_size` requests, waiting up to `batch_timeout`), and
answers all of it when all of it is done. A denoising loop has one size and one step count, so the
requests of a batch that agree in both run together, one such group after the other.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

import litserve
import torch
from fastapi import Request, Response
from torch import Tensor

from model.config import find_bundle
from model.pipeline import Pipeline
from model.runtime import pick_device, pick_dtype, prepare
from server.api.images.encode import encode
from server.engine.messages import Image
from server.settings import Settings

LARGEST_BATCH = 64


@dataclass(frozen=True, slots=True)
class Asked:
    prompt: str
    seed: int
    width: int
    height: int
    steps: int

    @property
    def group(self) -> tuple[int, int, int]:
        return self.width, self.height, self.steps


@dataclass(frozen=True, slots=True)
class Batching:
    """A request to change the batching, so that a search over settings needs one server only."""

    max_batch_size: int
    batch_timeout: float


class PaellaAPI(litserve.LitAPI):  # type: ignore[misc]
    """Paella as a LitServe user would write it, with the pipeline's own `generate`."""

    def setup(self, device: str) -> None:
        settings = Settings()
        prepare(settings.threads)
        where = pick_device(settings.device)
        self.pipeline = Pipeline.load(
            find_bundle(settings.bundles[0]), where, pick_dtype(settings.dtype, where)
        )
        self.pipeline.generate(["warm"], [0], self.pipeline.config.recipe.sampling(steps=2))

    def decode_request(self, request: Request) -> Asked | Batching:
        """Return the body's fields; LitServe reads JSON because of the annotation."""
        if "max_batch_size" in request:
            return Batching(**request)
        return Asked(
            request["prompt"],
            request["seed"],
            request["width"],
            request["height"],
            request["num_inference_steps"],
        )

    def batch(self, inputs: list[Asked | Batching]) -> list[Asked | Batching]:
        return inputs

    def predict(self, batch: list[Asked | Batching]) -> list[Tensor]:
        """Return images in the batch's order, an empty one for a change of the batching."""
        pictures: dict[int, Tensor] = {
            i: self._retune(asked) for i, asked in enumerate(batch) if isinstance(asked, Batching)
        }
        groups: dict[tuple[int, int, int], dict[int, Asked]] = {}
        for i, asked in enumerate(batch):
            if isinstance(asked, Asked):
                groups.setdefault(asked.group, {})[i] = asked
        for group in groups.values():
            pictures |= zip(group, self._generate(group.values()), strict=True)
        return [pictures[i] for i in range(len(batch))]

    def _retune(self, batching: Batching) -> Tensor:
        self.max_batch_size, self.batch_timeout = batching.max_batch_size, batching.batch_timeout
        return torch.empty(0)

    def _generate(self, group: Iterable[Asked]) -> Tensor:
        """Return a group's images, computed together."""
        asked = list(group)
        width, height, steps = asked[0].group
        sampling = self.pipeline.config.recipe.sampling(steps=steps)
        return self.pipeline.generate(
            [a.prompt for a in asked], [a.seed for a in asked], sampling, width=width, height=height
        )

    def unbatch(self, output: list[Tensor]) -> list[Tensor]:
        return output

    def encode_response(self, output: Tensor) -> Response:
        if not output.numel():
            return Response()
        height, width, _ = output.shape
        return Response(
            encode(Image(0, width, height, output.numpy().tobytes()), "png", 0, {}),
            media_type="image/png",
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.peer",
        description="The compared server; POST /predict, GET /health.",
    )
    parser.add_argument("--port", type=int, default=8100)
    port = parser.parse_args().port
    # With one CPU or GPU there is one worker, as the engine has; and no request is dropped for
    # having waited.
    server = litserve.LitServer(
        PaellaAPI(max_batch_size=LARGEST_BATCH, batch_timeout=0.01),
        accelerator="auto",
        devices=1,
        timeout=False,
        disable_openapi_url=True,
    )
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
