"""What the notebook for a network of one's own reads and says: the network, by name: ours, torchvision's, or what a
function in any module or file gives; accuracy over latency; and plain words of what to do next."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pandas as pd
from torch import nn

from nbs_lib.models import MODELS, imagenet
from nbs_lib.report.figures import COLOURS, bars

GAIN = 1.1  # ours: times as fast; less is called no gain
DROP, LITTLE = 2.0, 0.5  # ours: percentage points of accuracy that are much, and hardly any
SCATTER = 0.1  # ours: a median absolute deviation over the median that spoils a comparison
FLOOR = 0.1  # ours: of the way from chance to 100 %; a dense network below has hardly learnt anything
MILDEST = 1.5  # ours: the lowest rate worth trying
OFF = 0.2  # ours: a prediction further from the measured time is called coarse


def find_model(name: str, **options) -> nn.Module:
    """A new network: of `MODELS`, a classifier of torchvision's, or what a factory gives: "package.module:function", or
    "folder/file.py:function"; options go to the factory.

    Raises ValueError for a module, file, function or name that is not there, or cannot be imported, and TypeError for
    options the factory does not take, and for a factory that gives no torch.nn.Module. What the factory itself raises
    is left as it is."""
    module, _, function = name.rpartition(":")
    make = _function(module, function) if module else _known(name)
    with suppress(ValueError):  # a callable written in C may have no signature
        signature = inspect.signature(make)
        try:
            signature.bind(**options)
        except TypeError as error:
            raise TypeError(f"Expected options that {name} takes. Got {options}: {error}") from error
    model = make(**options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected {name} to give a torch.nn.Module. Got {type(model).__name__}.")
    return model


@contextmanager
def parameter(name: str, value: object) -> Iterator[None]:
    """Errors inside become a ValueError that names the parameter they come from."""
    try:
        yield
    except Exception as error:  # whatever a user's own code may raise
        told = error.args[0] if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__
        raise ValueError(f"Parameter {name} = {value!r}: {told}") from error


def _known(name: str) -> Callable[..., nn.Module]:
    known = [*MODELS, *imagenet.list_models(module=imagenet)]
    if name not in known:
        alike = get_close_matches(name, known, 5) or list(MODELS)
        rule = "Expected package.module:function, folder/file.py:function or a network's name"
        raise ValueError(f"{rule}, such as {', '.join(alike)}. Got {name!r}.")
    return MODELS.get(name) or imagenet.get_model_builder(name)


def _function(module: str, function: str) -> Callable[..., nn.Module]:
    try:
        loaded = _load(Path(module).expanduser()) if module.endswith(".py") else importlib.import_module(module)
    except Exception as error:  # whatever the module runs when it is imported
        rule = "Expected a module that can be imported (PYTHONPATH names further folders), or a Python file."
        raise ValueError(f"{rule} Got {module!r}: {type(error).__name__}: {error}") from error
    if not callable(made := getattr(loaded, function, None)):
        known = [key for key, value in vars(loaded).items() if callable(value) and key[0] != "_"]
        raise ValueError(f"Expected a function of {module}: {', '.join(known) or 'it has none'}. Got {function!r}.")
    return made


def _load(file: Path) -> ModuleType:
    """The module in a file, read anew, under a name that no other module has; it may import what lies beside it."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file.resolve()}")
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    names = (f"own_{file.stem}{number or ''}" for number in count())  # a calendar.py must not pass for Python's own
    name = next(name for name in names if name not in sys.modules)
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # pickled classes look for their module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def trade_off(table: pd.DataFrame, chosen: str, ax: plt.Axes) -> plt.Axes:
    """Draw accuracy in % over median_ms, a point per label, the chosen one larger; or bars of the times alone.

    table: as in `next_steps`, with `provenance`."""
    if table.accuracy.isna().all():
        bars(table, x="label", y="median_ms", ax=ax)
        ax.set(xlabel="", ylabel="ms, median")
        return ax
    for provenance, rows in table.groupby("provenance"):
        sizes = [160 if label == chosen else 60 for label in rows.label]
        ax.scatter(rows.median_ms, 100 * rows.accuracy, s=sizes, color=COLOURS[provenance], label=provenance, zorder=3)
    for row in table.itertuples():
        beside = {"xytext": (9, -12), "weight": "bold"} if row.label == chosen else {"xytext": (9, 4)}
        place = (row.median_ms, 100 * row.accuracy)
        ax.annotate(row.label, place, textcoords="offset points", fontsize="small", **beside)
    ax.set(xlabel="ms, median", ylabel="top-1 accuracy, %")
    ax.set_xlim(0, 1.25 * table.median_ms.max())
    ax.margins(y=0.15)
    ax.legend(fontsize="small", loc="lower right")
    return ax


def next_steps(
    table: pd.DataFrame, chosen: str, steps: pd.DataFrame, report: pd.DataFrame, rate: float, classes: int = 0
) -> list[str]:
    """A sentence or two per finding, most important first.

    table: a row per label, with median_ms, mad_ms (may be missing), error (text, "" for none), accuracy (in [0, 1] or
    NaN) and predicted_ms (or NaN); labels are "PyTorch" (may be missing), "dense" and mappings, of which `chosen` is
    the one to judge. steps: `profile` of its network, or `explain` where nothing was timed. report: its
    `Mapping.report()`. rate: nominal. classes: of the data, 0 where unknown; they give the accuracy of chance."""
    rows = table.set_index("label")
    told = _accuracy(rows, chosen, report, rate, 100 / classes if classes else 0.0)
    told += _speed(rows, chosen, steps, report)
    return [*told, *_fallback(steps), *_others(rows, chosen), *_prediction(rows.loc[chosen])]


