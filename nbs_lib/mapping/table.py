"""Mapping: a dict {layer name: Choice} that also knows why, and which layers it leaves out. Round-trips as JSON."""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from nbs_lib.paths import reading, write_atomic
from nbs_lib.schemes import Choice, Scheme


class Mapping(dict):
    """{layer name: Choice}; a layer left unpruned is absent. `layers`: a plain dict for every layer of the network
    (layer, kind, shape, groups, macs, reason)."""

    def __init__(self, choices: dict[str, Choice] | Iterable = (), layers: Iterable[dict] = ()):
        super().__init__(choices)
        self.layers = list(layers)

    def report(self) -> pd.DataFrame:
        """One row per layer of the network: layer, kind, shape, macs (dense, per image), scheme, nominal rate, reason.
        Layers left out have the scheme "dense" and rate 1."""
        known = {row["layer"]: row for row in self.layers}
        chosen = {name: {"scheme": str(choice.scheme), "rate": choice.rate} for name, choice in self.items()}
        dense = {"scheme": "dense", "rate": 1.0}
        rows = [known.get(name, {"layer": name}) | chosen.get(name, dense) for name in known | chosen]
        return pd.DataFrame(rows, columns=["layer", "kind", "shape", "macs", "scheme", "rate", "reason"])

    def to_json(self) -> dict:
        """Plain dict; `from_json` is its inverse."""
        return {"choices": {name: choice.to_json() for name, choice in self.items()}, "layers": self.layers}

    @staticmethod
    def from_json(data: dict) -> "Mapping":
        choices = {name: Choice.from_json(choice) for name, choice in data["choices"].items()}
        return Mapping(choices, [row | {"shape": tuple(row["shape"])} for row in data["layers"]])

    def save(self, path: str | Path) -> Path:
        """Write the JSON form, atomically."""
        return write_atomic(path, json.dumps(self.to_json(), indent=1))

    @staticmethod
    def load(path: str | Path) -> "Mapping":
        """Read what `save` wrote. Raises ValueError naming the file where it holds something else."""
        with reading(path, "a mapping written by Mapping.save"):
            return Mapping.from_json(json.loads(Path(path).read_text()))


def candidates(graph, conv, linear, ignored_layers: Iterable[str]) -> tuple[dict[str, Scheme], list[dict]]:
    """Which layers of the graph get which scheme, as `uniform_mapping` says, and every layer's row for the report."""
    options = {"conv": _listed(conv), "linear": _listed(linear), "depthwise": ()}
    check_layers(graph, ignored := set(ignored_layers), "ignored_layers")
    schemes, rows = {}, []
    for layer in graph.layers.values():
        refusals = {scheme: scheme.legal(layer)[1] for scheme in options[layer.kind]}
        if layer.name in ignored:
            reason = "ignored on request"
        elif layer.kind == "conv" and layer.Q * layer.groups < 4:
            reason = "stem: fewer than 4 input channels"
        elif legal := [scheme for scheme, refusal in refusals.items() if not refusal]:
            schemes[layer.name], reason = legal[0], ""
        else:
            reason = "; ".join(refusals.values()) or f"{layer.kind} layers are left dense"
        facts = {"layer": layer.name, "kind": layer.kind, "shape": tuple(layer.shape), "groups": layer.groups}
        rows.append(facts | {"macs": int(layer.macs), "reason": reason})
    return schemes, rows


def check_layers(graph, given: Iterable[str], what: str = "layers") -> None:
    """Raise KeyError for layers that the graph has not; `what` they are given as."""
    if unknown := set(given) - set(graph.layers):
        raise KeyError(f"Expected {what} out of {', '.join(graph.layers)}. Got {', '.join(sorted(unknown))}.")


def fits(scheme: Scheme, layer, rate: float = 1.0) -> bool:
    """Whether the scheme's block is no larger than the layer (of a convolution group), and one of it, at one place of
    the kernel, is left at the rate. What has no blocks always fits as one of 1 x 1."""
    p, q = getattr(scheme, "p", 1), getattr(scheme, "q", 1)
    return p <= layer.P // layer.groups and q <= layer.Q and p * q * rate <= layer.params


def _listed(given: Scheme | list[Scheme] | tuple[Scheme, ...] | None) -> tuple[Scheme, ...]:
    schemes = tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (given,)
    if not all(isinstance(scheme, Scheme) for scheme in schemes):
        raise TypeError(f"Expected a scheme such as BlockPunched(8, 4), several, or None. Got {given!r}.")
    return schemes
