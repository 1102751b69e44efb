"""Masks: which weights of which layers are kept, and the choices that led to them. They never enter the model."""

import json
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch as st
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nbs_lib.paths import reading, write_atomic
from nbs_lib.pruning.targets import find_weight
from nbs_lib.schemes import Choice


class Masks(dict):
    """{layer: bool tensor of its weight's shape, True = kept}; also by layer, `choices` and convolution `groups`.

    What trained them adds: `history` (DataFrame, a row per epoch) and, where a penalty set the rates, `energies`
    ({layer: relative energies of its groups at the cut}) and `tau_rates` ({threshold: rate}, around the one used)."""

    def __init__(self, masks: dict, choices: dict[str, Choice], groups: dict[str, int]):
        super().__init__({layer: torch.as_tensor(mask, dtype=torch.bool) for layer, mask in masks.items()})
        self.choices, self.groups = choices, groups
        self.history, self.energies, self.tau_rates = None, {}, {}

    @property
    def rate(self) -> float:
        """Total / kept weights of all layers together; 1.0 without any."""
        kept = sum(int(mask.sum()) for mask in self.values())
        return sum(mask.numel() for mask in self.values()) / kept if kept else 1.0

    def summary(self, per_block: bool = False) -> pd.DataFrame:
        """A row per layer: layer, scheme, rate (reached), kept, total, nominal_rate, bound (as in `bounds`, or "").

        per_block: a row per block of it instead, with its number `block` and without `bound`."""
        rows = []
        for layer, mask in self.items():
            choice, kept = self.choices[layer], mask.cpu().numpy()
            blocks = choice.scheme.blocks(kept.shape, self.groups[layer]) if per_block else np.zeros(kept.shape, int)
            totals = np.bincount(blocks.ravel()).tolist()
            pairs = enumerate(zip(np.bincount(blocks[kept], minlength=len(totals)).tolist(), totals, strict=True))
            rows += [(layer, str(choice.scheme), b, t / k if k else np.inf, k, t, choice.rate) for b, (k, t) in pairs]
        table = pd.DataFrame(rows, columns=["layer", "scheme", "block", "rate", "kept", "total", "nominal_rate"])
        bounds = {} if per_block else self.bounds()
        return table if per_block else table.drop(columns="block").assign(bound=[bounds.get(k, "") for k in self])

    def bounds(self) -> dict[str, str]:
        """The layers at a bound, and which: "nothing pruned", or "all but the strongest group pruned"."""
        found = {}
        for layer, mask in self.items():
            if mask.all():
                found[layer] = "nothing pruned"
            elif mask.any():
                ids = self.choices[layer].scheme.groups(tuple(mask.shape), self.groups[layer])
                alive = ids.reshape(-1, *mask.shape)[:, mask.cpu().numpy()]  # by family, of each weight kept
                if (alive == alive[:, :1]).all(axis=1).any():
                    found[layer] = "all but the strongest group pruned"
        return found

    def apply(self, model: nn.Module) -> None:
        """Zero what is not kept, in place. Raises KeyError or ValueError for a layer or shape the model lacks."""
        with torch.no_grad():
            for weight, mask in list(self._weights(model)):
                weight.masked_fill_(~mask, 0.0)

    def hold(self, model: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Keep the pruned weights zero while the model trains, whatever momentum and weight decay do.

        Applies the masks now and after each step of any torch optimizer, until the handle's `remove()`, the end of its
        `with` block or of the model. After an update made otherwise, call `apply`."""
        self.apply(model)
        alive = weakref.ref(model)
        handle = register_optimizer_step_post_hook(lambda *_: alive() is not None and self.apply(alive()))
        weakref.finalize(model, handle.remove)
        return handle

    def save(self, folder: str | Path) -> None:
        """Write masks.safetensors (uint8) and masks.json (choice, groups, kept weights by layer), each atomically."""
        tensors = {layer: mask.to("cpu", torch.uint8).contiguous() for layer, mask in self.items()}
        facts = {k: self.choices[k].to_json() | {"groups": self.groups[k], "kept": int(self[k].sum())} for k in self}
        write_atomic(Path(folder) / "masks.safetensors", st.save(tensors))
        write_atomic(Path(folder) / "masks.json", json.dumps(facts, indent=1))

    @staticmethod
    def load(folder: str | Path) -> "Masks":
        """Read what `save` wrote. Raises ValueError naming the folder where the files are damaged or do not match."""
        with reading(folder, "masks written by Masks.save"):
            tensors = st.load_file(Path(folder) / "masks.safetensors")
            facts = json.loads((Path(folder) / "masks.json").read_text())
            if {layer: int(mask.sum()) for layer, mask in tensors.items()} != {k: f["kept"] for k, f in facts.items()}:
                raise ValueError("masks.json describes other masks")
            choices = {layer: Choice.from_json(fact) for layer, fact in facts.items()}
            return Masks({k: tensors[k] for k in facts}, choices, {k: f["groups"] for k, f in facts.items()})

    def _weights(self, model: nn.Module):
        for layer, mask in self.items():
            weight, _ = find_weight(model, layer)
            if weight.shape != mask.shape:
                raise ValueError(f"Expected layer {layer!r} of shape {tuple(mask.shape)}. Got {tuple(weight.shape)}.")
            self[layer] = mask.to(weight.device)
            yield weight, self[layer]


def save_pruned(folder: str | Path, model: nn.Module, masks: Masks) -> None:
    """Write the masks and model.safetensors, a plain state_dict. Raises ValueError where a pruned weight is not 0."""
    if any(weight[~mask].any() for weight, mask in masks._weights(model)):
        raise ValueError("Expected pruned weights to be zero. Got others: use masks.apply(model), or train under hold.")
    masks.save(folder)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomic(Path(folder) / "model.safetensors", st.save(tensors))


def load_pruned(folder: str | Path, model: nn.Module) -> Masks:
    """Load what `save_pruned` wrote into a model of the same architecture; returns the masks."""
    model.load_state_dict(st.load_file(Path(folder) / "model.safetensors"))
    return Masks.load(folder)
