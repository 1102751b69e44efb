"""Pattern-based pruning of 3x3 kernels: 4 of 9 weights, then connectivity (mapping paper 2.1.1, Fig. 1 e)."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from nbs_lib.schemes.base import Scheme, Units, tiles

# The 126 ways to keep 4 of 9 weights, as 9-bit numbers: bit 3 * kh + kw is set where the weight is kept.
CANDIDATES = np.sort([sum(1 << bit for bit in bits) for bits in combinations(range(9), 4)])


@dataclass(frozen=True)
class Pattern(Scheme):
    """Every 3x3 kernel keeps the best of `n` patterns of 4 weights, or goes as a whole (connectivity pruning).

    `patterns` (9-bit numbers) are what `fit` chose; without them each weight is fitted on its own. The patterns alone
    are a rate of 9 / 4, so rates between 1 and 2.25 reach 2.25."""

    n: int = 8
    patterns: tuple[int, ...] | None = None
    name = "pattern"
    min_rate = 2.25

    def __post_init__(self):
        self._check_sizes("n", high=CANDIDATES.size)
        if self.patterns is not None:
            object.__setattr__(self, "patterns", tuple(int(bits) for bits in self.patterns))
            if not self.n == len(self.patterns) == len({*self.patterns} & {*CANDIDATES.tolist()}):
                raise ValueError(f"Expected {self.n} different 9-bit patterns with 4 bits set. Got {self.patterns}.")

    def groups(self, shape, groups=1):
        return tiles(shape, 1, 1, groups)

    def refuses(self, shape):
        return "" if len(shape) == 4 and shape[2:] == (3, 3) else "pattern prunes 3x3 CONV kernels only"

    def fit(self, weights: Iterable[np.ndarray]) -> "Pattern":
        """A Pattern with the n patterns that are most often a kernel's best in `weights`, (P, Q, 3, 3) arrays."""
        counts = np.zeros(512, dtype=np.int64)
        for weight in weights:
            strongest = np.argsort(-np.abs(self.checked(weight, 1)).reshape(-1, 9), axis=1, kind="stable")[:, :4]
            counts += np.bincount((1 << strongest).sum(axis=1), minlength=512)
        return Pattern(self.n, CANDIDATES[np.argsort(-counts[CANDIDATES], kind="stable")[: self.n]])

    def units(self, weight, groups=1):
        square = np.square(self.checked(weight, groups), dtype=np.float64)
        patterns = np.array((self if self.patterns else self.fit([weight])).patterns)
        kept = (patterns[:, None] >> np.arange(9) & 1).astype(bool)
        energy = square.reshape(-1, 9) @ kept.T
        best, size = kept[energy.argmax(axis=1)], np.full(len(energy), 4)
        return Units(energy.max(axis=1) / 4, size, lambda keep: (best & keep[:, None]).reshape(square.shape))
