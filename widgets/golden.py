"""Writes `src/samplers.test.json`: draws by the samplers in Python, which those in TypeScript must repeat.

Run it after `qtx_lab/streams.py` or one of these samplers has changed. Logits are chosen so that every
correct exponential gives the same masses: none lies near the middle between two numbers of its precision.
The exponential of some processors is not the nearest number everywhere, so that others may be chosen there.
"""

from __future__ import annotations

import base64
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtx_lab.samplers import make_sampler
from qtx_lab.samplers.inversion import row_masses
from qtx_lab.streams import Stream, sequence_keys

TARGET = Path(__file__).parent / "src" / "samplers.test.json"

SAMPLERS = ("monte-carlo", "stratified", "systematic", "head-tail")

ROWS = (  # keys, largest logit, masked share, position
    (1, 0.0, 0.0, 0),
    (7, 1.0, 0.0, 3),
    (40, 3.0, 0.5, 63),
    (130, 12.0, 0.0, 129),
    (300, 2.0, 0.1, 4095),
    (1100, 5.0, 0.0, 2**32 + 5),
    (20, 1.0, 1.0, 2),
    (2048, 4.0, 0.25, 2047),
)

MOST_DOUBLES = 150
"""Keys of a row up to which it is written in float64 too."""
BUDGETS = ((1, 1), (16, 1), (33, 2))
"""Draws and replicates."""
LARGE_ROW, LARGE_BUDGETS = 2048, ((64, 1), (512, 1))
"""Keys of the row that is drawn from as often as the slider of a page does, and its draws."""

HALF, MARGIN = Decimal("0.5"), Decimal("0.02")
"""How far the exponential of a logit must be from the middle between two numbers, as a share of their
distance."""


def bits(x: Tensor) -> str:
    """The bytes of a tensor in base64, little-endian."""
    return base64.b64encode(np.ascontiguousarray(x.numpy()).tobytes()).decode()


def tensor(text: str, dtype: str) -> Tensor:
    """The tensor, of one dimension, of which `bits` gave this text."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), f"<f{np.dtype(dtype).itemsize}").copy())


def is_settled(logit: float, mass: float, dtype: np.dtype) -> bool:
    """Whether every correct exponential of a logit rounds to this mass."""
    exact = Decimal(logit).exp()
    nearest = dtype.type(float(exact))
    step = Decimal(float(np.nextafter(nearest, dtype.type(np.inf)))) - Decimal(float(nearest))
    return mass == nearest and abs(abs(exact - Decimal(float(nearest))) / step - HALF) > MARGIN


def settled(logits: Tensor) -> Tensor:
    """Logits near these whose masses every correct exponential rounds alike."""
    x = logits.clone()
    finite = (x > -torch.inf).nonzero().flatten().tolist()
    dtype = np.dtype(str(x.dtype).removeprefix("torch."))
    while finite:
        top = x.max()
        masses = row_masses(x)
        poor = [j for j in finite if not is_settled(float(x[j] - top), float(masses[j]), dtype)]
        if not poor:
            break
        x[poor] = top - (top - x[poor]) * (1 + 2.0**-20)
    return x


def row(keys: int, spread: float, masked: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Logits of a row."""
    logits = spread * torch.randn(keys, generator=generator, dtype=torch.float64).to(dtype)
    logits[torch.rand(keys, generator=generator) < masked] = -torch.inf
    return settled(logits)


def cases(written: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Every row with its draws by every sampler, of the logits in `written`, or of others where None."""
    generator = torch.Generator().manual_seed(0)
    known = iter(written or [])
    listed = []
    for dtype in (torch.float32, torch.float64):
        for number, (keys, spread, masked, position) in enumerate(ROWS):
            if dtype == torch.float64 and keys > MOST_DOUBLES:
                continue
            if written is None:
                logits = row(keys, spread, masked, dtype, generator)
            else:
                one = next(known)
                logits = tensor(one["logits"], one["dtype"])
            key = sequence_keys(2**62 + number, torch.tensor([number]))
            positions = torch.tensor([position])
            stream = Stream(key, torch.tensor([number % 3]), positions)
            draws = []
            for sampler in SAMPLERS:
                for num_samples, replicates in LARGE_BUDGETS if keys == LARGE_ROW else BUDGETS:
                    drawn = make_sampler(sampler).draw_from(
                        stream, logits[None, None], num_samples, replicates=replicates
                    )
                    weights = drawn.weights.flatten()
                    draws.append(
                        {
                            "sampler": sampler,
                            "num_samples": num_samples,
                            "replicates": replicates,
                            "indices": bits(drawn.indices.flatten().to(torch.int16)),
                            "weights": bits(weights if sampler == "head-tail" else weights[:1]),
                        }
                    )
            listed.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "key": f"{int(key) & 2**64 - 1:016x}",
                    "group": number % 3,
                    "position": position,
                    "uniform": bits(stream.uniform(2, 5)[0, 0].flatten()),
                    "logits": bits(logits),
                    "mass": bits(row_masses(logits)),
                    "draws": draws,
                }
            )
    return listed


def source() -> str:
    """The text of the file."""
    return json.dumps({"written_by": "widgets/golden.py", "rows": cases()}, indent=2) + "\n"


if __name__ == "__main__":
    TARGET.write_text(source(), encoding="utf-8")
