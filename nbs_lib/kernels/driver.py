"""Runs a whole program of kernels inside compiled code: one call per thread and network, no Python between layers."""

from __future__ import annotations

from numba import njit, types

from nbs_lib.kernels.jit import cached
from nbs_lib.kernels.vector import atomic_load, call, fetch_add

SPINS = 2_000  # looks at the counter before a waiting thread offers its core to others
MONOTONIC = 1  # CLOCK_MONOTONIC
sched_yield = types.ExternalFunction("sched_yield", types.int32())
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


def run(functions, arguments, joins, begin, end, thread, threads, counter, times):
    """Run launches `begin` .. `end` as thread `thread` of `threads`.

    `functions`, `arguments`: int64 addresses per launch. `joins`: 1 where all threads must have finished before the
    next one. `counter`: address of an int64, zero at the start of the run, that the threads count their arrivals in.
    `times`: 0, or the address of two timespecs per launch, its start and end, which thread 0 fills.
    """
    arrivals = 0
    record = times != 0 and thread == 0
    for launch in range(begin, end):
        if record:
            clock_gettime(MONOTONIC, times + 32 * launch)
        call(functions[launch], arguments[launch], thread)
        if threads > 1 and joins[launch]:
            arrivals += threads
            fetch_add(counter, 1)
            spins = 0
            while atomic_load(counter) < arrivals:
                spins += 1
                if spins > SPINS:
                    sched_yield()
        if record:
            clock_gettime(MONOTONIC, times + 32 * launch + 16)


SIGNATURE = "void(int64[::1], int64[::1], int64[::1], int64, int64, int64, int64, int64, int64)"
run = cached(njit(SIGNATURE, nogil=True, cache=True), run)
