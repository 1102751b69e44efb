"""PruneMap: the best-suited pruning scheme for every layer, compiled to sparse kernels and measured.

`import nbs_lib as nbs` is light; each name below loads its room on first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_ROOMS = {
    "data": ["load_data", "Data"],
    "train": ["fit", "evaluate"],
    "layers": ["trace", "Graph", "LayerSpec"],
    "schemes": ["Unstructured", "Filter", "Channel", "Pattern", "Block", "BlockPunched", "Choice"],
    "pruning": ["prune", "Masks"],
    "compiler": ["compile", "tune", "Network"],
    "measure": ["measure", "compare"],
    "latency": ["LatencyModel"],
    "mapping": ["Mapping", "uniform_mapping", "paper_mapping", "rule_mapping", "search_mapping", "exact_mapping"],
    "trained": ["accuracies", "Setting"],
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'nbs_lib' has no attribute {name!r}")
    value = getattr(import_module(f"nbs_lib.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
