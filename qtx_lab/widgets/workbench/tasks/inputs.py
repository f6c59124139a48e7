"""`load_inputs`: what attention is computed from, as the bar at the top of the workbench describes it."""

from __future__ import annotations

from functools import lru_cache

from ....models.inputs import AttentionInputs, attention_inputs
from ....models.text import read_text


@lru_cache(maxsize=2)
def load_inputs(model: str, text: str | None, num_tokens: int, prompt: str | None = None) -> AttentionInputs:
    """The attention inputs of a model for a text; those that were asked for last are kept.

    Parameters
    ----------
    model : str
        As for `attention_inputs`.
    text : str or None
        "reference", or a UTF-8 file; None where a prompt takes its place.
    num_tokens : int
        Length of the text's beginning that is used.
    prompt : str, optional
        A text that was typed.

    Raises
    ------
    ArgumentError
        As `attention_inputs`.
    """
    words = prompt if text is None else None if text == "reference" else read_text(text)
    return attention_inputs(model, words, num_tokens)
