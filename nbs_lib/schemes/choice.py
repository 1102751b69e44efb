"""SCHEMES, their text and JSON forms, and Choice: one layer's scheme and rate. To add a scheme: one line here."""

import re
from dataclasses import dataclass

from nbs_lib.schemes.base import Scheme, check_rate
from nbs_lib.schemes.block import Block, BlockPunched
from nbs_lib.schemes.pattern import Pattern
from nbs_lib.schemes.simple import Channel, Filter, Unstructured

SCHEMES = {scheme.name: scheme for scheme in (Unstructured, Filter, Channel, Pattern, Block, BlockPunched)}


def parse(text: str) -> Scheme:
    """The inverse of `str(scheme)`, for example "block_punched(8x4)"; only JSON keeps a Pattern's fitted patterns.
    Raises ValueError for another form or sizes the scheme does not take, KeyError for an unknown scheme."""
    if not (match := re.fullmatch(r"(\w+)(?:\((\d+)(?:x(\d+))?\))?", text)):
        raise ValueError(f"Expected a scheme such as 'block_punched(8x4)', 'pattern(8)' or 'filter'. Got {text!r}.")
    return _build(match[1], *(int(size) for size in match.groups()[1:] if size))


def from_json(data: dict) -> Scheme:
    """The inverse of `Scheme.to_json`. Raises KeyError for an unknown scheme, ValueError for wrong parameters."""
    return _build(data["name"], **{key: value for key, value in data.items() if key != "name"})


def _build(name: str, *sizes, **parameters) -> Scheme:
    if name not in SCHEMES:
        raise KeyError(f"Expected a scheme out of {', '.join(SCHEMES)}. Got {name!r}.")
    try:
        return SCHEMES[name](*sizes, **parameters)
    except TypeError as error:
        raise ValueError(f"Expected the parameters of {name}. Got {sizes or parameters}.") from error


@dataclass(frozen=True)
class Choice:
    """A scheme and the nominal compression rate (total / kept weights of the layer, >= 1) that it is to reach."""

    scheme: Scheme
    rate: float

    def __post_init__(self):
        if not isinstance(self.scheme, Scheme):
            raise TypeError(f"Expected a scheme such as BlockPunched(8, 4). Got {self.scheme!r}.")
        object.__setattr__(self, "rate", check_rate(self.rate))

    def to_json(self) -> dict:
        """Plain dict: the scheme's, and the rate. `from_json` is its inverse."""
        return {"scheme": self.scheme.to_json(), "rate": self.rate}

    @staticmethod
    def from_json(data: dict) -> "Choice":
        return Choice(from_json(data["scheme"]), data["rate"])

    def __str__(self) -> str:
        return f"{self.scheme}@{self.rate:g}x"
