"""A contest: one network, one thread count, all contenders; in several parts where memory asks for it."""

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import psutil

from benchmarks.peers import record
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.environment import PeerFailed, python_of
from benchmarks.peers.rounds import WARMUP, alternate
from benchmarks.peers.subject import Subject, exists
from benchmarks.peers.worker import Worker
from nbs_lib import clock
from nbs_lib.measure import cache, schema


def parts(names: list[str], weight_bytes: int, free_bytes: int) -> list[list[str]]:
    """The contenders in parts that fit into the free memory, the anchor first in each.

    A process holds about five times its weights (the file, its own form, what conversion leaves) and 0.5 GB."""
    others = [name for name in names if name != record.ANCHOR]
    at_once = max(1, int(0.7 * free_bytes / (5 * weight_bytes + 0.5e9)) - 1)
    return [[record.ANCHOR, *others[at : at_once + at]] for at in range(0, max(1, len(others)), at_once)]


def contest(
    network: str,
    threads: int,
    file: Path,
    names: list[str],
    rounds: int,
    peers: dict[str, Peer] = PEERS,
    say: Callable = print,
) -> pd.DataFrame:
    """Let `names` (of `peers`) take turns on `network`, append a row each to `file`, part by part, and return them.

    Whoever cannot be installed, crashes, hangs, or differs from PyTorch leaves a row with its error."""
    done, names = [], [name for name in names if exists(network, peers[name].variant)]
    with TemporaryDirectory(prefix="prunemap-peers-") as folder:
        weights = sum(layer.params for layer in Subject(network, "dense", Path(folder)).graph.layers.values()) * 4
        for part in parts(names, weights, psutil.virtual_memory().available):
            say(f"{network}, {threads} thread(s): {', '.join(part)}")
            done.append(
                record.append(file, _turns(network, threads, {n: peers[n] for n in part}, rounds, Path(folder), say))
            )
    return pd.concat(done, ignore_index=True)


def results(networks, threads: int, names: list[str], rounds: int, live: bool, keep: bool) -> pd.DataFrame:
    """What a notebook draws: `record.latest` of `networks` and `threads`. `live`: `names` take turns now, and their
    rows join the file on record if `keep`. Otherwise that file is read. RuntimeError where it has no such network."""
    file = record.on_record()
    if live:
        with TemporaryDirectory() as folder:
            target = file if keep else Path(folder) / "peers.csv"
            found = [contest(network, threads, target, names, rounds) for network in networks]
        rows = pd.concat(found, ignore_index=True)
    else:
        rows = cache.read(file, schema.CONTENDED) if file.exists() else schema.CONTENDED.frame([])
    rows = record.latest(rows)
    rows = rows[rows["model"].isin(list(networks)) & (rows["threads"] == threads)]
    if rows.empty:
        known = f"{list(networks)}, {threads} thread(s)"
        raise RuntimeError(f"Expected rows of {known}, in {file}: run ./reproduce.sh peers. Got none.")
    return rows


def _turns(network: str, threads: int, peers: dict[str, Peer], rounds: int, folder: Path, say: Callable) -> list[dict]:
    turns, rows, workers = secrets.token_hex(4), {}, {}
    variants = dict.fromkeys(peer.variant for peer in peers.values())
    for peer in peers.values():  # before the lock: installing may take long, and needs no quiet
        with contextlib.suppress(PeerFailed):
            python_of(peer)
    with clock.lock(), clock.pin(threads), contextlib.ExitStack() as closing:
        for variant in variants:  # one at a time in our memory
            subject, about = Subject(network, variant, folder), {}
            for name, peer in [(name, peer) for name, peer in peers.items() if peer.variant == variant]:
                rows[name] = record.row(name, peer, network, threads, turns) | {"ok": False}
                try:
                    about = about or record.about(subject, threads)
                    rows[name] |= about
                    model, wanted = subject.file(peer.module.FORM), subject.wanted
                    workers[name] = Worker(peer, model, subject.x.numpy(), wanted, threads)
                    closing.callback(workers[name].close)
                except Exception as error:  # an exporter's or the disk's, too: the others go on
                    known = isinstance(error, PeerFailed | ValueError)
                    rows[name]["error"] = str(error) if known else f"{type(error).__name__}: {error}"
                    say(f"  {name}: {rows[name]['error']}")
        say(f"  timing {len(workers)} of {len(peers)}")
        comparison, errors = alternate({name: worker.sample for name, worker in workers.items()}, rounds)
        for name, worker in workers.items():
            rows[name] |= record.said(worker, rounds)
            if name in errors:
                rows[name]["error"] = errors[name]
            else:
                rows[name] |= {"warmup": WARMUP, "ok": True} | record.timed(comparison, name)
    return [rows[name] for name in peers]
