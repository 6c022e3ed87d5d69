"""`Plan`: how to answer a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.canvas import on_white
from model.config import SamplingConfig
from server.api.images.fit import Restoration, Size
from server.engine.job import Job
from server.engine.messages import Image


def _unchanged(image: Image) -> Image:
    return image


@dataclass(frozen=True, slots=True)
class Plan:
    """Describe how to answer a request.

    Attributes:
        operation: name of the native endpoint.
        job: the worker's part. Its size is a multiple of the size step and may exceed `size`.
        size: (width, height) at which the image is drawn, in pixels.
        operation_parameters: effective values of the operation's own fields, files by hash.
        finish: postprocessing, from a generated image or a preview to one of `size`.
        restoration: postprocessing instead, to the sent image's resolution; None if the answer has
            `size`.
        is_transparent: whether the answer's images keep an alpha channel.
        opaque: whether they are shown over white nevertheless.
        prompt_read: what of the prompt is encoded, if the weights leave out a part.
    """

    operation: str
    job: Job
    size: Size
    operation_parameters: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Image], Image] = _unchanged
    restoration: Restoration | None = None
    is_transparent: bool = False
    opaque: bool = False
    prompt_read: str | None = None

    @property
    def answer_size(self) -> Size:
        """(width, height) of the answer's images in pixels."""
        return self.restoration.view.full_size if self.restoration else self.size

    def result(self, image: Image) -> Image:
        """Return the answer's image from a generated one. It may take seconds."""
        if self.restoration is None:
            return self.preview(image)
        return self._shown(Image.of(self.restoration.restored(image.array), image.index))

    def preview(self, image: Image) -> Image:
        """Return an image of `size` from a generated one or a preview."""
        return self._shown(self.finish(image))

    def cropped(self, size: Size | None) -> Plan:
        """Return the plan for the images' middle, with the parameters of the whole images.

        size: (width, height) in pixels; None crops nothing.
        """
        if size is None or size == self.size:
            return self
        (width, height), whole = size, self.size
        left, top = (whole[0] - width) // 2, (whole[1] - height) // 2

        def finish(image: Image) -> Image:
            pixels = self.finish(image).array
            return Image.of(pixels[top : top + height, left : left + width], image.index)

        parameters = {"width": whole[0], "height": whole[1], **self.operation_parameters}
        return replace(self, size=size, operation_parameters=parameters, finish=finish)

    def _shown(self, image: Image) -> Image:
        return Image.of(on_white(image.array), image.index) if self.opaque else image

    def parameters(self, truncated: tuple[str, ...], index: int) -> dict[str, Any]:
        """Return all effective parameters of image `index`; a request for them repeats it."""
        job, sampling = self.job, self.job.sampling
        common = {
            "operation": self.operation,
            "model": job.model,
            "model_sha256": job.model_sha256 or None,
            "preset": sampling.preset,
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "width": self.size[0],
            "height": self.size[1],
            "seed": job.seeds[index],
            "num_inference_steps": sampling.steps,
            "guidance_scale": list(sampling.guidance),
            **_guidance_fields(sampling),
            "temperature": list(sampling.temperature),
            "sampler": sampling.sampler,
            "typical_mass": sampling.typical_mass,
            "renoise_steps": sampling.renoise_steps,
            "renoise_mode": sampling.renoise_mode,
            "renoise_order": sampling.renoise_order,
            "attention_weights": _attention_weights(sampling),
            "deterministic": sampling.deterministic,
        }
        frame = {"frame": index} if job.keyframes else {}
        reading = {} if self.prompt_read is None else {"prompt_read": self.prompt_read}
        truncation = {"truncated": list(truncated)}
        return {**common, **self.operation_parameters, **frame, **reading, **truncation}

    def shared_parameters(self, truncated: tuple[str, ...]) -> dict[str, Any]:
        """Return the effective parameters of all images together."""
        images = 1 if self.job.keyframes else len(self.job.seeds)
        parameters = self.parameters(truncated, 0) | {"n": images}
        parameters.pop("frame", None)
        return parameters


def _guidance_fields(sampling: SamplingConfig) -> dict[str, float]:
    """Return the fields for the steps with guidance: their number, unless others come before."""
    first, steps = sampling.guidance_start, sampling.steps
    if first == 0:
        return {"guidance_steps": sampling.guidance_steps}
    end = (first + sampling.guidance_steps) / steps
    return {"guidance_start": first / steps, "guidance_end": end}


def _attention_weights(sampling: SamplingConfig) -> dict[str, float] | None:
    if sampling.attention_weights is None:
        return None
    text, image = sampling.attention_weights
    return {"text": text, "image": image}
