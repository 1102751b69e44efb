"""How much of the bare training speed `fit` keeps: images per second of an epoch over those of forward and backward
passes on one resident batch, for the CIFAR form of ResNet-20, in turns.

    python benchmarks/training.py --rounds 5 --images 5120 --threads 2
"""

import argparse
import copy
import time

import numpy as np
import torch
import torch.nn.functional as F

from nbs_lib import clock
from nbs_lib.data import Batches, Data
from nbs_lib.models import build
from nbs_lib.train import bfloat16_pays, fit


def main() -> None:
    """Print both speeds, images per second, and the median of the rounds' ratios with its extremes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--images", type=int, default=5120, help="images of an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = torch.randint(0, 256, (arguments.images, 3, 32, 32), dtype=torch.uint8)
    train = Batches(images, torch.randint(0, 10, (arguments.images,)), arguments.batch_size, True, crop=4, flip=True)
    data = Data("random", train, Batches(images[:100], train.labels[:100]), tuple(map(str, range(10))))
    model = build(arguments.network)
    speeds = []
    with clock.lock():
        for count in range(arguments.rounds + 1):
            whole = fit(copy.deepcopy(model), data, 1, test_every=0, device="cpu", progress=False).images_per_s[0]
            speeds.append((bare(copy.deepcopy(model), next(iter(train)), len(train)), whole))
            print("warm-up" if not count else f"round {count}", *(f"{speed:.0f} images/s" for speed in speeds[-1]))
    ratios = [whole / alone for alone, whole in speeds[1:]]
    spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
    print(f"fit / bare forward and backward: {np.median(ratios):.2f} {spread}, threads: {arguments.threads}")


def bare(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], steps: int) -> float:
    """Images per second of forward and backward passes alone, in the formats `fit` chooses."""
    images, labels = batch
    if mixed := bfloat16_pays(torch.device("cpu")):
        images = images.contiguous(memory_format=torch.channels_last)
        model.to(memory_format=torch.channels_last)
    model.train()
    began = time.perf_counter()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        model.zero_grad()
    return steps * len(labels) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
