"""Mappings for rows of the papers' tables: schemes are given, the rates meet what the row prints."""

from nbs_lib.mapping.rates import paper_mapping
from nbs_lib.mapping.table import Mapping, candidates
from nbs_lib.schemes import BlockPunched, Choice, Scheme, check_rate


def printed_mapping(
    graph, schemes: dict[str, Scheme], rate: float, macs: float | None = None, digit: float = 0.0
) -> tuple[Mapping, str]:
    """Rates for the layers in `schemes`, CONV only, at which total / kept CONV weights is `rate` and `macs` CONV
    multiply-adds per image remain; and in words, which of the two were met.

    digit: what the last printed digit of `macs` is worth; where `macs` itself is out of reach, the value half a digit
    below or above it is taken. Where that is, too, or `macs` is None, all layers have one rate, no lower than their
    schemes allow. Other layers stay dense and count as kept. Raises ValueError where there is nothing to map, or the
    other layers alone keep too much for `rate`; KeyError for unknown layers."""
    convs = {layer.name: layer for layer in graph.layers.values() if layer.kind != "linear"}
    if unknown := set(schemes) - set(convs) or not schemes:
        raise (KeyError if schemes else ValueError)(f"Expected CONV layers in schemes. Got {unknown}.")
    rest = [name for name in graph.layers if name not in schemes]
    if macs is not None and all(convs[name].kind == "conv" for name in schemes):
        distinct = sorted(set(schemes.values()), key=lambda scheme: -scheme.min_rate)
        for goal in (macs, macs - digit / 2, macs + digit / 2):
            try:
                found = paper_mapping(graph, rate, goal, (*distinct, BlockPunched(1, 1)), None, rest)
            except ValueError:
                continue
            choices = {name: Choice(schemes[name], choice.rate) for name, choice in found.items() if name in schemes}
            told = "the rate and the MACs" if goal == macs else f"the rate, and the MACs but for {digit / 2e6:g} M"
            return Mapping(choices, found.layers), told
    total = sum(layer.params for layer in convs.values())
    mapped = sum(convs[name].params for name in schemes)
    kept = total / check_rate(rate) - (total - mapped)
    if kept <= 0:
        raise ValueError(f"Expected a rate below {total / (total - mapped):.4g} for these layers. Got {rate:g}.")
    uniform = max(1.0, mapped / kept)
    choices = {name: Choice(scheme, max(uniform, scheme.min_rate)) for name, scheme in schemes.items()}
    _, rows = candidates(graph, (), (), rest)
    for row in rows:
        if row["layer"] in choices:
            row["reason"] = f"one rate for all layers: {uniform:.4g}"
    reached = total / (total - mapped + sum(convs[name].params / choice.rate for name, choice in choices.items()))
    met = f"the rate alone, {reached:.4g}" if reached > 1.003 * rate else "the rate alone"
    return Mapping(choices, rows), met
