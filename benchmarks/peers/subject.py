"""The networks that all engines run: random weights (latency needs no trained ones), dense and pruned by each scheme.

Networks that the papers prune are pruned at the papers' rates, the others at MobileNet-V2's: our choice for them.
"""

import io
import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import nbs_lib as nbs
from benchmarks.peers.in_process import flush
from nbs_lib.models import CIFAR, MODELS, build
from nbs_lib.paths import write_atomic
from nbs_lib.schemes import Channel, Filter, Pattern, Unstructured

# Total / kept weights of every pruned CONV layer: NPS section 3 and, for ResNet-50, mapping Table 4.
RATES = {"vgg16": 8.2, "resnet18": 5.3, "resnet50": 4.4, "mobilenet_v2": 1.8}
OTHER_RATE = 1.8  # ours, for networks that the papers do not prune
NETWORKS = [*RATES, "mobilenet_v1", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0"]  # those of the published run
FC = nbs.Block(8, 4)  # a classifier's filters are its classes, and patterns need 3x3 kernels: these leave FC to blocks
VARIANTS = {  # name: the schemes of CONV and FC layers
    "dense": (None, None),
    "block_punched": (nbs.BlockPunched(8, 4), FC),
    "unstructured": (Unstructured(), Unstructured()),
    "pattern": (Pattern(8), FC),
    "filter": (Filter(), FC),
    "channel": (Channel(), FC),
    "paper": (nbs.BlockPunched(8, 4), FC),
}
# "paper": the CONV rate and the CONV MACs that remain in mapping Table 4, where one rate for all would leave others.
REMAINING = {"vgg16": (8.22, 3.5e9), "resnet50": (4.37, 1.6e9), "mobilenet_v2": (1.82, 165e6)}


def exists(name: str, variant: str) -> bool:
    """Whether there is such a variant of the network."""
    return variant != "paper" or name in REMAINING


@dataclass(frozen=True)
class Subject:
    """One variant of one network, in evaluation mode, and one image. Files of it go to `folder` as engines ask."""

    name: str
    variant: str
    folder: Path
    seed: int = 0

    def __post_init__(self):
        for known, got in ((MODELS, self.name), (VARIANTS, self.variant)):
            if got not in known:
                raise KeyError(f"Expected one of {', '.join(known)}. Got {got!r}.")
        if not exists(self.name, self.variant):
            raise ValueError(
                f"Expected one of {', '.join(REMAINING)}, whose remaining MACs are stated. Got {self.name}."
            )

    @cached_property
    def x(self) -> torch.Tensor:
        """(1, 3, 224, 224), or 32 by 32 for a CIFAR form; float32."""
        pixels = 32 if self.name in [make.__name__ for make in CIFAR] else 224
        return torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(self.seed))

    @cached_property
    def _pruned(self) -> tuple[torch.nn.Module, nbs.Mapping, nbs.Graph]:
        torch.manual_seed(self.seed)
        model = build(self.name).eval().requires_grad_(False)
        flush(model)  # denormals slow everybody
        graph, (conv, linear) = nbs.trace(model, self.x), VARIANTS[self.variant]
        if self.variant == "paper":
            mapping = nbs.paper_mapping(graph, *REMAINING[self.name], conv=conv, linear=linear)
        else:
            least = getattr(conv, "min_rate", 1)  # patterns keep 4 of 9 weights at most
            rate = max(RATES.get(self.name, OTHER_RATE), least)
            mapping = nbs.uniform_mapping(graph, rate, conv=conv, linear=linear)
        if conv and not any(graph[layer].kind == "conv" for layer in mapping):
            raise ValueError(f"Expected CONV layers of {self.name} that {conv} can prune. Got none.")
        nbs.prune(model, mapping)
        return model, mapping, nbs.trace(model, self.x) if mapping else graph

    model = property(lambda self: self._pruned[0])
    mapping = property(lambda self: self._pruned[1])
    graph = property(lambda self: self._pruned[2], doc="As pruned: its rates and effective MACs are what was reached.")

    @cached_property
    def wanted(self) -> np.ndarray:
        """PyTorch's output."""
        with torch.inference_mode():
            return self.model(self.x).numpy()

    def file(self, form: str) -> Path:
        """The network as "onnx" (operator set 13, which all read), "pt2" (torch.export) or "safetensors" (the weights;
        its metadata hold the `network`'s name and the `mapping`, as JSON). Written once."""
        path = self.folder / f"{self.name}-{self.variant}.{form}"
        if not path.exists():
            write_atomic(path, getattr(self, f"_{form}")())
        return path

    def _onnx(self) -> bytes:
        options = {"opset_version": 13, "dynamo": False, "input_names": ["input"], "output_names": ["output"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter announces its successor, which needs more packages
            torch.onnx.export(self.model, (self.x,), buffer := io.BytesIO(), **options)
        return buffer.getvalue()

    def _pt2(self) -> bytes:
        torch.export.save(torch.export.export(self.model, (self.x,)), buffer := io.BytesIO())
        return buffer.getvalue()

    def _safetensors(self) -> bytes:
        about = {"network": self.name, "mapping": json.dumps(self.mapping.to_json())}
        return safetensors.torch.save(self.model.state_dict(), about)
