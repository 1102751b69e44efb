"""Rows of contenders that took turns, in `data/measured/host/peers.csv`: figures are drawn from them alone."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd

import nbs_lib as nbs
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.subject import Subject, exists
from nbs_lib.clock import Comparison
from nbs_lib.measure import cache, describe, host, schema

ANCHOR = "prunemap"  # our dense network takes part in all turns: ratios are to it
IDENTITY = ["model", "threads", "engine", "fingerprint"]


def fingerprint(name: str, peer: Peer) -> str:
    """Changes with this CPU, the engine's pinned list (for ours: our version) and its options."""
    return host.fingerprint(f"{name} {peer.module.REQUIREMENTS or nbs.__version__} {dict(peer.options)}")


def missing(file, peers: dict[str, Peer], network: str, threads: int) -> list[str]:
    """Names of the peers without a row of this network and thread count on this machine (a failure is one, too)."""
    known = cache.read(file, schema.CONTENDED) if file.exists() else schema.CONTENDED.frame([])
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
    """Of each contender, network and thread count its newest row, of this machine's CPU if there are any, else of the
    last row's. Two columns more: `machine`, "this machine" or the CPU's name, and `weights`, the variant it ran."""
    here = rows["cpu"] == host.cpu_model()
    rows = rows[here if here.any() else rows["cpu"] == rows["cpu"].iloc[-1:].squeeze()]
    rows = rows.drop_duplicates(["model", "threads", "engine"], keep="last")
    rows = rows[rows["engine"].isin(list(PEERS))]  # another name was a contender once
    variants = [PEERS[name].variant for name in rows["engine"]]
    return rows.assign(machine="this machine" if here.any() else rows["cpu"], weights=variants)
