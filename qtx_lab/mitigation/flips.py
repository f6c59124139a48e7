"""`RandomFlips`: rows whose bits are flipped at random before they are measured, and flipped back after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.requests import PlannedRun
from ..checks import check_count, check_generator
from ..circuits import check_rows
from ..circuits.base import num_bits
from ..errors import ArgumentError


@dataclass(frozen=True)
class RandomFlips:
    """Measures each row under several flips of the key's bits, which are undone in what is fed forward.

    A device reads 1 wrongly more often than 0, so that what it counts leans towards keys with many zeros. A
    bit that is flipped before it is measured, and flipped back in the result, is misread the other way round:
    over random flips the errors of both readings are equal, whatever they are at the time, and need no
    calibration that drifts away. A flip costs no gate, because it is merged into the rotation before it: a
    flipped row is the row of the keys j xor r, and conditions on flipped bits choose its rotations.

    Equal errors still blur the row. With `DynamicLoader(reads=2)` most of them are seen and discarded, with
    the same probability for all keys, which the flips take care of.

    Parameters
    ----------
    instances : int
        Number of flips of a row, even and from 2 to 256, each with an equal share of the shots. They are
        drawn in pairs of a flip and its opposite, so that every bit is flipped in half of them. Fewer shots
        than that have a flip each.

    Raises
    ------
    ArgumentError
        If instances is odd or out of its bounds.

    Source: Smith, Khosla, Self and Kim, Qubit readout error mitigation with bit-flip averaging (2021); Koh,
    Koh and Thompson, Readout error mitigation for mid-circuit measurements and feedforward (2024).

    Examples
    --------
    >>> from qtx_lab.circuits import DynamicLoader
    >>> backend = QiskitQuantumBackend("aer", loader=DynamicLoader(reads=2))
    >>> p = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    >>> counts = RandomFlips(4).sample_rows(backend, p, 400, generator=torch.Generator().manual_seed(0))
    >>> int(counts.counts.sum()), int(counts.counts[0, 3])
    (400, 0)
    """

    instances: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "instances", check_count("instances", self.instances, 2, 256))
        if self.instances % 2:
            raise ArgumentError(
                f"instances={self.instances} is not allowed: it must be even: flips are drawn in pairs."
            )

    @property
    def name(self) -> str:
        """What is done, in a few words."""
        return f"{self.instances} random flips"

    def sample_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
    ) -> RowCounts:
        """Measure rows (R, n), with `shots` shots of each over all flips; see `Mitigation`."""
        p = check_rows(p)
        check_generator(generator)
        shots = check_count("shots", shots)
        instances = min(self.instances, shots)
        size = num_bits(p.shape[-1])
        flips = self._flips(size, instances, generator)
        if not len(p):
            return backend.sample_rows(p, shots, generator=generator)
        order = torch.arange(1 << size) ^ flips[:, None]  # [K, 2^m]
        padded = F.pad(p, (0, (1 << size) - p.shape[-1]))
        flipped = padded[:, order]  # [R, K, 2^m]
        counts = torch.zeros(p.shape, dtype=torch.int64)
        discarded, parts = torch.zeros(len(p), dtype=torch.int64), []
        share, more = divmod(shots, instances)
        running = p[p.sum(-1) > 0]
        with backend.engine.reserved(self.planned_runs(backend, running, shots) if len(running) else ()):
            for part, each in ((slice(0, more), share + 1), (slice(more, None), share)):
                some = flipped[:, part]
                if not each or not some.shape[1]:
                    continue
                measured = backend.sample_rows(some.flatten(0, 1), each, generator=generator)
                parts.append(measured)
                own = measured.counts.view(some.shape)
                back = own.gather(-1, order[part].expand(some.shape))  # flips are their own inverses
                counts += back.sum(1)[:, : p.shape[-1]]
                discarded += measured.discarded.view(len(p), -1).sum(-1)
        baseline = backend.request(p, shots, generator).baseline()
        facts = {**parts[-1].diagnostics, "mitigation": self.name, "flips": tuple(flips.tolist())}
        return RowCounts(counts, discarded, shots, baseline, facts)

    def planned_runs(self, backend: QiskitQuantumBackend, p: Tensor, shots: int) -> list[PlannedRun]:
        """All that `sample_rows` would run: each row with each flip."""
        shots = check_count("shots", shots)
        instances = min(self.instances, shots)
        share, more = divmod(shots, instances)
        circuit = backend.transpiled(1 << num_bits(p.shape[-1]))
        parts = ((more, share + 1), (instances - more, share))
        return [
            PlannedRun(circuit, len(p) * count, each, "random flips")
            for count, each in parts
            if count and each
        ]

    def _flips(self, size: int, instances: int, generator: torch.Generator | None) -> Tensor:
        """Masks of flipped bits, int64 (K,): pairs of opposite ones."""
        device = "cpu" if generator is None else generator.device
        half = torch.randint(1 << size, (-(-instances // 2),), generator=generator, device=device).cpu()
        return torch.stack((half, half ^ ((1 << size) - 1)), -1).flatten()[:instances]
