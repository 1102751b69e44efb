"""Runs a whole program of kernels inside compiled code: one call per thread and network, no Python between layers."""

from functools import partial

from numba import njit, types

from nbs_lib.kernels.jit import cached
from nbs_lib.kernels.vector import atomic_load, call, fetch_add, load_int64

SPINS = 2_000  # looks at the counter before a waiting thread offers its core to others
sched_yield = types.ExternalFunction("sched_yield", types.int32())
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


@partial(cached, njit("void(int64, int64)", nogil=True, cache=True))
def run(order, thread):
    """Run a program's part as thread `thread`; `order`: address of the eight int64 below.

    `functions`, `arguments`, `joins`: int64 per launch, addresses, and 1 where all threads must be done before the
    next. `counter`: an int64, zero at first, for their arrivals. `times`: 0, or two timespecs per launch for thread 0.
    """
    functions, arguments, joins = load_int64(order), load_int64(order + 8), load_int64(order + 16)
    begin, end, threads = load_int64(order + 24), load_int64(order + 32), load_int64(order + 40)
    counter, times = load_int64(order + 48), load_int64(order + 56)
    arrivals = 0
    record = times != 0 and thread == 0
    for launch in range(begin, end):
        if record:
            clock_gettime(1, times + 32 * launch)  # 1: CLOCK_MONOTONIC
        call(load_int64(functions + 8 * launch), load_int64(arguments + 8 * launch), thread)
        if threads > 1 and load_int64(joins + 8 * launch):
            arrivals += threads
            fetch_add(counter, 1)
            spins = 0
            while atomic_load(counter) < arrivals:
                spins += 1
                if spins > SPINS:
                    sched_yield()
        if record:
            clock_gettime(1, times + 32 * launch + 16)


@partial(cached, njit("int64(int64, int64, int64, int64)", nogil=True, cache=True))
def serve(ticket, thread, seen, patience):
    """Run the order whose address follows the int64 at `ticket` whenever that changes from `seen`, and count it done in
    the int64 behind; give the last ticket seen back after `patience` looks in vain."""
    looks = 0
    while looks < patience:
        looks += 1
        now = atomic_load(ticket)
        if now != seen:
            run(load_int64(ticket + 8), thread)
            fetch_add(ticket + 16, 1)
            seen, looks = now, 0
    return seen


@partial(cached, njit("void(int64, int64)", nogil=True, cache=True))
def lead(ticket, helpers):
    """Post the order at `ticket`, run it as thread 0 and wait until all helpers are done."""
    fetch_add(ticket, 1)
    run(load_int64(ticket + 8), 0)
    spins = 0
    while atomic_load(ticket + 16) < helpers:
        spins += 1
        if spins > SPINS:
            sched_yield()
    fetch_add(ticket + 16, -helpers)
