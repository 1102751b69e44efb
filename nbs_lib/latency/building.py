"""Measuring the latency model's settings, one row each, in the order that makes any first part a coarser model."""

import contextlib
import time
import warnings
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from nbs_lib import __version__, paths
from nbs_lib.latency.settings import TestModel, spread
from nbs_lib.measure import DEVICES, cache, measure, schema

MODEL = "latency_model"  # of the rows, and the name of their file
RUNS, WARMUP = 100, 3


def rows(device="host", threads=1, budget_s=600.0, settings=512, file=None, progress=True) -> pd.DataFrame:
    """A measured row per setting, from record or measured now until `budget_s` seconds are over; 0: from record alone.

    On record are data/measured/<device>/latency_model.csv and the same below the cache folder, rows of this CPU, engine
    version and thread count. What is measured goes to the latter, or to `file`, row by row: a killed build goes on
    where it was. Rows that failed are measured again. Raises KeyError for an unknown device, ValueError for a budget
    below 0 and a number of settings below 1."""
    if device not in DEVICES:
        raise KeyError(f"Expected a device among {', '.join(DEVICES)}. Got {device!r}.")
    if not (budget_s >= 0 and settings > 0):
        rule = "Expected a budget of 0 s or more and a number of settings above 0."
        raise ValueError(f"{rule} Got {budget_s}, {settings}.")
    wanted = spread(settings)
    seal = DEVICES[device].provenance(f"prunemap {__version__}")["fingerprint"]
    name = Path("measured", device.replace(":", "-"), f"{MODEL}.csv")
    places = [paths.data_dir() / name, paths.cache_dir() / name]
    file = Path(file) if file else places[-1]
    known = {}
    for place in dict.fromkeys([*places, file]):
        for row in cache.read(place).itertuples() if place.exists() else ():
            if row.ok and row.fingerprint == seal and row.model == MODEL and str(row.threads) == str(threads):
                with contextlib.suppress(ValueError, TypeError):  # of a family no longer measured; an empty cell
                    known.setdefault(TestModel.of(row), row._asdict())
    missing, began = [setting for setting in wanted if setting not in known], time.monotonic()
    for number, setting in enumerate(tqdm(missing, "Latency model", disable=not progress or not missing)):
        if time.monotonic() - began >= budget_s:
            done = f"{number} of {len(missing)} settings"
            warnings.warn(f"the budget of {budget_s:g} s was over after {done}: a coarser model", stacklevel=3)
            break
        row = _measure(setting, device, threads)
        cache.append(file, row)
        if row.ok[0]:
            known[setting] = row.iloc[0].to_dict()
    found = [known[setting] for setting in wanted if setting in known]
    return schema.frame([{name: row[name] for name in schema.COLUMNS} for row in found])


def _measure(setting: TestModel, device: str, threads: int) -> pd.DataFrame:
    """The setting's row; what fails is a row with its error."""
    try:
        net = setting.network(threads)
    except Exception as error:
        known = DEVICES[device].provenance(f"prunemap {__version__}") | {"threads": threads, "model": MODEL}
        failed = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        return schema.frame([known | setting.columns() | failed])
    return measure(net, device, RUNS, WARMUP, adaptive=True, model=MODEL, **setting.columns())
