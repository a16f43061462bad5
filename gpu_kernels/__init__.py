"""Triton kernels over plain tensors: embedding, norms, paged attention, cache append with RoPE,
routing, SwiGLU, sampling.

Import the modules, not this package: Triton is loaded by the module that needs it.
"""
