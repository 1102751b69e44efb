"""Masked weights -> packed weights, exactly invertible: BCS of mapping 4.3, and CSR as its baseline. NumPy only."""

from nbs_lib.formats.bcs import BCS
from nbs_lib.formats.csr import CSR

FORMATS = {"bcs": BCS, "csr": CSR}
