"""Graph + zeros -> Network: shrink, fuse, lay out, pack, tune, run (mapping 4.3, NPS 3)."""

from nbs_lib.compiler.network import Network, compile
from nbs_lib.compiler.tuning import tune

__all__ = ["Network", "compile", "tune"]
