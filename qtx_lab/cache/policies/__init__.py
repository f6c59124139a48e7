"""Policies of sparse decoding: one exact prompt, then one method or another, on equal terms."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ...errors import unknown_name
from .base import CachePolicy, LayerCache, LayerPrompt, Reads
from .evictions import H2OPolicy, SnapKVPolicy
from .exact import ExactPolicy
from .exact_logits import SamplerPolicy, TopKPolicy
from .magicpig import MagicPIGPolicy
from .pqcache import PQCachePolicy
from .quest import QuestPolicy
from .sampled import SampledPolicy
from .santa import SantaPolicy
from .sink_window import SinkWindowPolicy
from .vattention import VAttentionPolicy

POLICIES: dict[str, type[CachePolicy]] = {
    policy.name: policy
    for policy in (
        ExactPolicy,
        SampledPolicy,
        SamplerPolicy,
        SinkWindowPolicy,
        TopKPolicy,
        QuestPolicy,
        PQCachePolicy,
        MagicPIGPolicy,
        VAttentionPolicy,
        SantaPolicy,
        H2OPolicy,
        SnapKVPolicy,
    )
}
"""Every policy by name."""


def make_policy(name: str, **settings: Any) -> CachePolicy:
    """The policy of that name.

    Parameters
    ----------
    name : str
        One of `POLICIES`.
    **settings
        Those of the policy, `budget` and `seed` among them.

    Raises
    ------
    ArgumentError
        If no policy has that name, or it has no such setting, or a setting is not allowed.

    Examples
    --------
    Sixty-four of the keys of a prompt with 128 tokens, and what that reads:

    >>> import torch
    >>> q, k, v = (torch.randn(1, heads, 128, 16) for heads in (4, 2, 2))
    >>> cache = make_policy("sink-window", budget=0.5).start(0, q, k, v)
    >>> cache.append(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16))
    >>> cache.attend(torch.randn(1, 4, 1, 16)).shape, round(cache.reads.bytes, 3)
    (torch.Size([1, 4, 1, 16]), 0.496)
    """
    if name not in POLICIES:
        raise unknown_name("name", name, POLICIES)
    allowed = [field.name for field in fields(POLICIES[name])]
    for setting in settings:
        if setting not in allowed:
            raise unknown_name(f"setting of {name}", setting, allowed)
    return POLICIES[name](**settings)


__all__ = [
    "POLICIES",
    "CachePolicy",
    "ExactPolicy",
    "H2OPolicy",
    "LayerCache",
    "LayerPrompt",
    "MagicPIGPolicy",
    "PQCachePolicy",
    "QuestPolicy",
    "Reads",
    "SampledPolicy",
    "SamplerPolicy",
    "SantaPolicy",
    "SinkWindowPolicy",
    "SnapKVPolicy",
    "TopKPolicy",
    "VAttentionPolicy",
    "make_policy",
]
