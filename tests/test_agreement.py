"""The command that says how much a picture changes with its company says it, in shares of
tokens.
"""

from __future__ import annotations

import json

import pytest
import torch

from load_tests import agreement

pytestmark = pytest.mark.heavy


def test_it_ends_in_one_line_of_shares_for_every_batch(random_bundle, monkeypatch, capsys):
    monkeypatch.setenv("PAELLERA_WEIGHTS", str(random_bundle))
    monkeypatch.setenv("PAELLERA_DTYPE", "float32")
    agreement.main(["--seeds", "4", "--steps", "2"])
    shares = json.loads(capsys.readouterr().out.splitlines()[-1])["agreement"]
    assert list(shares) == [str(rows) for rows in agreement.BATCHES]
    for each in shares.values():
        assert 0.5 < each["worst"] <= each["mean"] <= 1


def test_other_seeds_hardly_agree(pipeline):
    one, other = (
        agreement.draw(pipeline, ["red apple"] * 4, range(first, first + 4), 2) for first in (0, 4)
    )
    assert torch.equal(one, agreement.draw(pipeline, ["red apple"] * 4, range(4), 2))
    assert (one == other).float().mean() < 0.5
