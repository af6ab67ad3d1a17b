"""Norms and activations that take less memory or fewer kernels than PyTorch's, and compute the same functions.

* ``low_precision`` - norms in half precision
* ``fused_norms`` - GroupNorm and SiLU as one operation on a GPU
* ``group_norm_kernels`` - the Triton kernels of ``fused_norms``
* ``recomputation`` - norms and activations that are computed again in the backward pass, instead of being kept for it
"""