def _accuracy(rows: pd.DataFrame, chosen: str, report: pd.DataFrame, rate: float, chance: float) -> list[str]:
    dense, pruned = (100 * rows.accuracy[label] for label in ("dense", chosen))
    if pd.isna(pruned):
        return ["No data were given, so nothing is known of accuracy: name them with data= before you use the weights."]
    text = f"Accuracy: {pruned:.2f} % after pruning, {dense:.2f} % before ({pruned - dense:+.2f} points). "
    if dense < chance + FLOOR * (100 - chance):
        guess = f", chance being {chance:.3g} %" if chance else ""
        told = f"The dense network has hardly learnt anything{guess}: train it for longer, or name a checkpoint; only "
        return [text + told + "then is there something to say of the rate."]
    if dense - pruned > DROP:
        less = f"rate = {max(MILDEST, rate / 2):g}, " if rate > MILDEST else ""
        text += f"That is much: try {less}twice the epochs, or algorithm = 'reweighted'"
        macs = report.macs.sum()
        spatial = report[report["shape"].map(lambda shape: tuple(shape[2:]) == (3, 3)) & (report.kind == "conv")]
        if macs and spatial.macs.sum() > 0.3 * macs and not report.scheme.str.startswith("pattern").any():
            share = f"{spatial.macs.sum() / macs:.0%} of the multiply-adds"
            text += f"; task = 'hard' gives patterns to the 3x3 layers, which have {share}"
        return [text + "."]
    if dense - pruned < LITTLE:
        return [text + f"There is room: try rate = {1.5 * rate:g}."]
    return [text + "More epochs may win some of it back."]


def _speed(rows: pd.DataFrame, chosen: str, steps: pd.DataFrame, report: pd.DataFrame) -> list[str]:
    ms = rows.median_ms
    if pd.isna(ms[chosen]) or pd.isna(ms["dense"]):
        return [f"No time was taken: {rows.error[chosen] or rows.error['dense']}."]
    gains = {label: ms[label] / ms[chosen] for label in ("PyTorch", "dense") if label in ms and pd.notna(ms[label])}
    against = " and ".join(
        f"{gain:.2f} times as fast as {'our dense network' if label == 'dense' else label} ({ms[label]:.3g} ms)"
        for label, gain in gains.items()
    )
    told = [f"Time: {ms[chosen]:.3g} ms, {against}."]
    scatter = rows.mad_ms / ms if "mad_ms" in rows else ms * 0
    if scatter.max() > SCATTER:
        told[0] += f" But times scattered ({scatter.idxmax()} by {scatter.max():.0%}): repeat this on a quiet machine."
    if min(gains.values()) >= GAIN:
        return told
    slow = f"No gain against {' and '.join(label for label, gain in gains.items() if gain < GAIN)}. "
    return [*told, slow + _where(steps) + _left_dense(report)]


def _where(steps: pd.DataFrame) -> str:
    """The steps that hold the time, and what bounds them."""
    if "ms" not in steps or not steps.ms.sum() > 0:
        return ""
    most = steps.sort_values("ms", ascending=False).head(3)
    shown = [
        f"{row.layer or row.op} ({row.ms / steps.ms.sum():.0%}"
        + (f", {row.op}: {row.bound}" if row.bound else ", Python and what runs through PyTorch")
        + ")"
        for row in most.itertuples()
    ]
    return f"The time is in {', '.join(shown)}; net.profile(x) shows every step. "


def _left_dense(report: pd.DataFrame) -> str:
    left = report[report.scheme == "dense"]
    if not report.macs.sum() or left.macs.sum() < 0.3 * report.macs.sum():
        return "A higher rate leaves less to compute."
    most = left.sort_values("macs", ascending=False).iloc[0]
    share = left.macs.sum() / report.macs.sum()
    return f"Layers left dense have {share:.0%} of the multiply-adds, {most.layer} the most: {most.reason}."


def _fallback(steps: pd.DataFrame) -> list[str]:
    through = steps[(steps.chosen == "torch") & (steps.op != "reshape")]  # a view costs nothing
    if through.empty:
        return []
    names = ", ".join(f"{op.removeprefix('torch:')} ({count}x)" for op, count in through.op.value_counts().items())
    text = f"Through PyTorch, since we have no kernel for them: {names}"
    if total := steps.macs.sum():
        text += f", {through.macs.sum() / total:.0%} of the multiply-adds"
    call = steps[steps.op == "call"]
    if len(call) and "ms" in steps:
        text += f"; with all that Python does, {call.ms.sum():.3g} of {steps.ms.sum():.3g} ms"
    return [text + ". Where they cost much, an equal form out of convolutions, ReLU and pooling is compiled."]


def _others(rows: pd.DataFrame, chosen: str) -> list[str]:
    """Mappings that are faster and no less accurate than the chosen one."""
    mappings = rows.drop(index=["PyTorch", "dense", chosen], errors="ignore")
    better = mappings[mappings.median_ms < rows.median_ms[chosen] / 1.05]
    if pd.notna(rows.accuracy[chosen]):
        better = better[better.accuracy >= rows.accuracy[chosen]]
    if better.empty:
        return []
    named = ", ".join(f"{label} ({row.median_ms:.3g} ms)" for label, row in better.iterrows())
    without = " (accuracy unknown)" if pd.isna(rows.accuracy[chosen]) else " and no less accurate"
    larger = " A smaller beta makes the rule take larger blocks." if chosen == "rule" else ""
    return [f"Faster than {chosen}{without}: {named}.{larger}"]


def _prediction(row: pd.Series) -> list[str]:
    off = row.predicted_ms / row.median_ms - 1
    if pd.isna(off) or abs(off) <= OFF:
        return []
    return [f"The latency model predicted {row.predicted_ms:.3g} ms, {off:+.0%}: give it more time with budget_s."]
