"""Mappings {layer: Choice}: which pruning scheme and rate every layer gets."""

from nbs_lib.mapping.exact import exact_mapping
from nbs_lib.mapping.rates import paper_mapping, uniform_mapping
from nbs_lib.mapping.rule import rule_mapping
from nbs_lib.mapping.search import search_mapping
from nbs_lib.mapping.table import Mapping

__all__ = ["Mapping", "exact_mapping", "paper_mapping", "rule_mapping", "search_mapping", "uniform_mapping"]
