"""Ten cascaded layers (mapping 5.2.1's test models): ms per layer and share of the FMA peak.

    python benchmarks/layers.py                                  # block_punched(8x4) at 8x, 1x1 and 3x3, four sizes
    python benchmarks/layers.py --scheme "pattern(8)" --kernels 3
    python benchmarks/layers.py --rate 1                         # dense

Time is that of the ten layers as compiled code takes it, step by step; `call_ms` is a whole call, which also copies the
caller's array into the network's layout and the result out of it. Share = effective MACs / time / peak, the peak probed
in the same run.
"""

import argparse

import numpy as np
import pandas as pd
import torch

import nbs_lib as nbs
from nbs_lib import clock
from nbs_lib.kernels.jit import width
from nbs_lib.kernels.peak import peak_gmacs
from nbs_lib.measure.testnets import cascade, prune_evenly
from nbs_lib.schemes import parse

SIZES = ((56, 64), (28, 128), (14, 256), (7, 512))  # feature map, channels: equal MACs (mapping 6.2)


def run(scheme, rate: float, kernel: int, size: int, channels: int, runs: int) -> dict:
    model, inputs = cascade(channels, channels, size, size, kernel=kernel)
    mapping = prune_evenly(model, scheme, rate) if rate > 1 else {}
    net = nbs.compile(model, inputs, mapping=mapping)
    arrays = [value.numpy() for value in inputs]
    with torch.no_grad():
        difference = np.abs(net(*arrays) - model(*inputs).numpy()).max() / np.abs(net(*arrays)).max()
    with clock.lock(), clock.pin(1):
        peak = peak_gmacs()
        steps = net.profile(*arrays, runs=runs)
        call = clock.time_calls(lambda: net(*arrays), runs=runs)
        peak = max(peak, peak_gmacs())
    specs = net.graph.layers.values()
    layers_ms = steps.loc[steps["chosen"].isin(["sparse", "dense"]), "ms"].sum()
    return {
        "kernel": f"{kernel}x{kernel}", "map": f"{size}x{size}x{channels}", "scheme": str(scheme), "rate": rate,
        "reached": net.graph.rates().conv, "ms_per_layer": layers_ms / len(specs),
        "share_of_peak": (net.effective_macs - steps["removed_macs"].sum()) / layers_ms / 1e6 / peak,
        "call_ms": call.median_ms,
        "lanes_used": size * size / (width() * -(-((size - 1) * (size + kernel // 2) + size) // width())),
        "peak_gmacs": peak, "difference": difference, "fallback_macs": net.fallback_macs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="block_punched(8x4)", type=parse)
    parser.add_argument("--rate", default=8.0, type=float)
    parser.add_argument("--kernels", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--runs", type=int, default=100)
    args = parser.parse_args()
    rows = [run(args.scheme, args.rate, k, *size, args.runs) for k in args.kernels for size in SIZES]
    pd.set_option("display.width", 220, "display.max_columns", 30)
    print(pd.DataFrame(rows).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
