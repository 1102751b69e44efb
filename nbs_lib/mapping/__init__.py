"""Mappings {layer: Choice}: which pruning scheme and rate every layer gets."""

from nbs_lib.mapping.paper import paper_mapping
from nbs_lib.mapping.table import Mapping
from nbs_lib.mapping.uniform import uniform_mapping

__all__ = ["Mapping", "paper_mapping", "uniform_mapping"]
