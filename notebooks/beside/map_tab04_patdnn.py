"""Mapping Table 4: what a candidate of its searches is worth without training, by a latency model and a proxy.

It stands in for `Evaluator` where training every candidate takes GPU-days: it ranks mappings, and measures nothing."""

from nbs_lib.latency.structure import dead_share
from nbs_lib.mapping.drops import energy_drops
from nbs_lib.mapping.evaluate import Schemes, mapping_id
from nbs_lib.mapping.printed import printed_mapping
from nbs_lib.mapping.search import SCHEMES, legal_schemes
from nbs_lib.mapping.table import Mapping
from nbs_lib.schemes import BlockPunched, Choice, Pattern

# Ours. Accuracy lost per share of energy removed: a line through 0 and what ResNet-20 lost at 4x, `reweighted`, with
# filter, 8x4, 4x4 and 1x1 (`data/trained/folder-cifar10-jpeg.csv`), over their mean `energy_drops` on random weights.
SLOPE = 0.13


class Predicted:
    """Evaluates lists of {layer: scheme}, as `Evaluator` does: reward = accuracy - weight * ms / dense_ms.

    goal: a row's rate, macs and digit, at which `printed_mapping` gives the schemes their rates. accuracy: 1 - slope *
    the mean of the mapped layers' `energy_drops`, so of an unpruned network's. ms: the sum of the network's steps, each
    as `latency` predicts it with its layer's scheme in all layers that can have it, so that a candidate takes
    microseconds; `latency.predict` of what is found is the whole network's. `legal`: as `legal_schemes`, at the goal's
    rate, of convolutions, without what is likely to leave more than the share `dead` of a layer's filters or channels
    without a weight (`Filter` and `Channel` do), and without patterns where no mapping with them leaves the row's MACs.
    `drops` are those of `exact_mapping`, to which `self` is the latency model, at `exact_weight`; where patterns change
    the rates of other layers, the solver may mix both, so that what it finds is a bound and no candidate."""

    def __init__(self, graph, latency, goal: dict, schemes=SCHEMES, weight=0.2, slope=SLOPE, dead=0.15):
        self.graph, self.weight, self.slope = graph, weight, slope
        linear = [layer.name for layer in graph.layers.values() if layer.kind == "linear"]
        legal = {name: found for name, found in legal_schemes(graph, schemes, linear, goal["rate"]).items() if found}
        hard = {name: next((s for s in found if isinstance(s, Pattern)), None) for name, found in legal.items()}
        given = {False: dict.fromkeys(legal, BlockPunched(1, 1))}
        given |= {True: {name: scheme or BlockPunched(1, 1) for name, scheme in hard.items()}}
        told = {key: printed_mapping(graph, chosen, **goal) for key, chosen in given.items()}
        if not any(hard.values()) or ("alone" in told[True][1] and "alone" not in told[False][1]):
            del told[True]
        self.rates = {key: {name: choice.rate for name, choice in found.items()} for key, (found, _) in told.items()}
        alive = {name: [s for s in found if self._lives(name, s, dead)] for name, found in legal.items()}
        self.legal = legal = {name: found for name, found in alive.items() if found}
        steps = latency.predict_layers(graph, {})
        self.dense_ms, self.rest = float(steps.ms.sum()), float(steps.ms[~steps.layer.isin(legal)].sum())
        self.ms, self.drops = ({name: {} for name in legal} for _ in range(2))
        for key, rates in self.rates.items():
            for scheme in {s: 0 for found in self.legal.values() for s in found if key or not isinstance(s, Pattern)}:
                alike = {name: Choice(scheme, rates[name]) for name, found in self.legal.items() if scheme in found}
                times = latency.predict_layers(graph, alike).groupby("layer").ms.sum()
                lost = energy_drops(graph, {name: [choice] for name, choice in alike.items()})
                for name, choice in alike.items():
                    self.ms[name][choice], self.drops[name][choice] = float(times[name]), lost[name][choice]

    @property
    def exact_weight(self) -> float:
        """The weight at which `exact_mapping` maximises this reward: its drops are summed, these averaged."""
        return self.weight * len(self.legal) / self.slope

    def __call__(self, batch: list[Schemes]) -> list[dict]:
        """A row per candidate, as `Evaluator` gives it, and its drop, the mean over the mapped layers."""
        rows = []
        for schemes in batch:
            rates = self.rates[any(isinstance(scheme, Pattern) for scheme in schemes.values())]
            mapping = Mapping({name: Choice(scheme, rates[name]) for name, scheme in schemes.items()})
            ms = self.rest + sum(self.ms[name][choice] for name, choice in mapping.items())
            drop = sum(self.drops[name][choice] for name, choice in mapping.items()) / len(mapping)
            row = {"mapping": mapping, "id": mapping_id(schemes), "ms": ms, "drop": drop} | self.worth(ms, drop)
            rows.append(row | {"seconds": 0.0, "timed": "predicted", "error": ""})
        return rows

    def worth(self, ms: float, drop: float) -> dict[str, float]:
        """Accuracy and reward at a time and a mean drop."""
        accuracy = 1 - self.slope * drop
        return {"accuracy": accuracy, "reward": accuracy - self.weight * ms / self.dense_ms}

    def _lives(self, name: str, scheme, dead: float) -> bool:
        if isinstance(scheme, Pattern) and True not in self.rates:
            return False
        layer, rate = self.graph[name], max(rates[name] for rates in self.rates.values())
        return dead_share(Choice(scheme, rate), layer.P, layer.Q, layer.Kh * layer.Kw) <= dead

    def predict(self, graph, mapping) -> float:
        """ms of the dense network: all that `exact_mapping` asks for."""
        return self.dense_ms

    def layer_ms(self, layer, choices: list[Choice]) -> list[float]:
        """ms of one layer under several of the choices on record."""
        return [self.ms[layer.name][choice] for choice in choices]
