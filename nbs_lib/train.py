"""Training and evaluation: `fit`, `evaluate`, `refresh_batch_norm`. Knows no scheme; pruning comes in as a `Hook`."""

import copy
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from tqdm.auto import tqdm

from nbs_lib.paths import reading, write_atomic

SCHEDULES = {  # of the learning rate: (optimizer, steps) -> scheduler
    "cosine": lr_scheduler.CosineAnnealingLR,
    "one_cycle": lambda o, steps: lr_scheduler.OneCycleLR(o, o.defaults["lr"], steps + 1, cycle_momentum=False),
    "constant": lambda o, steps: lr_scheduler.ConstantLR(o, 1.0),
}


class Hook:
    """What may take part in `fit`, for example a penalty; every method does nothing by default."""

    def penalty(self) -> torch.Tensor | float:
        """Added to the loss of a batch."""
        return 0.0

    def step(self, lr: float) -> None:
        """Called after every step of the optimizer, with that step's learning rate."""

    def epoch(self, done: int, epochs: int) -> dict[str, float]:
        """Called after every epoch (`done` counts from 1); returns columns for its row of the history."""
        return {}

    def state_dict(self) -> dict:
        """What must be in a checkpoint to go on (tensors and plain values)."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""


def fit(
    model: nn.Module,
    data,
    epochs: int = 10,
    *,
    seed: int = 0,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: str = "cosine",
    label_smoothing: float = 0.0,
    average: float = 0.0,
    mixed: bool | None = None,
    channels_last: bool | None = None,
    device: str | torch.device | None = None,
    test_every: int = 1,
    hook: Hook | None = None,
    checkpoint: str | Path | None = None,
    log: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train `model` in place with SGD (Nesterov) and return its history, a row per epoch.

    data: `Data`, or anything whose `train` and `test` have a length and yield (float32 (B, C, H, W), int64 (B,)).
    schedule: of the learning rate, step by step: "cosine" from lr to 0, "one_cycle" up to lr and down, or "constant".
    weight_decay: of matrices and kernels, not of biases and batch norm. average: decay per step of an exponential
    moving average of the weights, which the model holds in the end; 0 for none.
    mixed: bfloat16 where it pays, channels_last: the images' layout; by default both where the hardware has bfloat16
    matrix units. device: by default the GPU, if there is one; the model ends on the device it came from.
    test_every: epochs from one test accuracy to the next; 0: none. The last epoch's always is the one to quote.
    checkpoint: a file, written after every epoch; a call with the same arguments goes on from it, to the same result
    as without interruption (on a CPU; a GPU's sums vary from run to run). log: the history as CSV, likewise.

    History columns: epoch, lr (of its last step), loss, train_accuracy, test_accuracy (NaN where not evaluated),
    images_per_s, and the hook's. Raises FloatingPointError where the loss is not finite and MemoryError where a batch
    does not fit. After these, or an interruption, the model is as it was at the end of the last whole epoch."""
    if schedule not in SCHEDULES or epochs < 0 or not lr > 0 or not 0 <= average < 1:
        rule = f"Expected a schedule out of {', '.join(SCHEDULES)}, epochs >= 0, lr > 0 and average in [0, 1)."
        raise ValueError(f"{rule} Got {schedule!r}, {epochs!r}, {lr!r} and {average!r}.")
    home, device = _device(model), training_device(model, device)
    pays, hook, steps = bfloat16_pays(device), hook or Hook(), len(data.train)
    mixed, channels_last = (pays if value is None else value for value in (mixed, channels_last))
    model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    optimizer = _optimizer(model, lr, momentum, weight_decay)
    scheduler, averaged = SCHEDULES[schedule](optimizer, max(1, epochs * steps)), None
    parts = dict(hook=hook, model=model, optimizer=optimizer, scheduler=scheduler)  # a hook may refuse its state
    if average:
        ema = swa_utils.get_ema_multi_avg_fn(average)
        parts["averaged"] = averaged = swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
    settings = dict(epochs=epochs, steps=steps, seed=seed, lr=lr, momentum=momentum, weight_decay=weight_decay)
    settings |= dict(schedule=schedule, label_smoothing=label_smoothing, average=average, mixed=mixed)
    settings |= {"data": data.name} if hasattr(data, "name") else {}
    how = dict(mixed=mixed, channels_last=channels_last, label_smoothing=label_smoothing)
    safe = _snapshot(parts)
    try:
        rows = _resume(checkpoint, parts, settings)
        safe = _snapshot(parts) if rows else safe
        bar = tqdm(total=epochs * steps, initial=len(rows) * steps, disable=not progress, mininterval=1, unit="batch")
        with torch.random.fork_rng([device] if device.type == "cuda" else []), bar:
            for epoch in range(len(rows) + 1, epochs + 1):
                torch.manual_seed(hash((seed, epoch)))  # an epoch draws the same whether it is reached or resumed
                row = _train_once(model, data.train, optimizer, scheduler, averaged, hook, epoch, bar, **how)
                extra = {name: float(value) for name, value in hook.epoch(epoch, epochs).items()}
                if test_every and (epoch == epochs or epoch % test_every == 0):
                    row["test_accuracy"] = evaluate(averaged.module if average else model, data, progress=False)
                rows.append(row | extra)
                bar.set_postfix_str(", ".join(f"{key} {row[key]:.3f}" for key in ("loss", "test_accuracy")))
                safe = _snapshot(parts)
                if log:
                    write_atomic(log, pd.DataFrame(rows).to_csv(index=False))
                if checkpoint:
                    torch.save(safe | {"rows": rows, "settings": settings}, buffer := io.BytesIO())
                    write_atomic(checkpoint, buffer.getvalue())
    except BaseException as error:
        _restore(parts, safe)
        model.to(home, memory_format=torch.contiguous_format)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(f"Expected a batch to fit into memory: use a smaller batch_size. Got: {error}") from error
        raise
    if average:
        model.load_state_dict(averaged.module.state_dict())
    model.to(home, memory_format=torch.contiguous_format)
    return pd.DataFrame(rows)


