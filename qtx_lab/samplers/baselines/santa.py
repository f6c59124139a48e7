"""S²ANTA, a baseline: systematic draws in tiles of keys, each tile with a whole number of draws."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_count
from ...errors import unknown_name
from ...estimates import Draws
from ...streams import Purpose, Stream
from ..base import StreamSampler
from ..inversion import invert, row_masses

BUDGETS = ("proportional", "fixed")
POINTS = ("systematic", "stratified")


class SantaSampler(StreamSampler):
    """Draws within tiles of keys by S²ANTA's two rules for how many a tile gets.

    - `proportional` (S²ANTA-Prop): tile t of probability P_t gets S_t draws, S P_t rounded by largest
      remainders, and every draw weighs 1 / S. Biased: a tile counts S_t / S in place of P_t in every
      repetition, since the rounding is not random (but for ties).
    - `fixed` (S²ANTA-Flash): every tile gets the same number of draws, a draw of tile t weighs P_t / S_t.
      Unbiased.

    Variance: within a tile that of systematic (or stratified) sampling; none between tiles. With one tile
    both are `SystematicSampler`. Source: Lee et al., Stochastic sparse attention for memory-bound inference
    (2026, arXiv:2605.01910), and the kernels released with it, whose draws are systematic and whose tiles
    hold 256 keys (Flash also 32 or 64).

    Parameters
    ----------
    budgets : {"proportional", "fixed"}
    points : {"systematic", "stratified"}
        One random offset for each tile, or one for each draw.
    tile : int
        Keys in a tile; as many more as it takes to have no more tiles than draws.

    Raises
    ------
    ArgumentError
        If an argument is not allowed.
    """

    independent = False

    def __init__(self, budgets: str = "proportional", points: str = "systematic", tile: int = 256):
        if budgets not in BUDGETS:
            raise unknown_name("budgets", budgets, BUDGETS)
        if points not in POINTS:
            raise unknown_name("points", points, POINTS)
        tile = check_count("tile", tile)
        self.budgets, self.points, self.tile = budgets, points, tile
        self.unbiased = budgets == "fixed"
        kind = "santa-prop" if budgets == "proportional" else "santa-flash"
        self.name = kind if points == "systematic" else f"{kind}-stratified"

    def draw_from(
        self,
        stream: Stream,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys with the random numbers of a stream: see `Sampler.draw_from`."""
        # As many keys in a tile as leave no more tiles than draws: a power of two times `tile`, by what the
        # row itself sees.
        place = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
        reach = ((logits > -torch.inf) * place).amax(-1)  # [N, P], up to the last key that the row sees
        tiles = self.tile * torch.exp2((reach / (num_samples * self.tile)).clamp_min(1).log2().ceil()).long()
        indices = torch.zeros(
            *logits.shape[:-1], replicates * num_samples, dtype=torch.int64, device=logits.device
        )
        weights, probabilities = (logits.new_zeros(indices.shape) for _ in range(2))
        offsets = stream.uniform(replicates, num_samples)
        ties = stream.of_purpose(Purpose.TIES).uniform(1, num_samples)[..., 0, :]
        for tile in tiles.unique().tolist():
            rows = tiles == tile
            drawn = self._draw_in_tiles(logits[rows], tile, offsets[rows], ties[rows])
            indices[rows], weights[rows], probabilities[rows] = drawn
        return Draws(indices, weights / replicates, probabilities, replicates)

    def _draw_in_tiles(
        self, logits: Tensor, tile: int, offsets: Tensor, ties: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, weights of one replicate and probabilities (B, R * S) of rows (B, n).

        The random numbers are (B, R, S) and (B, S).
        """
        n, (replicates, s) = logits.shape[-1], offsets.shape[-2:]
        mass = row_masses(logits)
        inside = F.pad(mass[..., :n], (0, -n % tile)).unflatten(-1, (-1, tile)).sum(-1, dtype=torch.float64)
        total = inside.sum(-1, keepdim=True).clamp_min(1)
        share = inside / total  # P_t, [..., tiles]
        budgets = self._proportional(share, s, ties) if self.budgets == "proportional" else _fixed(share, s)

        last = budgets.cumsum(-1)
        slot = torch.arange(s, device=logits.device).expand(*logits.shape[:-1], s).contiguous()
        of = torch.searchsorted(last, slot, right=True).clamp_max_(share.shape[-1] - 1)  # the tile of a draw
        count = budgets.gather(-1, of).clamp_min(1)
        within = slot - (last - budgets).gather(-1, of)
        of, count, within = (
            x[..., None, :].expand(*x.shape[:-1], replicates, s) for x in (of, count, within)
        )
        lead = (*logits.shape[:-1], replicates)
        u = offsets.gather(-1, of) if self.points == "systematic" else offsets  # no more tiles than draws
        start, held = (
            x[..., None, :].expand(*lead, -1).gather(-1, of) for x in (share.cumsum(-1) - share, share)
        )
        points = (start + held * (within + u) / count).flatten(-2)

        indices, row_mass = invert(mass, points)
        probabilities = mass.gather(-1, indices) / total.to(mass.dtype)
        weight = held / count if self.budgets == "fixed" else torch.full_like(held, 1 / s)
        weights = weight.flatten(-2).to(mass.dtype).masked_fill_(row_mass == 0, 0)
        return indices, weights, probabilities

    @staticmethod
    def _proportional(share: Tensor, num_samples: int, ties: Tensor) -> Tensor:
        """S P_t rounded down, and one more for the largest remainders."""
        quota = num_samples * share
        budgets = quota.floor()
        remainder = quota - budgets + 1e-7 * ties[..., : share.shape[-1]]  # in random order where they tie
        rank = remainder.argsort(-1, descending=True).argsort(-1)
        left = num_samples - budgets.sum(-1, keepdim=True)
        return (budgets + (rank < left)).long()


def _fixed(share: Tensor, num_samples: int) -> Tensor:
    """The same number of draws for every tile that is seen.

    The first tiles get one more where that number does not divide S.
    """
    seen = share > 0
    tiles = seen.sum(-1, keepdim=True).clamp_min(1)
    budgets = num_samples // tiles + (seen.cumsum(-1) <= num_samples % tiles)
    return budgets * seen
