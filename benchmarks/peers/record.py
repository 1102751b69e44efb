"""Rows of contenders that took turns, in `data/measured/host/peers.csv`: figures are drawn from them alone."""

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.subject import OTHER_RATE, RATES, REMAINING, VARIANTS, Subject, exists
from nbs_lib import paths
from nbs_lib.clock import Comparison
from nbs_lib.measure import cache, describe, host, schema

ANCHOR = "prunemap"  # our dense network takes part in all turns: ratios are to it
IDENTITY = ["model", "threads", "engine", "fingerprint"]


def on_record() -> Path:
    """The file of all rows."""
    return paths.data_dir() / "measured" / "host" / "peers.csv"


def fingerprint(name: str, peer: Peer) -> str:
    """Changes with this CPU, the engine's pinned list (or its version in our environment), its options, and how the
    networks are pruned."""
    engine = peer.module.REQUIREMENTS or version(peer.module.PACKAGE)
    weights = f"{VARIANTS[peer.variant]} {RATES} {OTHER_RATE} {REMAINING}" if peer.variant != "dense" else "dense"
    return host.fingerprint(f"{name} {engine} {dict(peer.options)} {weights}")


def missing(file, peers: dict[str, Peer], network: str, threads: int) -> list[str]:
    """Names of the peers without a row of this network and thread count on this machine. A failure is a row, too, but
    for one to install: that may have lacked the network."""
    known = cache.read(file, schema.CONTENDED) if file.exists() else schema.CONTENDED.frame([])
    known = known[~known["error"].str.startswith("not installed")]
    done = set(known[IDENTITY].itertuples(index=False, name=None))
    able = {name: peer for name, peer in peers.items() if exists(network, peer.variant)}
    return [name for name, peer in able.items() if (network, threads, name, fingerprint(name, peer)) not in done]


def row(name: str, peer: Peer, network: str, threads: int, turns: str) -> dict:
    """The columns that are known before anything runs."""
    known = host.provenance(name) | host.stamp() | {"fingerprint": fingerprint(name, peer), "turns": turns, "seed": 0}
    return known | {"model": network, "threads": threads}


def about(subject: Subject, threads: int) -> dict:
    """The columns that say which network it is, and what is left of it."""
    graph = subject.graph
    macs = {"macs": graph.macs, "effective_macs": sum(layer.effective_macs for layer in graph.layers.values())}
    target = SimpleNamespace(graph=graph, mapping=subject.mapping, threads=threads, **macs)
    return describe(target, (subject.x.numpy(),))


def timed(comparison: Comparison, name: str) -> dict:
    """Times of one contender and its ratio to ANCHOR, whose rounds are paired with its own."""
    ratio = comparison.ratio(ANCHOR, name) if ANCHOR in comparison.timings else (np.nan,) * 3
    return comparison.timings[name].row() | dict(zip(("ratio", "ratio_lo", "ratio_hi"), ratio, strict=True))


def said(worker, rounds: int) -> dict:
    """What the engine's process told."""
    settings = json.dumps(worker.settings, sort_keys=True)
    told = {"engine_version": worker.version, "difference": worker.difference, "settings": settings}
    return told | {"idle_ms": worker.idle_ms / (rounds + 1), "fallback_macs": worker.settings.get("fallback_macs")}


def append(file, rows: list[dict]) -> pd.DataFrame:
    cache.append(file, rows, schema.CONTENDED)
    return schema.CONTENDED.frame(rows)


def latest(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each network and thread count every contender's newest row, of one machine: this one where it has any, else
    that of the last row. Three columns more: `machine`, "this machine" or the CPU's name; `weights`, the variant it
    ran; `removed_percent`, of the MACs left those that meet only zeros and that our compiler takes out."""
    rows = rows[rows["engine"].isin(list(PEERS))]  # another name was a contender once
    here = [row.fingerprint == fingerprint(row.engine, PEERS[row.engine]) for row in rows.itertuples()]
    rows = rows.assign(machine=np.where(here, "this machine", rows["cpu"]))
    chosen = []
    for _, part in rows.groupby(["model", "threads"], sort=False):
        mine = part[part["machine"] == "this machine"]
        chosen.append(mine if len(mine) else part[part["cpu"] == part["cpu"].iloc[-1]])
    rows = pd.concat(chosen or [rows]).drop_duplicates(["model", "threads", "engine"], keep="last")
    removed = [json.loads(settings or "{}").get("removed_macs", 0) for settings in rows["settings"]]
    left = rows["effective_macs"].astype(float)
    variants = [PEERS[name].variant for name in rows["engine"]]
    return rows.assign(weights=variants, removed_percent=100 * np.array(removed, float) / left)
