"""Ours: the network compiled by `nbs_lib` with its default tiles, in the project's own environment."""

import json
from pathlib import Path

PACKAGE, REQUIREMENTS, FORM = "prunemap", "", "safetensors"


def load(model: Path, x, threads: int, cache: Path):
    import safetensors
    import torch

    import nbs_lib as nbs
    from nbs_lib.models import build, load_checkpoint

    with safetensors.safe_open(model, "pt") as file:
        about = file.metadata()
    torch.set_num_threads(threads)
    network = load_checkpoint(build(about["network"]), model).eval().requires_grad_(False)
    mapping = nbs.Mapping.from_json(json.loads(about["mapping"]))
    net = nbs.compile(network, torch.from_numpy(x), threads=threads, mapping=mapping, tuning=False)

    def infer():
        return net(x)

    steps = net.explain()
    removed = int(steps["removed_macs"].sum())  # they met only zeros, and are among the effective MACs of the row
    infer.settings = {"fallback_macs": net.fallback_macs, "removed_macs": removed, "steps": len(steps)}
    return infer
