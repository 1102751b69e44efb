"""Generated source -> compiled kernel, cached on disk.

A kernel is a C function `void kernel(int64 args, int64 thread)`: `args` is the address of an int64 array whose first
entries are the kernel's FIELDS (addresses, counts, byte strides) and whose tail holds four range limits per thread.
Its source is written to the cache folder and compiled there by Numba, so a new process only loads machine code.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import llvmlite
import numba
import numpy as np
from numba.core.caching import FunctionCache

from nbs_lib.kernels import vector
from nbs_lib.paths import cache_dir, write_atomic

width = vector.host_width  # of the vectors kernels are generated for


@dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled kernel: its readable `source`, its `fields` and the address compiled code calls."""

    name: str
    source: str
    fields: tuple[str, ...]
    address: int
    keep: object = field(repr=False)

    def arguments(self, ranges: list[tuple[int, int, int, int]], **values: int) -> np.ndarray:
        """The int64 argument array: one of the `values` per field, then one range per thread."""
        if not set(self.fields) <= set(values):
            raise ValueError(f"Expected the fields {self.fields} for {self.name}. Got {tuple(values)}.")
        return np.array([values[name] for name in self.fields] + [limit for r in ranges for limit in r], np.int64)


@cache
def fingerprint() -> str:
    """Kernels depend on this package's kernel sources and on the compiler: a change of either compiles anew."""
    text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256((text + numba.__version__ + llvmlite.__version__).encode()).hexdigest()[:12]


def cached(decorate: Callable, function: Callable):
    """`decorate(function)` through Numba's disk cache; a damaged entry is thrown away and made again."""
    try:
        return decorate(function)
    except Exception:  # whatever reading a damaged file raises; a real error of the source comes again below
        entry = FunctionCache(function)._impl
        for path in Path(entry.locator.get_cache_path()).glob(f"{entry.filename_base}*"):
            path.unlink(missing_ok=True)
        return decorate(function)


@cache
def build(name: str, fields: str, body: str, width: int) -> Kernel:
    """Compile the Python text `body`, on vectors of `width`; its `fields`, as words, and ranges become local names."""
    names, limits = fields.split(), ("tile_begin", "tile_end", "group_begin", "group_end")
    lines = ["def kernel(args, thread):"]
    lines += [f"    {name} = load_int64(args + {8 * i})" for i, name in enumerate(names)]
    lines += [f"    ranges = args + {8 * len(names)} + {8 * len(limits)} * thread"]
    lines += [f"    {name} = load_int64(ranges + {8 * i})" for i, name in enumerate(limits)]
    source = "\n".join([*lines, body.strip("\n").rstrip()])
    text = f"""from nbs_lib.kernels import vector

globals().update(vars(vector.operations({width})))
from numba import float32

from nbs_lib.kernels.vector import load_float, load_int32, load_int64, prefetch, store_float

inf = float('inf')


{source}
"""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = cache_dir() / "kernels" / fingerprint() / f"{name}_{digest}.py"
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomic(path, text)
    module = ModuleType(f"nbs_kernel_{path.stem}")
    sys.modules[module.__name__] = module  # Numba pickles functions by module name
    exec(compile(text, str(path), "exec"), module.__dict__)
    function = cached(numba.cfunc("void(int64, int64)", nopython=True, cache=True), module.kernel)
    return Kernel(name, source, tuple(names), function.address, function)
