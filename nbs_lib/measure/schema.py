"""Tidy schemas of rows: settings are columns, failed points stay as rows with their error. That of measured rows."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

SCHEMA = 1  # raise it when the columns change: rows of another version are reported and skipped
ROOFLINE, SIMULATED = "roofline", "simulated:"  # the engine, and the start of device and fingerprint, of simulated rows
_ORDER = (
    "schema device cpu cores threads engine engine_version commit model layer kind P Q Kh Kw stride groups H W batch "
    "scheme block_p block_q rate reached_rate nnz macs effective_macs fallback_macs dtype warmup runs min_ms p10_ms "
    "median_ms mean_ms p90_ms mad_ms cv load1 temperature_c seed utc fingerprint ok error"
)
_TEXT = "device cpu engine engine_version commit model layer kind scheme dtype utc fingerprint error"
_TYPES = dict.fromkeys(_TEXT.split(" "), "str") | {"ok": "bool"}
_TYPES |= dict.fromkeys(("rate", "reached_rate", "cv", "load1", "temperature_c"), "float64")
# "", NA and NaN mean "does not apply". A network's layer columns are filled where all its layers agree.
COLUMNS = {n: "float64" if n.endswith("_ms") else _TYPES.get(n, "Int64") for n in _ORDER.split(" ")}


@dataclass(frozen=True)
class Schema:
    """Columns (name -> dtype; the first is "schema", with the `version` to raise when they change, the last two are
    "ok" and "error") and the `rules` of a row: {rule in words: whether it is met}."""

    columns: dict[str, str]
    rules: Callable[[dict], dict[str, bool]]
    version: int = SCHEMA

    def row(self, **values) -> dict:
        """A complete row from some columns, values or text. KeyError: no such column; ValueError: a broken rule."""
        if unknown := values.keys() - self.columns.keys():
            raise KeyError(f"Expected columns among {', '.join(self.columns)}. Got {', '.join(sorted(unknown))}.")
        values = {"schema": self.version, "ok": True} | values
        row = {name: _cell(name, kind, values.get(name)) for name, kind in self.columns.items()}
        rules = {f"schema {self.version}": row["schema"] == self.version} | self.rules(row)
        if broken := [rule for rule, met in rules.items() if met is not True]:
            raise ValueError(f"Expected {broken[0]}. Got { {name: row[name] for name in values} }.")
        return row

    def frame(self, rows) -> pd.DataFrame:
        """A typed DataFrame of rows, dicts or a frame, each checked by `row`."""
        records = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
        return pd.DataFrame([self.row(**row) for row in records], columns=list(self.columns)).astype(self.columns)


def _cell(name: str, kind: str, value):
    """`value`, or the text it had in a file, as its column's type; text becomes one printable line."""
    if (pd.isna(value) or value == "") and kind != "bool":
        return {"str": "", "float64": float("nan")}.get(kind, pd.NA)
    if kind == "str":
        return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    try:
        return {"Int64": int, "float64": float, "bool": lambda v: {"True": True, "False": False}[str(v)]}[kind](value)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"Expected {name} to be {kind}. Got {value!r}.") from None


def _measured_rules(row: dict) -> dict[str, bool]:
    ok, runs, median_ms, device, seal = (row[n] for n in ("ok", "runs", "median_ms", "device", "fingerprint"))
    simulated = {device.startswith(SIMULATED), row["engine"] == ROOFLINE, seal.startswith(SIMULATED)}
    return {
        "a device": device != "",
        "device, engine and fingerprint to agree that a row is simulated, or measured": len(simulated) == 1,
        "runs = 0 where simulated, above where measured": not ok or (runs == 0 if True in simulated else runs > 0),
        "0 < median_ms < inf, or an error": 0 < median_ms < float("inf") if ok else row["error"] != "",
    }


MEASURED = Schema(COLUMNS, _measured_rules)
make_row, frame = MEASURED.row, MEASURED.frame

# Contenders that took turns: those with the same `turns` did so together. `settings`: JSON, what an engine says of
# itself; `difference` from PyTorch's output, over its largest; `ratio`: our dense median ms / this one's (> 1: faster).
_TURNS = ("difference", "idle_ms", "ratio", "ratio_lo", "ratio_hi")
_TURNS = {"turns": "str", "settings": "str"} | dict.fromkeys(_TURNS, "float64")
_END = {name: COLUMNS[name] for name in ("ok", "error")}
CONTENDED = Schema({n: kind for n, kind in COLUMNS.items() if n not in _END} | _TURNS | _END, _measured_rules)
