"""Runs a whole program of kernels inside compiled code: one call per thread and network, no Python between layers."""

from __future__ import annotations

from numba import njit, types

from nbs_lib.kernels.vector import atomic_load, call, fetch_add

SPINS = 2_000  # looks at the counter before a waiting thread offers its core to others
sched_yield = types.ExternalFunction("sched_yield", types.int32())


@njit("void(int64[::1], int64[::1], int64[::1], int64, int64, int64, int64, int64)", nogil=True, cache=True)
def run(functions, arguments, joins, begin, end, thread, threads, counter):
    """Run steps `begin` .. `end` as thread `thread` of `threads`.

    `functions`, `arguments`: int64 addresses per step. `joins`: 1 where all threads must have finished before the next
    step. `counter`: address of an int64, zero at the start of the run, that the threads count their arrivals in.
    """
    arrivals = 0
    for step in range(begin, end):
        call(functions[step], arguments[step], thread)
        if threads > 1 and joins[step]:
            arrivals += threads
            fetch_add(counter, 1)
            spins = 0
            while atomic_load(counter) < arrivals:
                spins += 1
                if spins > SPINS:
                    sched_yield()
