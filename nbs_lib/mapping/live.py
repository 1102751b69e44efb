"""A search while it runs: a bar, and the best reward so far as a curve in a notebook, or lines elsewhere."""

import io
import sys
import time
from contextlib import AbstractContextManager

from matplotlib.figure import Figure
from tqdm.auto import tqdm

EVERY_S = 1.0  # at most one picture in so many seconds


class Watch(AbstractContextManager):
    """Called with a search after every step; a context manager that ends with the last picture. Quiet on request."""

    def __init__(self, search, progress: bool = True):
        self.search, self.drawn, self.told = search, 0.0, 0
        self.picture = _picture() if progress else None
        self.plain = progress and not self.picture and not sys.stderr.isatty()
        shown = progress and not self.plain
        self.bar = tqdm(total=search.budget, desc=f"{search.strategy} search", unit="mapping", disable=not shown)

    def __call__(self, search) -> None:
        self.bar.update(len(search.rows) - self.bar.n)
        self.bar.set_postfix_str(f"best reward {search.best['reward']:.4f}")
        if self.plain:
            for row in search.history[self.told :].itertuples():
                words = f"accuracy {row.accuracy:.4f}, {row.ms:.4g} ms ({row.timed}), reward {row.reward:.4f}"
                words = f"{search.strategy} search, {row.evaluation} of {search.budget}: {words}, best {row.best:.4f}"
                print(words, file=sys.stderr, flush=True)
            self.told = len(search.rows)
        elif self.picture and time.monotonic() > self.drawn + EVERY_S:
            self._draw()

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.picture and self.search.rows:
            self._draw()

    def _draw(self) -> None:
        table, figure, png = self.search.history, Figure(figsize=(6, 2.6), layout="constrained"), io.BytesIO()
        ax = figure.add_subplot()
        ax.plot(table.evaluation, table.reward, "o", markersize=3, alpha=0.4, label="each")
        ax.step(table.evaluation, table.best, where="post", label="best so far")
        ax.set(xlabel="distinct evaluations", ylabel="reward", xlim=(0, self.search.budget + 1))
        ax.legend(fontsize="small")
        figure.savefig(png, format="png")
        self.picture.value, self.drawn = png.getvalue(), time.monotonic()


def _picture():
    """An Image widget, shown, where a notebook's kernel runs us; else None."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    if not getattr(shell, "kernel", None):
        return None
    from ipywidgets import Image  # slow to load, and of no use elsewhere

    sys.modules["IPython"].display.display(picture := Image(format="png"))
    return picture
