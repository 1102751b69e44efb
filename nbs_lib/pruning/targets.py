"""From the layer names of a mapping to the weights of a model: the border torch -> NumPy of pruning."""

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from nbs_lib.schemes import Choice, Pattern


@dataclass(frozen=True, eq=False)
class Target:
    """What an algorithm prunes: a layer's weight (float32, (P, Q) or (P, Q, Kh, Kw)), Choice and convolution groups."""

    weight: np.ndarray
    choice: Choice
    groups: int


def find_weight(model: nn.Module, layer: str) -> tuple[nn.Parameter, nn.Module]:
    """The parameter a layer name means, a module's `weight` or a parameter's own path, and the module that owns it."""
    for path in (f"{layer}.weight".lstrip("."), layer):
        with suppress(AttributeError):
            return model.get_parameter(path), model.get_submodule(path.rpartition(".")[0])
    known = [path.removesuffix(".weight") for path, weight in model.named_parameters() if weight.ndim in (2, 4)]
    raise KeyError(f"Expected a layer out of {', '.join(known)}. Got {layer!r}, which has no plain weight parameter.")


def targets(model: nn.Module, mapping: dict[str, Choice]) -> dict[str, Target]:
    """The checked targets of a mapping, Patterns fitted. Raises as `prune` says; TypeError for what is no Choice."""
    groups = {row["layer"]: row["groups"] for row in getattr(mapping, "layers", ())}  # where no module has them
    found = {}
    for layer, choice in mapping.items():
        if not isinstance(choice, Choice):
            raise TypeError(f"Expected a Choice(scheme, rate) for layer {layer!r}. Got {choice!r}.")
        weight, module = find_weight(model, layer)
        conv_groups = groups.get(layer, getattr(module, "groups", 1))
        found[layer] = target = Target(weight.detach().float().cpu().numpy(), choice, conv_groups)
        try:
            choice.scheme.checked(target.weight, target.groups)
        except ValueError as error:
            raise ValueError(f"Layer {layer!r}: {error}") from error
    return fitted(found)


def fitted(targets: dict[str, Target]) -> dict[str, Target]:
    """The targets, each Pattern without patterns fitted over all layers that have it."""
    for scheme in {target.choice.scheme for target in targets.values()}:
        if isinstance(scheme, Pattern) and scheme.patterns is None:
            alike = {layer: target for layer, target in targets.items() if target.choice.scheme == scheme}
            best = scheme.fit(target.weight for target in alike.values())
            targets = targets | {k: replace(old, choice=Choice(best, old.choice.rate)) for k, old in alike.items()}
    return targets
