"""Kernels: what would need an N x N attention matrix or 48 copies of a picture, computed without them."""
