"""One block of the prior in plain operators; `model.kernels.triton.prior_block` computes the same in three kernels.

Letters: B rows, D channels of the residual stream, I inner channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BlockWeights(NamedTuple):
    """A block's weights, without the parts of its first projection that read text and time. Letters: D c_hidden, I inner channels.

    first: [D, I], a view by columns. scale, shift: [I], of the first layer norm; last: [D, I]; last_scale, last_shift: [D].
    """

    first: Tensor
    scale: Tensor
    shift: Tensor
    last: Tensor
    last_scale: Tensor
    last_shift: Tensor


def plain_block(h: Tensor, extra: Tensor, w: BlockWeights) -> Tensor:
    """Compute a block: h [B, D], and the text's and time's part [B, I] → [B, D]."""
    y = torch.addmm(extra, h, w.first)
    y = F.gelu(F.layer_norm(y, y.shape[-1:], w.scale, w.shift))
    return h + F.layer_norm(F.linear(y, w.last), h.shape[-1:], w.last_scale, w.last_shift)


# What computes one block: h [B, D], the text's and time's part [B, I], its weights → [B, D].
BlockFn = Callable[[Tensor, Tensor, BlockWeights], Tensor]
