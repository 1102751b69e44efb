"""The same rate for every layer that a scheme is legal for."""

from nbs_lib.mapping.table import Mapping, candidates
from nbs_lib.schemes import Block, BlockPunched, Choice, Scheme, check_rate

CONV, LINEAR = BlockPunched(8, 4), Block(8, 4)
Schemes = Scheme | tuple[Scheme, ...] | list[Scheme] | None


def uniform_mapping(graph, rate, conv: Schemes = CONV, linear: Schemes = LINEAR, ignored_layers=()) -> Mapping:
    """Give every layer of the graph `rate` (>= 1), CONV layers with the scheme `conv`, linear ones with `linear`.

    Of several schemes the first legal one is taken, as in (Pattern(8), BlockPunched(8, 4)); None leaves the layers out.
    Depthwise layers and the stem are left out too: `.report()` says which and why. Raises ValueError for a rate below
    1, KeyError for ignored layers (names) that are not there, TypeError for what is no scheme."""
    rate = check_rate(rate)
    schemes, rows = candidates(graph, conv, linear, ignored_layers)
    mapping = Mapping({name: Choice(scheme, rate) for name, scheme in schemes.items()}, rows)
    for row in rows:
        if scheme := schemes.get(row["layer"]):
            row["reason"] = f"uniform rate, reaches {scheme.min_rate}" if 1 < rate < scheme.min_rate else "uniform rate"
    return mapping
