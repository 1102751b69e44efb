"""How right the latency model is: whole networks under random mappings, none of which it has seen.

    python benchmarks/latency_model.py --budget 600 --mappings 12

Builds the model (from record where this machine has been measured), then compiles and measures every network under
each random mapping, and prints the share of predictions within 5, 10 and 15 %, the RMSPE and the rank correlation,
within each network and over all. A refusal is a miss.
"""

import argparse
import time

import heldout
import torch

from nbs_lib.latency import LatencyModel
from nbs_lib.models import build


def main() -> None:
    """Print the scores; `--rows` keeps the single predictions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50", "mobilenet_v2", "vgg16"])
    parser.add_argument("--mappings", type=int, default=12, help="of each network")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds to build the model in")
    parser.add_argument("--settings", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", help="file of the measured settings (default: the cache folder)")
    parser.add_argument("--rows", help="CSV file for the single predictions")
    arguments = parser.parse_args()
    began = time.perf_counter()
    model = LatencyModel.build("host", arguments.threads, arguments.budget, arguments.settings, arguments.cache)
    print(f"{len(model.rows)} settings of {model.cpu}, {model.engine}, in {time.perf_counter() - began:.0f} s\n")
    inputs = {name: torch.randn(1, 3, 224, 224) for name in arguments.networks}
    networks = {name: (build(name).eval(), x) for name, x in inputs.items()}
    rows = heldout.check(model, networks, arguments.mappings, arguments.seed)
    if arguments.rows:
        rows.to_csv(arguments.rows, index=False)
    print(heldout.score(rows).round(2).to_string())


if __name__ == "__main__":
    main()
