"""What the algorithms that train have in common: train under a hook, project, retrain what is left under the masks."""

from dataclasses import replace
from inspect import signature
from numbers import Integral
from pathlib import Path
from zlib import crc32

import pandas as pd
import torch
from torch import nn
from torch.utils import _pytree as pytree

from nbs_lib.pruning.masks import Masks
from nbs_lib.pruning.targets import Target, find_weight
from nbs_lib.train import Hook, fit, refresh_batch_norm


class Checked(Hook):
    """A hook whose checkpoints must agree on `settings` (plain values by name)."""

    def __init__(self, settings: dict[str, float | str]):
        self.settings = settings

    def state_dict(self) -> dict:
        return {"settings": self.settings}

    def load_state_dict(self, state: dict) -> None:
        found, wanted = state.get("settings", {}), self.settings
        if odd := [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]:
            wanted, found = ({key: settings.get(key) for key in odd} for settings in (wanted, found))
            raise ValueError(f"Expected a checkpoint of {wanted}, or another folder. Got one of {found}.")


class Penalty(Checked):
    """A hook over the weights of `targets`. `kept`: its attributes that a checkpoint holds, values or by layer."""

    kept: tuple[str, ...] = ("scales",)

    def __init__(self, model: nn.Module, targets: dict[str, Target], **settings: float | str):
        choices = {layer: str(target.choice) for layer, target in targets.items()}
        numbers = {name: value if isinstance(value, str) else float(value) for name, value in settings.items()}
        super().__init__(choices | numbers)
        self.targets = targets
        self.weights = {layer: find_weight(model, layer)[0] for layer in targets}
        squares = {layer: weight.detach().double().square().mean() for layer, weight in self.weights.items()}
        self.scales = {layer: max(float(square), 1e-30) for layer, square in squares.items()}

    def current(self) -> dict[str, Target]:
        """The targets with the weights as they are now."""
        weights = {layer: weight.detach().float().cpu().numpy() for layer, weight in self.weights.items()}
        return {layer: replace(target, weight=weights[layer]) for layer, target in self.targets.items()}

    def state_dict(self) -> dict:
        return super().state_dict() | {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        device = next((weight.device for weight in self.weights.values()), None)
        for name in self.kept:
            setattr(self, name, pytree.tree_map_only(torch.Tensor, lambda value: value.to(device), state[name]))


class Groups:
    """The groups of one layer's scheme on torch's side: energies per group, and back to the weight's shape."""

    def __init__(self, target: Target, weight: nn.Parameter, families: slice):
        ids = target.choice.scheme.groups(target.weight.shape, target.groups)
        families = ids[families] if ids.ndim > target.weight.ndim else ids[None]  # Block has row and column segments
        self.weight = weight
        self.families = [torch.as_tensor(family.copy()).to(weight.device) for family in families]
        self.sizes = [torch.bincount(family.flatten()).float() for family in self.families]

    def energies(self) -> list[torch.Tensor]:
        """||w_g||^2, float32 (G,), by family."""
        square = self.weight.detach().float().square().flatten()
        pairs = zip(self.families, self.sizes, strict=True)
        return [torch.zeros_like(size).index_add_(0, ids.flatten(), square) for ids, size in pairs]

    def spread(self, values: list[torch.Tensor]) -> torch.Tensor:
        """The sum over the families of each weight's group's value, of the weight's shape."""
        return sum(value[ids] for ids, value in zip(self.families, values, strict=True))


def checked(data, epochs: int, retrain_epochs: int, lr: float = 0.02, **options) -> int:
    """Batches of a training epoch. Raises ValueError, and TypeError for an option that `fit` does not know."""
    if data is None:
        raise ValueError("Expected data= for an algorithm that trains, such as nbs.load_data('digits'). Got None.")
    if not all(isinstance(count, Integral) and count >= 0 for count in (epochs, retrain_epochs)) or not lr > 0:
        rule = "Expected whole epochs and retrain_epochs >= 0, and lr > 0."
        raise ValueError(f"{rule} Got {epochs!r}, {retrain_epochs!r} and {lr!r}.")
    signature(fit).bind(None, data, epochs, lr=lr, **options)
    return len(data.train)


def train_under(hook: Hook, model: nn.Module, data, epochs: int, name: str = "penalty", **options) -> pd.DataFrame:
    """Train under a hook, at a constant `lr` (0.02) unless options, those of `fit`, say otherwise; the history."""
    return _fit(model, data, epochs, name, hook=hook, **{"lr": 0.02, "schedule": "constant"} | options)


def retrain(model: nn.Module, masks: Masks, histories: list[pd.DataFrame], data, epochs: int, **options) -> Masks:
    """Zero what the masks do not keep, train the rest for `epochs` (cosine from `lr`), refresh the batch norms.

    The masks get all histories, a column `phase` telling them apart."""
    options = {"lr": 0.02} | options | {"schedule": "cosine", "seed": options.get("seed", 0) + 1_000_003}
    hook = Checked({layer: crc32(mask.cpu().numpy().tobytes()) for layer, mask in masks.items()})
    with masks.hold(model):
        histories = [*histories, _fit(model, data, epochs, "retrain", hook=hook, **options)]
    refresh_batch_norm(model, data)
    masks.history = pd.concat([history for history in histories if len(history)] or histories, ignore_index=True)
    return masks


def _fit(model: nn.Module, data, epochs: int, phase: str, checkpoint=None, log=None, **options) -> pd.DataFrame:
    """`fit`, with the checkpoint and the log of this phase in the folders of these names."""
    files = {"checkpoint": checkpoint and Path(checkpoint) / f"{phase}.pt", "log": log and Path(log) / f"{phase}.csv"}
    return fit(model, data, epochs, **files, **options).assign(phase=phase)
