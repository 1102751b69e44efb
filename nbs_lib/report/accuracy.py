"""Rows of `accuracies`: mean and spread over seeds, differences between equal seeds, and how they are drawn."""

import json
import re

import matplotlib.pyplot as plt
import pandas as pd

from nbs_lib.report.claims import Claims

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny-imagenet": "Tiny-ImageNet"}


def dataset_name(dataset: str, train_images: int = 0) -> str:
    """What a data set is called in a text: "folder:cifar10-jpeg" is "CIFAR-10 (JPEG)"."""
    folder = dataset.removeprefix("folder:").rstrip("/").rpartition("/")[2]
    plain = re.sub(r"[-_]?jpe?g", "", folder, flags=re.IGNORECASE)
    images = f", {train_images} training images" if train_images else ""
    return NAMES.get(plain, plain) + (" (JPEG)" if plain != folder else "") + images


def points(rows: pd.DataFrame, reference: pd.DataFrame, on: tuple[str, ...] = ("seed",)) -> pd.Series:
    """Percentage points by which each row's accuracy lies above the reference's of the same `on`; indexed as `rows`,
    NaN where either is missing."""
    found = reference[reference.ok].drop_duplicates(list(on)).set_index(list(on)).accuracy.rename("reference")
    return 100 * (rows.accuracy.where(rows.ok) - rows[list(on)].join(found, on=list(on)).reference)


def spread(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """A row per value of `by`, in order: seeds there (`n`) and missing, accuracy and dense accuracy in %, and, where
    rows have a column `difference` (points), its mean and extremes; rates, epochs and the first error."""
    table = []
    for key, group in rows.groupby(by, sort=False):
        good, errors = group[group.ok], group.error[~group.ok]
        row = dict(zip(by, key, strict=True)) | {"n": len(good), "missing": len(errors)}
        row |= {name: 100 * getattr(good.accuracy, how)() for name, how in STATISTICS.items()}
        row["dense"] = 100 * good.dense_accuracy.mean()
        if "difference" in good:
            row |= {f"difference_{name}": getattr(good.difference, how)() for name, how in STATISTICS.items()}
        row |= {name: good[name].mean() for name in ("reached_rate", "conv_rate", "mac_rate", "total_epochs")}
        table.append(row | {"error": errors.iloc[0] if len(errors) else ""})
    return pd.DataFrame(table)


STATISTICS = {"mean": "mean", "std": "std", "least": "min", "most": "max"}


def dots(rows: pd.DataFrame, place: str, ax: plt.Axes, label: str, colour: str, line: bool = False) -> plt.Axes:
    """Draw accuracies in % over the numbers in the column `place`: a dot per seed, a bar from the least to the most, a
    dash (or a line through all places) at the mean; "missing" where there is no row."""
    good = rows[rows.ok].assign(percent=100 * rows.accuracy)
    found = good.groupby(place).percent.agg(["mean", "min", "max"])
    ax.plot(good[place], good.percent, "o", markersize=4, alpha=0.5, color=colour)
    ax.vlines(found.index, found["min"], found["max"], color=colour, linewidth=1)
    ax.plot(found.index, found["mean"], "-" if line else "_", markersize=16, linewidth=1.5, color=colour, label=label)
    for where in sorted(set(rows[place]) - set(found.index)):
        turned = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": "small", "color": colour}
        ax.text(where, 0.02, "missing", transform=ax.get_xaxis_transform(), **turned)
    return ax


def judge(claims: Claims, key: str, found: pd.Series, how: str, lacking: str = "") -> str:
    """Answer a claim by the mean of `found` (points, one per seed); return the answer. `lacking`: why it cannot be
    tested here, such as "digits are a demonstration"; nor can it where a seed is missing (NaN)."""
    seeds, found, how = len(found), found.dropna(), how.replace("nan %", "not on record, either")
    if 0 < len(found) < seeds:
        lacking = lacking or f"only {len(found)} of {seeds} seeds are on record"
    told = f"{found.mean():+.2f} points in the mean, {found.min():+.2f}..{found.max():+.2f}, n = {len(found)}"
    if lacking or found.empty:
        claims.cannot(key, lacking + (f"; {how}: {told}" if len(found) else "") or f"not on record; {how}")
    else:
        claims.check(key, found.mean(), f"{how}: {told}")
    return claims.answers[key][1]


def drops(trained: pd.DataFrame, network: str, rate: float, dataset: str = "CIFAR-10") -> tuple[pd.Series, str]:
    """What accuracy rows say of rule-based mappings of a network in full width, trained on all images of exactly this
    data set (as `dataset_name` calls it, JPEG or not), pruned within 3 % of a CONV rate: the drop in points of each
    (negative: a gain); and, in words, with data set, algorithm, schemes, rates and epochs: these rows, or where there
    are none, the other ones of that network on this data set. A mapping is a row with `rates`, a scheme and a rate for
    each layer; one scheme for all layers is no rule's."""
    rows = trained[trained.ok & (trained.network == network) & trained.conv_rate.gt(1)]
    rows = rows[rows.dataset.map(lambda name: dataset_name(name).removesuffix(" (JPEG)") == dataset).astype(bool)]
    found = 100 * (rows.dense_accuracy - rows.accuracy)
    whole = (rows.width == 1) & (rows.train_images == 0) & rows["size"].isin([0, 32]) & rows.rates.fillna("").ne("")
    same = whole & ((rows.conv_rate / rate - 1).abs() <= 0.03)
    told = [f"{_how(row)}: {found[row.Index]:.1f}" for row in (rows[same] if same.any() else rows).itertuples()]
    words = "drops in points" if same.any() else "other drops on record, in points"
    return found[same], f"; {words}: {'; '.join(told)}" if told else ""


def _how(row) -> str:
    """Data set, width, algorithm, schemes, rates and epochs of an accuracy row, in words."""
    given = json.loads(row.rates) if isinstance(row.rates, str) and row.rates else {}
    if given:
        schemes = pd.Series([scheme for scheme, _ in given.values()], dtype=object).value_counts().items()
        rates = [rate for _, rate in given.values()]
        chosen = ", ".join(f"{count} x {scheme}" for scheme, count in schemes)
        chosen += f", layers at {min(rates):.3g}..{max(rates):.3g}x"
    else:
        chosen = f"{row.conv or row.linear} for all layers"
    data = f"{dataset_name(row.dataset, row.train_images)}{f', {row.size} pixels' if row.size else ''}"
    epochs = f"{row.total_epochs} epochs after {row.dense_epochs} dense ones"
    return f"{data}, width {row.width:g}, {row.algorithm}, {chosen}, {row.conv_rate:.4g}x of the CONV weights, {epochs}"
