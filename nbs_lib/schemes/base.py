"""What all pruning regularities share (mapping paper 2.1.1, 4.1): which weights live and die together. NumPy only.

A scheme turns a weight into `Units`; `project` drops the weakest until the rate is met, and one cut through the units
of many layers is global magnitude pruning. `P` filters, `Q` input channels per convolution group, `Kh Kw` kernel, `p q`
block. `groups` in a signature counts convolution groups: they split the filters, and nothing straddles them."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from numbers import Integral, Real

import numpy as np


@dataclass(frozen=True, eq=False)
class Units:
    """What a scheme may drop of one weight; of equal scores, the earlier position goes first."""

    score: np.ndarray  # float64 (U,): energy per weight (mean square) at which a unit goes; infinite: never
    size: np.ndarray  # int (U,): weights that go with it
    mask: Callable[[np.ndarray], np.ndarray]  # keep, bool (U,) -> the weight's mask

    def __post_init__(self):
        last = self.score.size - 1 - np.argmax(np.where(self.size > 0, self.score, -1.0)[::-1])
        self.score[last] = np.inf  # the strongest stays: no rate empties a layer


def keep_strongest(score: np.ndarray, size: np.ndarray, kept: float) -> np.ndarray:
    """Bool (U,): the units that stay when the weakest go, one by one, until about `kept` weights are left.

    score, size: as in `Units`, of one layer or of many in a row. Of all cuts through the order (score, position) this
    is the one whose total is nearest to `kept`; of two as near, the larger."""
    drop = min(size.sum(dtype=np.float64) - kept, size.sum(where=np.isfinite(score), dtype=np.float64))
    if drop <= 0:
        return np.ones(score.size, dtype=bool)
    # Weighted selection in linear time: non-negative floats order like their bits, so find the cut 16 bits at a time.
    bits, weights, below = score.view(np.uint64), size, 0.0
    for shift in (48, 32, 16, 0):
        digits = ((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.intp)
        totals = np.cumsum(np.bincount(digits, weights, 1 << 16))
        digit = np.searchsorted(totals, drop - below, side="right")
        below += totals[digit - 1] if digit else 0.0
        bits, weights = bits[digits == digit], weights[digits == digit]
    cut = bits[:1].view(np.float64)[0]
    ties = np.flatnonzero(score == cut)
    totals = below + np.append(0.0, np.cumsum(size[ties], dtype=np.float64))
    keep = score >= cut
    keep[ties[: np.argmin(np.abs(totals - drop))]] = False
    return keep


def check_rate(rate: float) -> float:
    """The rate as a float. Raises ValueError unless it is a finite number >= 1."""
    if not isinstance(rate, Real) or not 1 <= rate < np.inf:
        raise ValueError(f"Expected a finite compression rate (total / kept weights) >= 1. Got {rate!r}.")
    return float(rate)


def reached(mask: np.ndarray) -> float:
    """The rate a mask reached: total / kept weights; infinite where nothing is kept."""
    return np.size(mask) / kept if (kept := np.count_nonzero(mask)) else np.inf


def tiles(shape: tuple[int, ...], p: int, q: int, groups: int) -> np.ndarray:
    """Number, int of `shape`, of the tile of p filters x q channels a weight lies in; they restart at every convolution
    group, those at the edges are smaller."""
    conv_group, row = np.divmod(np.arange(shape[0]), per_group := shape[0] // groups)
    row = conv_group * -(-per_group // p) + row // p
    ids = row[:, None] * -(-shape[1] // q) + np.arange(shape[1]) // q
    return np.broadcast_to(ids.T, shape[::-1]).T


@dataclass(frozen=True)
class Scheme(ABC):
    """A pruning regularity. A member sets `name`, defines `groups`, and `units` where groups depend on the values."""

    name = ""
    min_rate = 1.0  # the least rate, other than 1, that the structure can have

    @abstractmethod
    def groups(self, shape: tuple[int, ...], groups: int = 1) -> np.ndarray:
        """Group number of every weight: int array of `shape`, numbered from 0 without gaps."""

    def blocks(self, shape: tuple[int, ...], groups: int = 1) -> np.ndarray:
        """Block number of every weight, likewise; a scheme without blocks has one."""
        return np.zeros(shape, dtype=np.intp)

    def refuses(self, shape: tuple[int, ...]) -> str:
        """Why weights of this shape cannot have the scheme; empty when they can."""
        return "" if len(shape) in (2, 4) else f"{self.name} prunes (P, Q) or (P, Q, Kh, Kw) weights"

    def legal(self, layer) -> tuple[bool, str]:
        """Whether a LayerSpec can have this scheme, and why not."""
        return not (reason := self.refuses(tuple(layer.shape))), reason

    def units(self, weight: np.ndarray, groups: int = 1) -> Units:
        """What can be dropped of `weight` (real, (P, Q) or (P, Q, Kh, Kw)). Raises ValueError as `checked` does."""
        ids = self.groups(self.checked(weight, groups).shape, groups)
        size = np.bincount(ids.ravel())
        energy = np.bincount(ids.ravel(), np.square(weight, dtype=np.float64).ravel())
        return Units(energy / size, size, lambda keep: keep[ids])

    def project(self, weight: np.ndarray, rate: float, groups: int = 1) -> np.ndarray:
        """The mask (bool, the weight's shape, True = kept) that keeps what has the most energy per weight at `rate`.

        Energy per weight lets the smaller groups at edges compare fairly. `reached(mask)` comes as near to `rate` as
        the order of the groups allows, at most one group away. Rate 1 keeps all; a rate beyond what is left keeps the
        strongest group; one below `min_rate` reaches that, with a warning. Raises as `checked` and `check_rate` do."""
        weight = self.checked(weight, groups)
        if check_rate(rate) == 1:
            return np.ones(weight.shape, dtype=bool)
        if rate < self.min_rate:
            warnings.warn(f"Expected rate 1 or >= {self.min_rate} for {self}, its least. Got {rate:g}.", stacklevel=2)
        units = self.units(weight, groups)
        return units.mask(keep_strongest(units.score, units.size, weight.size / rate))

    def to_json(self) -> dict:
        """Plain dict: the name and the parameters."""
        return {"name": self.name, **asdict(self)}

    def __str__(self) -> str:
        sizes = "x".join(str(value) for value in astuple(self) if isinstance(value, int))
        return f"{self.name}({sizes})" if sizes else self.name

    def checked(self, weight: np.ndarray, groups: int) -> np.ndarray:
        """The weight. Raises ValueError: empty, not finite or not legal here, or convolution groups not dividing P."""
        weight = np.asarray(weight)
        if reason := self.refuses(weight.shape) or ("" if weight.size else "it is empty"):
            raise ValueError(f"Expected a weight that {self} can prune. Got shape {weight.shape}: {reason}.")
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(f"Expected convolution groups that divide P = {weight.shape[0]}. Got {groups}.")
        if bad := np.count_nonzero(~np.isfinite(weight)):
            raise ValueError(f"Expected finite weights. Got {bad} that are not.")
        return weight

    def _check_sizes(self, *names: str, high: float = np.inf) -> None:
        for name in names:
            if not isinstance(value := getattr(self, name), Integral) or not 1 <= value <= high:
                raise ValueError(f"Expected {self.name}'s {name} to be an integer in 1..{high}. Got {value!r}.")
            object.__setattr__(self, name, int(value))
