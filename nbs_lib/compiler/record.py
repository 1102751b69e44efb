"""What tuning found on this machine, on disk: one file per CPU and version of the kernels, which `compile` reads."""

import json
import math
import warnings
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
from filelock import FileLock

from nbs_lib.compiler.packing import TILES
from nbs_lib.compiler.steps import Tiling
from nbs_lib.kernels import jit
from nbs_lib.kernels.conv import FETCHES
from nbs_lib.layers import LayerSpec
from nbs_lib.paths import cache_dir, write_atomic


class Fixed:
    """Stands in for a record: every layer gets `choice`."""

    def __init__(self, choice: Tiling = Tiling()):  # noqa: B008 (frozen)
        self.choice = choice

    def entry(self, layer: LayerSpec, images: int, threads: int) -> dict | None:
        return None

    def tiling(self, layer: LayerSpec, images: int, threads: int) -> Tiling:
        return self.choice


class Record(Fixed):
    """What tuning found: {layer key: entry}, a JSON file. Entries hold `tiling`, `ms`, `default_ms`, `dense_ms` and
    `trials` (ms of every candidate tried). A broken file or entry is reported and skipped."""

    def __init__(self, path: str | Path | None = None):
        version = f"{llvm.get_host_cpu_name()}-{jit.width()}-{jit.fingerprint()}"
        self.path = Path(path) if path else cache_dir() / "tuning" / f"{version}.json"
        try:
            found = json.loads(self.path.read_text()) if self.path.exists() else {}
        except (ValueError, OSError, RecursionError) as error:
            found = str(error)
        entries = found if isinstance(found, dict) else {"the file": found}
        self.entries = {key: entry for key, entry in entries.items() if _sound(entry)}
        for key in [key for key in entries if key not in self.entries]:
            warnings.warn(f"skipped in the tuning record {self.path}: {key}, which no tuning wrote", stacklevel=3)

    def entry(self, layer: LayerSpec, images: int, threads: int) -> dict | None:
        return self.entries.get(layer_key(layer, images, threads)) if self.entries else None

    def tiling(self, layer: LayerSpec, images: int, threads: int) -> Tiling:
        """The best tiling found for such a layer, dense where that was faster; the default if none is known."""
        entry = self.entry(layer, images, threads)
        if entry is None:
            return Tiling()
        return Tiling(dense=True) if entry["dense_ms"] < entry["ms"] else Tiling(**entry["tiling"])

    def save(self, key: str, entry: dict) -> None:
        """Write one entry, atomically, beside what is in the file by now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            self.entries = Record(self.path).entries | {key: entry}
            write_atomic(self.path, json.dumps(self.entries, indent=1))


def _sound(entry) -> bool:
    try:
        times = [entry["ms"], entry["default_ms"], entry["dense_ms"], *entry["trials"].values()]
        t = Tiling(**entry["tiling"])
        numbers = (t.rows, t.vectors, t.unroll, 1 if t.block is None else t.block)
        counts = all(type(number) is int and 0 < number <= 64 for number in numbers)
        words = t.fetch in (None, *FETCHES) and t.split in (None, "tiles", "groups") and t.dense in (None, True, False)
        return all(0 < ms < math.inf for ms in times) and counts and words and t.rows in TILES
    except (TypeError, KeyError, AttributeError):
        return False


def layer_key(layer: LayerSpec, images: int, threads: int) -> str:
    """What layers have in common that one tiling serves: shape, window, threads, and roughly the structure of zeros:
    the share of weights kept, and how full the columns are that eight neighbouring filters keep together."""
    kept = layer.weight.reshape(layer.P, -1) != 0
    union = np.logical_or.reduceat(kept, np.arange(0, layer.P, 8)).sum()
    structure = f"kept {layer.nnz / layer.params:.2g} full {layer.nnz / max(8 * union, 1):.1g}"
    window = f"stride {layer.stride} dilation {layer.dilation} groups {layer.groups}"
    return f"{layer.P}x{layer.Q}x{layer.Kh}x{layer.Kw} to {images}x{layer.H}x{layer.W} {window} {structure} t{threads}"
