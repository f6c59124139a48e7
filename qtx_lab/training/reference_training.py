"""How the shipped reference model is made: its text, the split, the training and the model card."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..checks import check_count, check_flags
from ..errors import StorageError
from ..models.reference import ReferenceConfig, ReferenceModel, bits_per_byte
from ..models.text import encode
from ..storage import write_tensors
from .loop import run_steps

SHARED_WINDOW = 64
"""A passage of so many characters that the held-out text has too is cut from the training text."""


def split_topics() -> tuple[str, str]:
    """(training, held-out) text of this Python's `pydoc_data.topics`: sorted topics, the last tenth held out.

    The manual repeats itself, so passages that are in both parts are cut from the training text.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = text.index("\n\n", len(text) * 9 // 10) + 2
    return without_shared(text[:cut], text[cut:]), text[cut:]


def without_shared(text: str, other: str, window: int = SHARED_WINDOW) -> str:
    """`text` without the characters of every passage of `window` characters that is also in `other`."""
    passages = {other[i : i + window] for i in range(len(other) - window + 1)}
    keep = bytearray(b"\1" * len(text))
    for i in range(len(text) - window + 1):
        if text[i : i + window] in passages:
            keep[i : i + window] = bytes(window)
    return "".join(itertools.compress(text, keep))


def train_reference(
    out: str | Path,
    *,
    steps: int = 1500,
    batch: int = 4,
    dropout: float = 0.1,
    seed: int = 0,
    config: ReferenceConfig | None = None,
    progress: bool = True,
) -> dict:
    """Train a reference model and write `model.safetensors`, `heldout.txt` and a model card to `out`.

    Muon (Jordan et al. 2024) for the matrices, AdamW for the rest; the learning rate warms up for 50 steps,
    stays, and falls to 0 over the last half of the steps.

    Parameters
    ----------
    out : path
        The folder, which is made if need be.
    steps : int
        Steps of the optimizers.
    batch : int
        Windows of text in a step.
    dropout : float
        Probability of dropout while training.
    seed : int
        Decides the initial weights, the dropout and the order of the windows.
    config : ReferenceConfig, optional
        Shape of the model; that of the shipped one where None.
    progress : bool
        Show a bar with the time left.

    Returns
    -------
    dict
        `bits_per_byte`, `standard_error`, `parameters`, `steps`, `seconds`.

    Raises
    ------
    ArgumentError, StorageError
        Before training: if steps or batch is below 1, or if `out` cannot be written.
    """
    check_flags(progress=progress)
    steps, batch = check_count("steps", steps), check_count("batch", batch)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "heldout.txt").touch()
    except OSError as error:
        raise StorageError(f"out={str(out)!r} cannot be written: {error.strerror}.") from error

    config = config or ReferenceConfig()
    training_text, heldout_text = split_topics()
    torch.manual_seed(seed)  # of initial weights and dropout
    model = ReferenceModel(replace(config, dropout=dropout)).train()
    started = time.monotonic()
    _train(model, encode(training_text), steps, batch, torch.Generator().manual_seed(seed), progress)
    seconds = time.monotonic() - started

    shipped = ReferenceModel(replace(config, dropout=0.0)).eval()
    shipped.load_state_dict({name: p.half().float() for name, p in model.state_dict().items()})
    bits = bits_per_byte(shipped, encode(heldout_text))
    result = {
        "bits_per_byte": bits.mean().item(),
        "standard_error": (bits.std() / math.sqrt(len(bits))).item(),
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "steps": steps,
        "seconds": seconds,
    }
    (out / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    write_tensors(
        out / "model.safetensors",
        {name: p.half() for name, p in shipped.state_dict().items()},
        {"config": json.dumps(asdict(shipped.config))},
    )
    card = model_card(shipped, result, training_text, heldout_text, batch, dropout, seed)
    (out / "README.md").write_text(card, encoding="utf-8")
    return result


def _train(
    model: ReferenceModel,
    training: torch.Tensor,
    steps: int,
    batch: int,
    generator: torch.Generator,
    progress: bool,
) -> None:
    """Train a model in place on random windows of the text's bytes."""
    context = model.config.context
    bar = tqdm(total=steps, desc="training", unit="step", disable=not progress)

    def gradient(step: int) -> float:
        starts = torch.randint(len(training) - context, (batch, 1), generator=generator)
        windows = training[starts + torch.arange(context + 1)]
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        torch.autograd.backward(loss)
        return loss.item()

    def after(step: int, loss: float, norm: float) -> bool:
        bar.set_postfix(bits_per_byte=f"{loss / math.log(2):.3f}", refresh=False)
        bar.update()
        return False

    def rate(step: int) -> float:
        return min(1, (step + 1) / 50, 2 * (1 - step / steps))

    with bar:
        run_steps(
            range(steps),
            gradient,
            list(model.parameters()),
            _optimizers(model),
            rate=rate,
            clip_norm=1.0,
            after=after,
        )


def _optimizers(model: ReferenceModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all other parameters."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon([{"params": matrices, "peak_lr": 0.02}], lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [{"params": rest, "peak_lr": 3e-3}], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0
    )
    return [muon, adamw]


def model_card(
    model: ReferenceModel,
    result: dict,
    training_text: str,
    heldout_text: str,
    batch: int,
    dropout: float,
    seed: int,
) -> str:
    """The README.md beside the weights."""
    c = model.config
    digest = hashlib.sha256(training_text.encode()).hexdigest()
    rows = {
        "held-out bits per byte": (
            f"{result['bits_per_byte']:.3f} ± {result['standard_error']:.3f} (exact attention, windows of "
            f"{c.context} bytes, standard error over windows)"
        ),
        "parameters": f"{result['parameters']:,} (float16, `model.safetensors`)",
        "shape": (
            f"{c.layers} layers, width {c.width}, {c.heads} query heads on {c.kv_heads} key heads of "
            f"{c.head_dim}, SwiGLU {c.mlp_width}, rotary positions, RMS norm, tied embedding"
        ),
        "context": f"{c.context} bytes",
        "data": (
            f"`pydoc_data.topics` of Python {platform.python_version()}: topics in the order of their "
            "names, joined by blank lines; last tenth held out"
        ),
        "training text": (
            f"{len(training_text.encode()):,} bytes, passages of {SHARED_WINDOW} characters that the "
            f"held-out text has too removed; sha256 {digest}"
        ),
        "held-out text": f"{len(heldout_text.encode()):,} bytes, `heldout.txt`",
        "training": (
            f"{result['steps']} steps of {batch} × {c.context} bytes, Muon and AdamW, dropout {dropout}, "
            f"seed {seed}, {result['seconds'] / 60:.0f} minutes on {torch.get_num_threads()} threads, torch "
            f"{torch.__version__.split('+')[0]}"
        ),
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return f"""# The reference model

A causal byte-level transformer, small enough to ship and to run anywhere, trained so that the figures of
the lab are about attention that was learned. It is not meant for anything else; it knows one manual.

| | |
|---|---|
{table}

`qtx-lab train --preset reference --out DIR` makes it again under the same Python: the topics change from
version to version, and sums in another order change the last digits.

**Licence.** The text is Python's documentation, © Python Software Foundation, under the PSF License Version 2
(examples in it also under Zero-Clause BSD). The weights are under the licence of qtx_lab.
"""
