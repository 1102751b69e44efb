"""A roofline model for devices one does not have. It measures nothing, and its rows say so in three columns.

Each step of `net.explain()` takes max(computed MACs / reachable rate, bytes moved / bandwidth) + an overhead. The
reachable rate is the peak times a share that grows with the rows of a block, for these read one column list.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from nbs_lib.measure.schema import ROOFLINE, SIMULATED


@dataclass(frozen=True)
class Roofline:
    """A simulated device. All values in this file are ours and assumed: none was measured on such a device."""

    name: str
    peak_gmacs: float  # float32 multiply-adds of one core, 1e9 / s
    bandwidth_gbs: float  # memory traffic all cores share, 1e9 bytes / s
    cores: int
    overhead_us: float  # per step: dispatch and loop set-up
    efficiency: dict[int, float] = field(default_factory=lambda: {1: 0.4, 2: 0.7, 4: 0.85, 8: 0.9})  # by block rows

    def steps_ms(self, steps: pd.DataFrame, threads: int = 1) -> np.ndarray:
        """Estimated ms of each row of `net.explain()`. ValueError for more threads than the device has cores."""
        if not 1 <= threads <= self.cores:
            raise ValueError(f"Expected threads from 1 to {self.cores}, the cores of {self.name}. Got {threads}.")
        scheme = steps.scheme.astype(str)
        # What is dense, or merely lost filters or channels, shares columns over all rows; unlabelled zeros over none.
        shared = (steps.chosen != "sparse") | scheme.str.startswith(("filter", "channel"))
        rows = scheme.str.extract(r"\((\d+)x", expand=False).astype(float).fillna(1).mask(shared, np.inf)
        share = np.interp(rows, list(self.efficiency), list(self.efficiency.values()))
        compute_ms = steps.computed_macs / (share * self.peak_gmacs * threads) / 1e6
        memory_ms = (steps.weight_bytes + steps.activation_bytes) / self.bandwidth_gbs / 1e6
        return np.fmax(compute_ms, memory_ms).fillna(0).to_numpy(dtype=float) + self.overhead_us / 1e3

    def provenance(self, engine: str) -> dict:
        """Columns that mark a row as simulated; `engine` is left out, for it did not run."""
        seal = SIMULATED + hashlib.sha256(repr(self).encode()).hexdigest()[:12]
        row = {"device": SIMULATED + self.name, "engine": ROOFLINE, "engine_version": "1", "fingerprint": seal}
        return row | {"cores": self.cores, "warmup": 0, "runs": 0}

    def run(self, target, inputs: tuple, runs=0, warmup=0, adaptive=False) -> dict:
        """The estimate for `target.explain()`; the other arguments mean nothing here."""
        total_ms = float(self.steps_ms(target.explain(), getattr(target, "threads", 1)).sum())
        return {"median_ms": total_ms, "mean_ms": total_ms}


# Big phone cores with two 128-bit FMAs a cycle near 2.8 GHz; server cores with AVX-512.
ROOFLINES = {"phone": Roofline("phone", 22.0, 14.0, 4, 5.0), "server": Roofline("server", 58.0, 20.0, 8, 2.0)}
