"""Old names of `model.rows`."""

from model.rows import AnyCondition, Row, edit, generate, repaint, token_mask, token_weight
from model.rows import PinnedTokens as Kept
from model.rows import RegionBranch as Region
from model.rows import pinned_tokens as kept

__all__ = [
    "AnyCondition",
    "Kept",
    "Region",
    "Row",
    "edit",
    "generate",
    "kept",
    "repaint",
    "token_mask",
    "token_weight",
]
