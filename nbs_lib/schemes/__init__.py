"""Pruning regularities: which weights live and die together, and which a rate keeps. NumPy only."""

from nbs_lib.schemes.base import Scheme, Units, check_rate, keep_strongest, reached
from nbs_lib.schemes.block import Block, BlockPunched
from nbs_lib.schemes.choice import SCHEMES, Choice, from_json, parse
from nbs_lib.schemes.pattern import Pattern
from nbs_lib.schemes.simple import Channel, Filter, Unstructured

__all__ = ["SCHEMES", "Block", "BlockPunched", "Channel", "Choice", "Filter", "Pattern", "Scheme", "Units"]
__all__ += ["Unstructured", "check_rate", "from_json", "keep_strongest", "parse", "reached"]
