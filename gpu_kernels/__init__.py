"""Triton kernels over plain tensors: paged attention, cache append with RoPE, norms, SwiGLU.

Import the modules, not this package: Triton is loaded by the module that needs it.
"""
