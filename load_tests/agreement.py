"""Measure how much a batch changes its images where the request is not deterministic.

    python -m load_tests.agreement --seeds 16

The figure is the share of tokens that are the same alone and in a batch. A batch's products may
round differently from a single row's, guidance and low temperatures amplify that, and one token
that falls to the other side of a boundary changes the input of its neighbours in all later steps.
Every seed is drawn alone and then in batches of 2, 3 and 8 rows with prompts of their own. The
`PAELLERA_*` variables apply as they do to the server; the last line is JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

import torch
from rich.table import Table
from torch import Tensor

from load_tests.prompts import prompts
from load_tests.report import Report
from model.config import find_bundle
from model.pipeline import Pipeline
from model.runtime import pick_device, pick_dtype, prepare
from server.settings import Settings

BATCHES = (2, 3, 8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print. Raises the errors of loading the bundle."""
    sent = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.agreement",
        description="Tokens that company changes; the last line is JSON.",
    )
    parser.add_argument("--seeds", type=int, default=16, help="pictures, 16 by default")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the weights' own")
    options = parser.parse_args(sent)
    report, settings = (
        Report("agreement", command=shlex.join(["python", "-m", "load_tests.agreement", *sent])),
        Settings(),
    )
    prepare(settings.threads)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    pipeline = Pipeline.load(find_bundle(settings.bundles[0]), device, dtype)
    texts = [text for text, _ in zip(prompts(), range(options.seeds), strict=False)]
    alone = torch.cat(
        [draw(pipeline, [text], [seed], options.steps) for seed, text in enumerate(texts)]
    )
    agreement = {
        str(rows): _agreement(pipeline, texts, alone, rows, options.steps) for rows in BATCHES
    }
    report.add(_table(agreement))
    report.emit(
        {
            "weights": pipeline.config.name,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "agreement": agreement,
        }
    )


def draw(
    pipeline: Pipeline, texts: Sequence[str], seeds: Sequence[int], steps: int | None = None
) -> Tensor:
    """Return the tokens [B, H, W] of images that share every stage."""
    return pipeline.generate_tokens(
        texts, seeds, pipeline.config.recipe.sampling(steps=steps)
    ).cpu()


def _agreement(
    pipeline: Pipeline, texts: Sequence[str], alone: Tensor, rows: int, steps: int | None
) -> dict[str, float]:
    """Return the agreement of images alone and in batches of `rows`.

    Shares of equal tokens, on average and of the worst image, and the share of equal images.
    """
    seeds = range(len(texts))
    groups = [seeds[i : i + rows] for i in range(0, len(seeds), rows)]
    together = torch.cat(
        [draw(pipeline, [texts[i] for i in group], group, steps) for group in groups]
    )
    same = (together == alone).flatten(1).float().mean(1)
    return {
        "mean": round(float(same.mean()), 4),
        "worst": round(float(same.min()), 4),
        "identical": round(float((same == 1).float().mean()), 4),
    }


def _table(agreement: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Tokens that are the same as alone", title_justify="left")
    for column in ("rows", "mean picture", "worst picture", "pictures unchanged"):
        table.add_column(column, justify="right")
    for rows, figures in agreement.items():
        table.add_row(rows, *(f"{share:.1%}" for share in figures.values()))
    return table


if __name__ == "__main__":
    main()
