"""How near the rule comes to the fastest mapping the exact solver finds at the same predicted accuracy (mapping 5.2).

    python benchmarks/mapping.py                                     # MobileNet-V2, ResNet-50 and VGG-16, 224 pixels
    python benchmarks/mapping.py --budget 600 --rate 4               # ten minutes for what the latency model lacks
    python benchmarks/mapping.py --model latency.json --dense        # layers may also stay dense
    python benchmarks/mapping.py --networks resnet20 --size 32 --checkpoint resnet20.pt --data folder:cifar10

Times are predicted by the latency model, which measures the settings it has no rows of, for --budget seconds. Accuracy
is the proxy, the energy that pruning removes; with --checkpoint and --data it is measured: one-shot drops of one layer
at a time, on training images held out, and the rank correlation of both is printed. `map_s`: seconds of the rule.
"""

import argparse
import time

import pandas as pd
import torch

import nbs_lib as nbs
from nbs_lib import models
from nbs_lib.latency import LatencyModel, NoData
from nbs_lib.mapping.drops import energy_drops, layer_drops
from nbs_lib.mapping.exact import rule_against_exact
from nbs_lib.mapping.rule import BETA, TASKS, layer_choices, rule_mapping


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet50", "vgg16"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rate", type=float, default=8.0, help="total / kept weights of every mapped layer")
    parser.add_argument("--beta", type=float, default=BETA)
    parser.add_argument("--size", type=int, default=224, help="pixels, height and width of the image")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for settings that are not on record")
    parser.add_argument("--model", help="a latency model saved before, instead of building one")
    parser.add_argument("--dense", action="store_true", help="the exact solver may leave layers dense")
    parser.add_argument("--checkpoint", help="trained weights of the one network given")
    parser.add_argument("--data", help="data set the drops are measured on, as load_data takes it")
    parser.add_argument("--share", type=float, default=0.04, help="of the training images, to measure drops on")
    parser.add_argument("--drops", help="file that keeps the measured drops; a killed run goes on from it")
    args = parser.parse_args()
    build = {"threads": args.threads, "budget_s": args.budget}
    model = LatencyModel.load(args.model) if args.model else LatencyModel.build(**build)
    print(f"latency model: {len(model.rows)} settings, {model.device}, {model.cpu}, threads: {model.threads}")
    pd.set_option("display.width", 200, "display.max_columns", 20)
    for name in args.networks:
        for task in args.tasks:
            print(f"\n{name}, {task} task, {args.rate:g}x, beta {args.beta:g}")
            try:
                print(compared(name, task, model, args).round(4).to_string(index=False))
            except NoData as refusal:
                print(f"refused: {refusal}")


def compared(name: str, task: str, model: LatencyModel, args) -> pd.DataFrame:
    """The table of `rule_against_exact`, and `map_s`."""
    torch.manual_seed(0)
    network = models.build(name).eval()
    if args.checkpoint:
        models.load_checkpoint(network, args.checkpoint)
    graph = nbs.trace(network, torch.zeros(1, 3, args.size, args.size))
    settled = {"task": task, "rate": args.rate}
    began = time.perf_counter()
    rule_mapping(graph, model, args.beta, **settled)
    took = time.perf_counter() - began
    options, drops = layer_choices(graph, **settled)[0], None
    options = {layer: [*listed, None] for layer, listed in options.items()}
    if args.data:
        drops = layer_drops(network, nbs.load_data(args.data), graph, options, args.share, checkpoint=args.drops)
        told = pd.DataFrame({"measured": flat(drops), "proxy": flat(energy_drops(graph, options))}).dropna()
        within = told.groupby(level=0).corr("spearman").xs("proxy", level=1)["measured"].mean()
        over = told.corr("spearman").loc["measured", "proxy"]
        print(f"rank correlation, measured drop and proxy: {over:.2f} over all, {within:.2f} within layers (mean)")
    return rule_against_exact(graph, model, args.beta, **settled, drops=drops, dense=args.dense)[0].assign(map_s=took)


def flat(drops: dict) -> dict[tuple[str, str], float]:
    """Drops by (layer, choice), those of dense layers left out."""
    return {(layer, str(choice)): drop for layer, each in drops.items() for choice, drop in each.items() if choice}


if __name__ == "__main__":
    main()
