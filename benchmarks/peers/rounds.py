"""Taking turns: every contender one sample per round, so that whatever else the machine does hits all alike."""

from collections.abc import Callable

from benchmarks.peers.environment import PeerFailed
from nbs_lib import clock

WARMUP = 3  # untimed calls of each, before the first round


def alternate(samplers: dict[str, Callable], rounds=20, settle=3) -> tuple[clock.Comparison, dict[str, str]]:
    """`clock.alternate` for processes: same lock, same order.

    `samplers`: name -> (settle -> ms of one call after `settle` untimed ones, which fill its caches again). Returns
    their timings and {name: error} of those that failed on the way."""
    if not samplers:
        return clock.Comparison({}), {}
    samples, errors = {name: [] for name in samplers}, {}
    with clock.lock():
        for turn in range(-1, rounds):  # -1: the warm-up
            for name in clock.turn_order(list(samplers), turn):
                if name in errors:
                    continue
                try:
                    ms = samplers[name](WARMUP if turn < 0 else settle)
                    samples[name] += [ms] * (turn >= 0)
                except PeerFailed as error:
                    errors[name] = str(error)
    timings = {name: clock.Timing(values) for name, values in samples.items() if name not in errors and values}
    return clock.Comparison(timings), errors
