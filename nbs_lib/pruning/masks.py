"""Masks: which weights of which layers are kept, and the choices that led to them. They never enter the model."""

import json
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch as st
import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nbs_lib.paths import write_atomic
from nbs_lib.pruning.targets import find_weight
from nbs_lib.schemes import Choice


class Masks(dict):
    """{layer: bool tensor of its weight's shape, True = kept}; also by layer, `choices` and convolution `groups`."""

    def __init__(self, masks: dict, choices: dict[str, Choice], groups: dict[str, int]):
        super().__init__({layer: torch.as_tensor(mask, dtype=torch.bool) for layer, mask in masks.items()})
        self.choices, self.groups = choices, groups

    def summary(self, per_block: bool = False) -> pd.DataFrame:
        """A row per layer, or per block of it: layer, scheme, [block,] rate (reached), kept, total, nominal_rate."""
        rows = []
        for layer, mask in self.items():
            choice, kept = self.choices[layer], mask.cpu().numpy()
            blocks = choice.scheme.blocks(kept.shape, self.groups[layer]) if per_block else np.zeros(kept.shape, int)
            totals = np.bincount(blocks.ravel()).tolist()
            pairs = enumerate(zip(np.bincount(blocks[kept], minlength=len(totals)).tolist(), totals, strict=True))
            rows += [(layer, str(choice.scheme), b, t / k if k else np.inf, k, t, choice.rate) for b, (k, t) in pairs]
        table = pd.DataFrame(rows, columns=["layer", "scheme", "block", "rate", "kept", "total", "nominal_rate"])
        return table if per_block else table.drop(columns="block")

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
        try:
            tensors = st.load_file(Path(folder) / "masks.safetensors")
            facts = json.loads((Path(folder) / "masks.json").read_text())
            if {layer: int(mask.sum()) for layer, mask in tensors.items()} != {k: f["kept"] for k, f in facts.items()}:
                raise ValueError("masks.json describes other masks")
            choices = {layer: Choice.from_json(fact) for layer, fact in facts.items()}
            return Masks({k: tensors[k] for k in facts}, choices, {k: f["groups"] for k, f in facts.items()})
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Expected masks written by Masks.save. Got {folder}: {error!r}.") from error

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
