"""Whole networks, pruned at the papers' rates, against dense engines on the same architecture, alternating in one run.

    python benchmarks/networks.py                                  # all four, one thread, against PyTorch, ONNX Runtime
    python benchmarks/networks.py --networks resnet18 --threads 2  # and our two threads against our one
    python benchmarks/networks.py --mapping paper                  # the papers' rate and their remaining MACs

Random weights: latency does not need trained ones. Prints one row per engine: median ms, the ratio to ours with its
bootstrap interval, the reached CONV-weight rate (void if more than 3 % above nominal), MACs through PyTorch, and the
share of the FMA peak probed in the same run. Then a line per network: the fastest dense peer over ours. All run in this
process: every other engine stands beside ours in `./reproduce.sh peers`.

--peers: dense engines; `--peers` alone: none. --rounds: one sample per engine each. --csv FILE: write the rows there.
"""

import argparse
import functools

import numpy as np
import pandas as pd
import torch

import nbs_lib as nbs
from benchmarks.peers.in_process import PEERS
from benchmarks.peers.subject import RATES, REMAINING
from nbs_lib import clock
from nbs_lib.kernels.peak import peak_gmacs
from nbs_lib.models import build


def mapping_of(graph: nbs.Graph, name: str, kind: str) -> nbs.Mapping:
    if kind == "uniform":
        return nbs.uniform_mapping(graph, RATES[name], conv=nbs.BlockPunched(8, 4), linear=nbs.Block(8, 4))
    rate, macs = REMAINING[name]
    return nbs.paper_mapping(graph, rate, macs, conv=nbs.BlockPunched(8, 4))


def output(model: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model(x).numpy()


def run(name: str, kind: str, threads: int, rounds: int, peers: list[str], dense: bool):
    torch.manual_seed(0)
    model, x = build(name).eval(), torch.randn(1, 3, 224, 224)
    array, mapping = x.numpy(), mapping_of(nbs.trace(model, x), name, kind)
    engines, versions = {}, {}
    with clock.pin(threads):
        for peer in peers:
            engine = PEERS[peer](model, x, threads)
            versions[peer], engines[peer] = engine.version, functools.partial(engine, array)
        if dense:
            engines["ours, dense"] = functools.partial(nbs.compile(model, x, threads=threads), array)
        nbs.prune(model, mapping)
        net = nbs.compile(model, x, threads=threads, mapping=mapping)
        wanted = output(model, x)
        error = float(np.abs(net(array) - wanted).max() / np.abs(wanted).max())
        if error > 1e-4:
            raise SystemExit(f"{name}: outputs differ by {error:.1e} of the largest. Nothing was timed.")
        engines["ours"] = functools.partial(net, array)
        if threads > 1:
            engines["ours, 1 thread"] = functools.partial(nbs.compile(model, x, threads=1, mapping=mapping), array)
        peak = peak_gmacs()
        comparison = clock.alternate(engines, rounds, settle=3)
        with clock.lock():
            steps_ms = np.median(net.times(array, runs=rounds), axis=0)
        peak = max(peak, peak_gmacs()) * threads
    steps = net.explain()
    done, conv = (steps["effective_macs"] - steps["removed_macs"]) / 1e6, (steps["op"] == "conv2d").to_numpy()
    kept, size = sum(layer.nnz for layer in net.graph.layers.values()), net.bytes
    rows = []
    for label, timing in comparison.timings.items():
        ratio, low, high = comparison.ratio(label, "ours")
        row = {"network": name, "engine": label, "version": versions.get(label, nbs.__version__)}
        row |= {"threads": 1 if "1 thread" in label else threads, "mapping": kind}
        row |= {"median_ms": timing.median_ms, "mad_ms": timing.mad_ms, "over_ours": ratio, "low": low, "high": high}
        if label == "ours":
            row |= {"rate": RATES[name] if kind == "uniform" else REMAINING[name][0], "reached": net.graph.rates().conv}
            row |= {"effective_mmacs": done.sum(), "fallback_macs": net.fallback_macs, "kernels": net.functions}
            row |= {"share_of_peak": done.sum() / timing.median_ms / peak}
            row |= {"conv_share": done[conv].sum() / steps_ms[conv].sum() / peak, "peak_gmacs": peak}
            row |= {"packed": size["packed"] / kept / 4, "index": size["index"] / kept / 4}
            row |= {"activation_mb": size["activations"] / 1e6}
        rows.append(row)
    return pd.DataFrame(rows)


def verdict(table: pd.DataFrame) -> str:
    """One network's rows in one line: the fastest dense peer over ours."""
    rows = table.set_index("engine")
    dense, told = (
        rows.drop(["ours", "ours, dense", "ours, 1 thread"], errors="ignore"),
        f"ours {rows.median_ms['ours']:.4g} ms",
    )
    if len(dense):
        best = dense.loc[dense["median_ms"].idxmin()]
        told += f"; fastest dense peer: {best.name} {best.median_ms:.4g} ms, {best.over_ours:.2f} times ours "
        told += f"[{best.low:.2f}, {best.high:.2f}]"
    return f"{table.network[0]}: {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(RATES), help="all that the mapping knows")
    parser.add_argument("--mapping", default="uniform", choices=["uniform", "paper"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--dense", action="store_true", help="our dense network, too")
    parser.add_argument("--csv", help="also write the rows there")
    args = parser.parse_args()
    pd.set_option("display.width", 220, "display.max_columns", 30)
    tables = []
    known = list(RATES if args.mapping == "uniform" else REMAINING)
    unknown = set(args.networks or known) - set(known)
    if unknown:
        parser.error(f"the papers state remaining MACs for {', '.join(known)} only, not for {', '.join(unknown)}")
    for name in args.networks or known:
        tables.append(run(name, args.mapping, args.threads, args.rounds, args.peers, args.dense))
        print(tables[-1].round(3).to_string(index=False, na_rep=""))
        print(verdict(tables[-1]) + "\n", flush=True)
    if args.csv:
        pd.concat(tables).to_csv(args.csv, index=False)


if __name__ == "__main__":
    main()
