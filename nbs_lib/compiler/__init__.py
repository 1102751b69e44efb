"""Graph + zeros -> Network: fuse, lay out, pack, generate, run (mapping 4.3, NPS 3)."""

from nbs_lib.compiler.network import Network, compile

__all__ = ["Network", "compile"]
