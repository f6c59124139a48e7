"""What a lens shows of an estimate: the one that was given, a head's or some rows' part, and it in words."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ...estimates import AttentionEstimate, Draws


@dataclass(frozen=True)
class GivenEstimate:
    """An estimate that was made elsewhere, and the heads that it is of.

    Parameters
    ----------
    number : int
        Which of those that were given it is, counted from 1.
    estimate : AttentionEstimate
        Its output is (H, L, Ev) or (1, H, L, Ev), or (L, Ev) of a single head.
    layer : int
    head : int, optional
        The head that it is of; all heads of the layer where None.
    """

    number: int
    estimate: AttentionEstimate
    layer: int
    head: int | None

    def covers(self, layer: int, head: int) -> bool:
        """Whether it is of this head."""
        return layer == self.layer and self.head in (None, head)

    def of_head(self, layer: int, head: int) -> AttentionEstimate | None:
        """The part of the estimate that is of one head, (L, Ev); None where it is of other heads."""
        if not self.covers(layer, head):
            return None
        leading = self.estimate.output.shape[:-2]
        index = head if leading and leading[-1] > 1 else 0
        return estimate_of_head(self.estimate, (*(0,) * (len(leading) - 1), index) if leading else ())


@dataclass(frozen=True)
class HeadFinding:
    """How wrong the output of a head is.

    Parameters
    ----------
    layer, head : int
    error : float
        ‖ô − o‖ / ‖o‖, over all features and the rows that were measured.
    std_error : float, optional
        ‖σ‖ / ‖o‖ of the standard errors σ: the size of the error that the draws predict. None where unknown.
    effort : str
        How the estimate was made, in words.
    measured_rows : int
        Rows on which the error was measured: all, but for maps too large to be computed whole.
    """

    layer: int
    head: int
    error: float
    std_error: float | None
    effort: str
    measured_rows: int

    @property
    def text(self) -> str:
        """The finding in words.

        >>> HeadFinding(3, 2, 0.0283, 0.0291, "systematic, 64 draws a row", 512).text
        "Layer 3, head 2: off by 2.8 % of the output's norm (standard error ± 2.9 %)"
        """
        predicted = "" if self.std_error is None else f" (standard error ± {percent_text(self.std_error)})"
        error = f"off by {percent_text(self.error)} of the output's norm"
        return f"Layer {self.layer}, head {self.head}: {error}{predicted}"


def estimate_of_head(estimate: AttentionEstimate, head: tuple[int, ...]) -> AttentionEstimate:
    """The part of an estimate that is of the head at an index of its leading dimensions, output (L, Ev)."""
    if not head:
        return estimate
    parts, rows = tuple(slice(i, i + 1) for i in head), tuple(estimate.output.shape[-2:-1])
    sigma, per_row = estimate.std_error, estimate.info.draws_per_row
    info = replace(estimate.info, draws_per_row=per_row[head] if isinstance(per_row, Tensor) else per_row)
    return AttentionEstimate(
        estimate.output[head], estimate.num_keys, estimate.degrees_of_freedom,
        lambda: estimate.draws[parts].view(rows), None if sigma is None else lambda: sigma[head], info,
    )  # fmt: skip


def estimate_of_rows(estimate: AttentionEstimate, rows: Tensor) -> AttentionEstimate:
    """The part of a head's estimate (L, Ev) that is of some rows (R,)."""
    sigma = estimate.std_error

    def draws() -> Draws:
        whole = estimate.draws
        p = whole.probabilities
        return Draws(
            whole.indices[rows], whole.weights[rows], None if p is None else p[rows], whole.replicates
        )

    return AttentionEstimate(
        estimate.output[rows], estimate.num_keys, estimate.degrees_of_freedom, draws,
        None if sigma is None else lambda: sigma[rows], estimate.info,
    )  # fmt: skip


def percent_text(share: float) -> str:
    """A share of 1 as a percentage in two significant digits.

    >>> percent_text(0.02834), percent_text(1.234), percent_text(3e-6), percent_text(0.0)
    ('2.8 %', '123 %', 'less than 0.01 %', '0 %')
    """
    if share == 0:
        return "0 %"
    if share < 1e-4:
        return "less than 0.01 %"
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def effort_text(estimate: AttentionEstimate) -> str:
    """How an estimate of a head was made, in words: its sampler, its draws, and what corrects it.

    >>> import torch
    >>> from qtx_lab import sampled_attention
    >>> q, k, v = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    >>> effort_text(sampled_attention(q, k, v, num_samples=8, replicates=2))
    'systematic, 8 draws a row × 2 replicates'
    """
    info = estimate.info
    per_row = info.draws_per_row
    mean = float(per_row.double().mean()) if isinstance(per_row, Tensor) else per_row
    if info.num_samples is not None:
        draws = f"{info.num_samples} draw{'s' * (info.num_samples != 1)} a row"
        draws += f" × {info.replicates} replicates" * (info.replicates > 1)
    else:
        draws = "draws by tolerance" if mean is None else f"{mean:.0f} draws a row on average"
    words = [info.sampler, draws]
    if info.tolerance is not None:
        words.append(f"tolerance {info.tolerance:g} at confidence {info.confidence:g}")
    if info.control_variate is not None:
        words.append(f"corrected by {', '.join(info.control_variate.costs)}")
    return ", ".join(words)