def _train_once(
    model, batches, optimizer, scheduler, averaged, hook, epoch: int, bar, mixed, channels_last, label_smoothing
) -> dict:
    """Train over all batches, on the model's device; the row of the history, its test accuracy NaN, its loss without
    the hook's penalty."""
    started, total, right, seen = time.perf_counter(), 0.0, 0, 0
    device, lr = _device(model), optimizer.defaults["lr"]  # the one asked for, not the step's
    model.train()
    for batch, (images, labels) in enumerate(batches):
        images, labels = images.to(device), labels.to(device)
        if channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        (loss + hook.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        used = optimizer.param_groups[0]["lr"]
        hook.step(used)
        scheduler.step()
        if averaged:
            averaged.update_parameters(model)
        total, right = total + loss.detach() * len(labels), right + (logits.argmax(1) == labels).sum()
        seen += len(labels)
        bar.update()
        if batch % 50 == 0:  # not always: on a GPU it waits
            _check_finite(total, epoch, lr)
    weights = sum(p.detach().abs().sum() for p in model.parameters())
    _check_finite(total + 0 * weights, epoch, lr)  # the last step may have spoilt them
    speed = seen / (time.perf_counter() - started)
    row = {"epoch": epoch, "lr": used, "loss": float(total) / seen, "train_accuracy": int(right) / seen}
    return row | {"test_accuracy": float("nan"), "images_per_s": speed}


@torch.no_grad()
def evaluate(model: nn.Module, data, progress: bool = True) -> float:
    """Top-1 accuracy in [0, 1] over all of `data.test`, in evaluation mode, on the model's device.

    In float32 whatever the caller allows: without autocast, TF32 (PyTorch's default for convolutions on a GPU) or
    bfloat16 products inside float32 ones. Kernels sum in orders of their own, which depend on card, PyTorch, cuDNN and
    batch size, so that another machine may tell a few images on the verge apart otherwise; on the same one the accuracy
    repeats, unless `torch.backends.cudnn.benchmark` chooses other kernels every time."""
    device, training = _device(model), model.training
    model.eval()
    right = seen = 0
    try:
        with _whole_float32(), torch.autocast(device.type, enabled=False):
            for images, labels in tqdm(data.test, "Evaluating", disable=not progress, mininterval=1, leave=False):
                right += (model(images.to(device)).argmax(1) == labels.to(device)).sum()
                seen += len(labels)
    finally:
        model.train(training)
    return int(right) / seen


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Float32 products and convolutions with all 24 bits, on every thread of the process; afterwards as before."""
    cuda, cudnn, onednn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    if hasattr(cudnn, "conv"):  # since PyTorch 2.9, where reading the older flags fails once these have been set
        places, flag, whole = (cuda, cudnn.conv, onednn.matmul, onednn.conv), "fp32_precision", "ieee"
    else:
        places, flag, whole = (cuda, cudnn), "allow_tf32", False
    changed = {place: value for place in places if (value := getattr(place, flag)) not in (whole, "none")}
    try:
        for place in changed:
            setattr(place, flag, whole)
        yield
    finally:
        for place, value in changed.items():
            setattr(place, flag, value)


def refresh_batch_norm(model: nn.Module, data, batches: int = 100, seed: int = 0) -> None:
    """Set the running statistics of batch norm to the means over `batches` training batches."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        swa_utils.update_bn(islice(iter(data.train), batches), model, _device(model))


def training_device(model: nn.Module, device: str | torch.device | None = None) -> torch.device:
    """Where `fit` trains: on `device`, by default on the GPU, if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else _device(model)))


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def bfloat16_pays(device: torch.device) -> bool:
    """Whether bfloat16 is fast: tensor cores, or a CPU's matrix units (its vectors alone gain nothing)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)


def _optimizer(model: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    flat = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    wide = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    groups = [group for group in ({"params": wide}, {"params": flat, "weight_decay": 0.0}) if group["params"]]
    optimizer = torch.optim.SGD(groups, lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    optimizer.zero_grad()  # what an interrupted call, or the caller, has left
    return optimizer


def _check_finite(total: torch.Tensor, epoch: int, lr: float) -> None:
    if not torch.isfinite(total):
        how = "The model is as it was before that epoch; try a smaller learning rate."
        raise FloatingPointError(f"Expected a finite loss. Got {float(total)} in epoch {epoch}, lr {lr:g}. {how}")


def _snapshot(parts: dict) -> dict:
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


def _restore(parts: dict, state: dict) -> None:
    for name, part in parts.items():
        part.load_state_dict(state[name])


def _resume(path: str | Path | None, parts: dict, settings: dict) -> list[dict]:
    """Load a checkpoint, if there is one, into the parts; the rows of its history."""
    if not path or not Path(path).exists():
        return []
    with reading(path, "a checkpoint written by fit; delete it to start anew"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        found, rows = state["settings"], state["rows"]
        changed = {key: found.get(key) for key in settings if found.get(key, settings[key]) != settings[key]}
    if changed:
        wanted = {key: settings[key] for key in changed}
        raise ValueError(f"Expected a checkpoint of the same run, {wanted}. Got {path}, of {changed}.")
    with reading(path, "a checkpoint of the same model and hook"):
        _restore(parts, state)
    return rows
