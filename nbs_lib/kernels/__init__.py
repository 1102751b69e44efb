"""Arrays in, arrays out: kernels generated as source, compiled by Numba, called by address."""
