"""Mappings {layer: Choice}: which pruning scheme and rate every layer gets."""

from nbs_lib.mapping.rates import paper_mapping, uniform_mapping
from nbs_lib.mapping.table import Mapping

__all__ = ["Mapping", "paper_mapping", "uniform_mapping"]
