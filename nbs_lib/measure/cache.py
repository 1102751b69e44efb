"""The cache of measurements: append-only CSV files under `data/measured/<device>/`, safe against kills and garbage.

A file is replaced as a whole, under a lock. What cannot be read is reported by file and line and skipped, but stays:
appending never drops a byte. Garbage spoils its own line, an unknown header all lines until a known one.
"""

import csv
import re
import warnings
from pathlib import Path

import pandas as pd
from filelock import FileLock

from nbs_lib import paths
from nbs_lib.measure.schema import MEASURED, Schema


def read(path: str | Path, schema: Schema = MEASURED) -> pd.DataFrame:
    """Rows of a file, or of all CSV files under a folder. A warning with file and line for whatever is skipped.
    FileNotFoundError where there is neither."""
    path, rows = Path(path), []
    if not path.exists():
        raise FileNotFoundError(f"Expected a CSV file of measurements, or a folder of them. Got {path}: not there.")
    for file in sorted(path.rglob("*.csv")) if path.is_dir() else [path]:
        headed = None
        for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
            try:
                line = raw.decode().rstrip("\r")
                if line.startswith("schema") or (line and headed is None):
                    headed = line == ",".join(schema.columns)
                    if not headed:
                        raise ValueError(f"Expected the header of schema {schema.version} first. Got {line[:50]!r}.")
                elif line and headed:
                    fields = next(csv.reader([line], strict=True))
                    if len(fields) != len(schema.columns):
                        raise ValueError(f"Expected {len(schema.columns)} fields. Got {len(fields)}.")
                    rows.append(schema.row(**dict(zip(schema.columns, fields, strict=True))))
            except (ValueError, csv.Error) as error:
                warnings.warn(f"{file}:{number}: skipped. {error}", stacklevel=2)
    return pd.DataFrame(rows, columns=list(schema.columns)).astype(schema.columns)


def append(path: str | Path, rows, schema: Schema = MEASURED) -> Path:
    """Add rows (dicts or a DataFrame, checked) at the file's end; under a new header if a foreign one rules there."""
    text, path = schema.frame(rows).to_csv(header=False, index=False, lineterminator="\n"), Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock"), mode=0o666):
        for temporary in path.parent.glob(f".{path.name}.????????"):
            temporary.unlink()  # left by a killed writer: nobody else writes while we hold the lock
        old = path.read_bytes() if path.exists() else b""
        header = ",".join(schema.columns)
        headed = re.findall(rb"(?m)^schema.*?(?=\r?$)", old)[-1:] == [header.encode()]
        old += b"\n" if old and not old.endswith(b"\n") else b""
        paths.write_atomic(path, old + (("" if headed else f"{header}\n") + text).encode())
    return path
