"""Magnitude pruning: what has the least energy per weight under its scheme goes, at once or along a schedule."""

from dataclasses import replace
from inspect import signature

from torch import nn

from nbs_lib.pruning import cut
from nbs_lib.pruning.masks import Masks
from nbs_lib.pruning.targets import Target
from nbs_lib.pruning.training import Penalty, checked, retrain, train_under
from nbs_lib.schemes import Choice, check_rate
from nbs_lib.train import fit


class Gradual(Penalty):
    """Rates that rise over the epochs, most in the first ones: 1/rate falls with the cube of what is left of them."""

    def __init__(self, model: nn.Module, targets: dict[str, Target], project, **settings: float | str):
        super().__init__(model, targets, **settings)
        self.model, self.project, self.masks = model, project, Masks({}, {}, {})

    def step(self, lr: float) -> None:
        self.masks.apply(self.model)

    def epoch(self, done: int, epochs: int) -> dict[str, float]:
        left = (1 - done / epochs) ** 3
        self.masks = self.project(self.current(), lambda rate: 1 / (1 / rate + (1 - 1 / rate) * left))
        self.masks.apply(self.model)
        return {"rate": self.masks.rate}

    def state_dict(self) -> dict:
        return super().state_dict() | {"masks": dict(self.masks)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.masks = Masks(state["masks"], {}, {})


def magnitude(
    model, targets: dict[str, Target], scope="layer", rate=None, data=None, epochs=0, retrain_epochs=0, **options
) -> Masks:
    """Masks by magnitude. scope="layer": each layer on its own, at its nominal rate.

    scope="global": one threshold on the energy per weight over all targets gives every layer its rate, such that
    together they reach `rate` (by default what the nominal ones amount to); each keeps at least its strongest group.
    epochs: over which the rates rise (gradual pruning); 0: at once. Then `retrain_epochs` with the zeros held;
    options, such as seed, lr and checkpoint (a folder), go to `fit`."""
    if scope not in ("layer", "global") or (scope == "layer" and rate is not None):
        raise ValueError(f"Expected scope='layer', or scope='global' with or without rate. Got {scope!r}, rate {rate}.")

    def project(targets: dict[str, Target], at=lambda rate: rate) -> Masks:
        def eased(choice: Choice) -> Choice:
            return Choice(choice.scheme, max(at(choice.rate), min(choice.rate, choice.scheme.min_rate)))

        targets = {layer: replace(target, choice=eased(target.choice)) for layer, target in targets.items()}
        return cut.by_layer(targets) if scope == "layer" else cut.over_all(targets, None if rate is None else at(rate))

    if rate is not None:
        check_rate(rate)
    if not (epochs or retrain_epochs):
        signature(fit).bind_partial(**options)  # a mistyped option is an error here, too
        return project(targets)
    checked(data, epochs, retrain_epochs, **options)
    hook = Gradual(model, targets, project, scope=scope, rate=rate or 0)
    history = train_under(hook, model, data, epochs, **options)
    return retrain(model, project(hook.current()), [history], data, retrain_epochs, **options)
