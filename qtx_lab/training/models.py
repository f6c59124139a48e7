"""The language models that a training can start from, by name."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import unknown_name
from ..models.reference import ReferenceConfig, ReferenceModel, load_reference_model

MODELS: dict[str, ReferenceConfig | None] = {
    "reference": None,
    "reference-untrained": ReferenceConfig(),
    "small": ReferenceConfig(layers=2, width=32, heads=4, head_dim=8, mlp_width=64),
    "100m": ReferenceConfig(
        context=2048, layers=16, width=768, heads=12, kv_heads=4, head_dim=64, mlp_width=2048
    ),
}
"""The shape of each model with random weights; None for the shipped one, which is trained already."""


def make_model(name: str, seed: int = 0) -> nn.Module:
    """A model of `MODELS`, ready to train: the shipped one, or one with random weights of this seed.

    Raises
    ------
    ArgumentError
        If there is no model of that name.
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    config = MODELS[name]
    if config is None:
        return load_reference_model().train()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return ReferenceModel(config).train()
