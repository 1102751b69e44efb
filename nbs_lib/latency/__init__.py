"""The latency model (mapping 5.2.1): a layer's or a network's time, predicted from measured test models."""

from nbs_lib.latency.model import LatencyModel
from nbs_lib.latency.work import NoData

__all__ = ["LatencyModel", "NoData"]
