"""Threads that stay: each runs the same compiled program beside the caller and meets it after every step."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from functools import cache


class Team:
    """`threads - 1` waiting helpers; `run(work)` calls `work(thread)` on all of them and on the caller (thread 0)."""

    def __init__(self, threads: int):
        self.lock = threading.Lock()
        self.orders = [queue.SimpleQueue() for _ in range(threads - 1)]
        for number, orders in enumerate(self.orders, 1):
            threading.Thread(target=self._serve, args=(number, orders), daemon=True, name=f"prunemap-{number}").start()

    def _serve(self, number: int, orders: queue.SimpleQueue) -> None:
        while True:
            work, done = orders.get()
            work(number)
            del work  # or the last network would live as long as the team
            done.put(number)

    def run(self, work: Callable[[int], None]) -> None:
        with self.lock:  # two networks take turns, or their threads would wait for each other for ever
            done: queue.SimpleQueue = queue.SimpleQueue()
            for orders in self.orders:
                orders.put((work, done))
            interrupted = None
            try:
                work(0)
            finally:  # even after Ctrl-C nobody may still be at work when the next run begins
                missing = len(self.orders)
                while missing:
                    try:
                        done.get()
                        missing -= 1
                    except KeyboardInterrupt as interrupt:
                        interrupted = interrupt
            if interrupted is not None:
                raise interrupted


@cache
def team(threads: int) -> Team:
    """The process's one team of this size."""
    return Team(threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.cache_clear)  # threads do not survive a fork
