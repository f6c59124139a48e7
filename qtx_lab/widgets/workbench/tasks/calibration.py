"""The task `calibrate`: the cheapest draws of each layer that keep a language model's loss within a bound."""

from __future__ import annotations

from typing import Any

from ....models.calibration import calibrate as find_settings
from ....models.language_model import load_language_model
from ....models.text import read_text, reference_text
from ..process_server import TaskReport


def calibrate(
    report: TaskReport, model: str, text: str, max_loss: float, length: int, windows: int, seed: int
) -> dict[str, Any]:
    """Find settings on a part of a text, and verify them on the rest.

    Returns
    -------
    dict
        `Calibration.to_dict`, and `summary` in words.
    """
    report(0.0, "loading the model")
    words = reference_text() if text == "reference" else read_text(text)
    best = find_settings(
        load_language_model(model), words, max_loss, length=length, windows=windows, seed=seed,
        progress=lambda share: report(share, "measuring what settings cost"),
    )  # fmt: skip
    return {**best.to_dict(), "summary": str(best)}
