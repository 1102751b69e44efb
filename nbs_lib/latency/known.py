"""A latency model to map with on any machine: its own, or, where that would be too coarse, another CPU's on record."""

import warnings

from nbs_lib import paths
from nbs_lib.latency.building import MODEL, rows
from nbs_lib.latency.model import LatencyModel
from nbs_lib.measure import cache, schema


def known_model(threads=1, budget_s=15.0, settings=512) -> tuple[LatencyModel, str]:
    """The host's latency model, and in words whose it is. What is not on record is measured for `budget_s` seconds;
    where not half of the settings are there then, the model is that of the CPU with the most rows on record, if it has
    more: its times are not this machine's, but which of a layer's schemes is faster is often the same. NoData where
    neither has enough."""
    with warnings.catch_warnings(action="ignore"):  # of a budget that was over: the words say what came of it
        found, whose = rows("host", threads, budget_s, settings, progress=False), "this machine"
    folder = paths.data_dir() / "measured" / "host"
    if 2 * len(found) < settings and (file := folder / f"{MODEL}.csv").exists():
        other = cache.read(file)
        other = other[other.ok & (other.threads == threads) & (other.model == MODEL)]
        most = other.groupby("fingerprint").size()
        if len(most) and most.max() > len(found):
            found = other[other.fingerprint == most.idxmax()][list(schema.COLUMNS)]
            whose = f"{found.cpu.iloc[0]}, prunemap {found.engine_version.iloc[0]}, not this machine and version"
    return LatencyModel(found), f"{whose}, {len(found)} settings"
