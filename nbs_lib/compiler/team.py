"""Threads that stay: each runs the same compiled program beside the caller and meets it after every step."""

import os
import queue
import threading
from functools import cache

import numpy as np

from nbs_lib.kernels import driver

PATIENCE = 400_000  # looks for the next run, well below a millisecond, before a helper goes to sleep


class Team:
    """`threads - 1` helpers beside the caller, who is thread 0."""

    def __init__(self, threads: int):
        self.lock = threading.Lock()
        self.board = np.zeros(3, np.int64)  # ticket, address of the order, helpers that are done
        self.wanted, self.asleep = False, [False] * threads
        self.calls = [queue.SimpleQueue() for _ in range(threads)]
        for number in range(1, threads):
            threading.Thread(target=self._serve, args=(number,), daemon=True, name=f"prunemap-{number}").start()

    def _serve(self, number: int) -> None:
        seen = 0
        while True:
            seen = driver.serve(self.board.ctypes.data, number, seen, PATIENCE)
            self.asleep[number] = True  # first this, then a look at `wanted`; a caller does it the other way round
            if not self.wanted and self.board[0] == seen:
                self.calls[number].get()
            self.asleep[number] = False

    def run(self, order: np.ndarray) -> None:
        """Run an order (see `driver.run`) on all threads."""
        with self.lock:  # two networks take turns, or their threads would wait for each other for ever
            self.order, self.board[1] = order, order.ctypes.data
            try:
                self.wanted = True
                for calls, asleep in zip(self.calls, self.asleep, strict=True):
                    if asleep:
                        calls.put(None)
                driver.lead(self.board.ctypes.data, len(self.calls) - 1)  # nothing or all of it, whenever Ctrl-C comes
            finally:
                self.wanted = False


@cache
def team(threads: int) -> Team:
    """The process's one team of this size."""
    return Team(threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.cache_clear)  # threads do not survive a fork
