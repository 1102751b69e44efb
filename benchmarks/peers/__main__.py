"""Other engines beside ours: every engine and network of the list, on the same weights and inputs, in turns.

    ./reproduce.sh peers                                             # all networks, all engines, 1 and 2 threads: hours
    ./reproduce.sh peers --networks resnet18 --threads 1 --peers onnxruntime ncnn
    ./reproduce.sh peers --list                                      # the engines, and what is left to measure

On its first use an engine is installed into an environment of its own (that needs a package index). All run float32,
batch 1, 224x224, on the same pinned CPUs; outputs are checked against PyTorch's before anything is timed; one sample
each per round. Rows go to data/measured/host/peers.csv as soon as they are there: what is in it is not measured again
(`--again`: after a change of our compiler, too), so a killed run goes on where it was. What fails leaves a row with
its error.
"""

import argparse
from pathlib import Path

import pandas as pd

from benchmarks.peers import record
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.contest import contest
from benchmarks.peers.subject import NETWORKS
from nbs_lib.models import MODELS

SHOWN = ["engine", "engine_version", "reached_rate", "median_ms", "mad_ms", "ratio", "ratio_lo", "ratio_hi", "error"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="./reproduce.sh peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(MODELS), default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="PEER")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15, help="timed samples of each")
    parser.add_argument("--csv", type=Path, default=record.on_record())
    parser.add_argument("--again", action="store_true", help="measure also what is in the file already")
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    args = parser.parse_args()
    pd.set_option("display.width", 200, "display.max_columns", 20, "display.max_rows", 100)
    peers = {name: PEERS[name] for name in args.peers}
    for threads in args.threads:
        for network in args.networks:
            names = list(peers) if args.again else record.missing(args.csv, peers, network, threads)
            if args.list or not names:
                print(f"{network}, {threads} thread(s): {', '.join(names) or 'all there'}", flush=True)
                continue
            rows = contest(network, threads, args.csv, names, args.rounds, say=lambda text: print(text, flush=True))
            print(rows[SHOWN].round(3).to_string(index=False, na_rep=""), flush=True)


if __name__ == "__main__":
    main()
