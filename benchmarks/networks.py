"""Whole networks, pruned at the papers' rates, against dense engines on the same architecture, alternating in one run.

    python benchmarks/networks.py                                  # all four, one thread, against both dense engines
    python benchmarks/networks.py --networks resnet18 --threads 2  # and our two threads against our one
    python benchmarks/networks.py --mapping paper                  # the papers' rate and their remaining MACs

Random weights: latency does not need trained ones. Prints one row per engine: median ms, the ratio to ours with its
bootstrap interval, the reached CONV-weight rate (void if more than 3 % above nominal), MACs through PyTorch, and the
share of the FMA peak probed in the same run.
"""

import argparse

import pandas as pd
import torch

import nbs_lib as nbs
from nbs_lib import clock
from nbs_lib.kernels.peak import peak_gmacs
from nbs_lib.measure.peers import PEERS
from nbs_lib.models import build

RATES = {"vgg16": 8.2, "resnet18": 5.3, "resnet50": 4.4, "mobilenet_v2": 1.8}  # NPS Table 1; mapping Table 4
REMAINING = {"vgg16": (8.22, 3.5e9), "resnet50": (4.37, 1.6e9), "mobilenet_v2": (1.82, 165e6)}  # mapping Table 4


def mapping_of(graph: nbs.Graph, name: str, kind: str) -> nbs.Mapping:
    if kind == "uniform":
        return nbs.uniform_mapping(graph, RATES[name], conv=nbs.BlockPunched(8, 4), linear=nbs.Block(8, 4))
    rate, macs = REMAINING[name]
    return nbs.paper_mapping(graph, rate, macs, conv=nbs.BlockPunched(8, 4))


def run(name: str, kind: str, threads: int, rounds: int, peers: list[str]) -> pd.DataFrame:
    torch.manual_seed(0)
    model, x = build(name).eval(), torch.randn(1, 3, 224, 224)
    with clock.pin(threads):
        contenders = {peer: PEERS[peer](model, x, threads) for peer in peers}
        mapping = mapping_of(nbs.trace(model, x), name, kind)
        nbs.prune(model, mapping)
        net = nbs.compile(model, x, threads=threads, mapping=mapping)
        with torch.no_grad():
            error = float((net(x) - model(x)).abs().max() / model(x).abs().max())
        if error > 1e-4:
            raise SystemExit(f"{name}: outputs differ by {error:.1e} of the largest. Nothing was timed.")
        contenders["ours"] = net
        if threads > 1:
            contenders["ours, 1 thread"] = nbs.compile(model, x, threads=1, mapping=mapping)
        peak = peak_gmacs()
        array = x.numpy()
        comparison = clock.alternate(
            {label: (lambda f=f: f(array)) for label, f in contenders.items()}, rounds=rounds, min_sample_ms=0
        )
        peak = max(peak, peak_gmacs())
    conv = [layer for layer in net.graph.layers.values() if layer.kind != "linear"]
    reached = sum(layer.params for layer in conv) / sum(layer.nnz for layer in conv)
    rows = []
    for label, timing in comparison.timings.items():
        ratio, low, high = comparison.ratio(label, "ours")
        row = {"network": name, "engine": label, "threads": 1 if "1 thread" in label else threads, "mapping": kind}
        row |= {"median_ms": timing.median_ms, "mad_ms": timing.mad_ms, "over_ours": ratio, "low": low, "high": high}
        if label == "ours":
            row |= {"rate": RATES[name] if kind == "uniform" else REMAINING[name][0], "reached": reached}
            row |= {"effective_mmacs": net.effective_macs / 1e6, "fallback_macs": net.fallback_macs}
            row |= {"share_of_peak": net.effective_macs / timing.median_ms / 1e6 / (peak * threads)}
            row |= {"kernels": net.functions}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(RATES), help="all that the mapping knows")
    parser.add_argument("--mapping", default="uniform", choices=["uniform", "paper"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--csv", help="also write the rows there")
    args = parser.parse_args()
    pd.set_option("display.width", 220, "display.max_columns", 30)
    tables = []
    known = list(RATES if args.mapping == "uniform" else REMAINING)
    unknown = set(args.networks or known) - set(known)
    if unknown:
        parser.error(f"the papers state remaining MACs for {', '.join(known)} only, not for {', '.join(unknown)}")
    for name in args.networks or known:
        tables.append(run(name, args.mapping, args.threads, args.rounds, args.peers))
        print(tables[-1].round(3).to_string(index=False, na_rep=""), flush=True)
    if args.csv:
        pd.concat(tables).to_csv(args.csv, index=False)


if __name__ == "__main__":
    main()
