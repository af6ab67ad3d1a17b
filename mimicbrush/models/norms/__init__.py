"""Norms and activations that take less memory or fewer kernels than those of PyTorch. Nothing else is computed.

* ``low_precision`` - norms in half precision
* ``fused_norms`` - GroupNorm and SiLU as one operation on a GPU
* ``group_norm_kernels`` - its kernels, in Triton
* ``recomputation`` - norms and activations that are computed again in the backward pass, instead of being kept for it
"""
