"""PEERS: every contender by the name that its rows carry. A peer is a file in `engines/` and a line here."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType

ENGINES = Path(__file__).with_name("engines")
TUNE_S = 300  # seconds that a peer may tune for, per network


@dataclass(frozen=True)
class Peer:
    """A contender: `engine`, its file (a name in `engines/`, or a path), the `variant` of the network whose weights it
    runs (a key of `subject.VARIANTS`), and what else the file's `load` takes."""

    engine: str | Path
    variant: str = "dense"
    options: Mapping = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.engine if isinstance(self.engine, Path) else ENGINES / f"{self.engine}.py"

    @cached_property
    def module(self) -> ModuleType:
        """The engine's file, imported here for its constants alone: it must not import the engine on import."""
        spec = importlib.util.spec_from_file_location(f"peer_{self.file.stem}", self.file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


# Dense engines first. "mnn-sparse" and the like run pruned weights with the engine's own sparse kernels, if it has any.
PEERS = {
    "prunemap": Peer("prunemap"),
    "pytorch": Peer("pytorch"),
    "pytorch-compiled": Peer("pytorch", options={"compiled": True}),
    "onnxruntime": Peer("onnxruntime"),
    "openvino": Peer("openvino"),
    "tvm": Peer("tvm"),
    "tvm-tuned": Peer("tvm", options={"tune_s": TUNE_S}),
    "ncnn": Peer("ncnn"),
    "mnn": Peer("mnn"),
    "litert": Peer("litert"),
    "executorch": Peer("executorch"),
    "deepsparse": Peer("deepsparse"),
    "prunemap-block_punched": Peer("prunemap", "block_punched"),
    "prunemap-paper": Peer("prunemap", "paper"),
    "prunemap-unstructured": Peer("prunemap", "unstructured"),
    "prunemap-pattern": Peer("prunemap", "pattern"),
    "prunemap-filter": Peer("prunemap", "filter"),
    "prunemap-channel": Peer("prunemap", "channel"),
    "mnn-sparse": Peer("mnn", "block_punched", {"sparse": True}),
    "mnn-sparse-unstructured": Peer("mnn", "unstructured", {"sparse": True}),
    "litert-sparse": Peer("litert", "block_punched", {"sparse": True}),
    "deepsparse-block_punched": Peer("deepsparse", "block_punched"),
    "deepsparse-unstructured": Peer("deepsparse", "unstructured"),
}
