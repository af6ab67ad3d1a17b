"""The networks, and the method between them.

In reading order:

* ``options`` - what is chosen about the model; no torch
* ``reference_attention`` - the heart of the method: one U-Net reads what another one wrote, with the formula
* ``unets`` - the imitative U-Net (13 input channels) and the reference U-Net (without its dead tail), or one for both
* ``projectors`` - the two small trained networks: image tokens -> context, depth map -> latents
* ``encoders`` - the frozen encoders, as functions from pixels to latents, image tokens and depth
* ``token_encoders`` - CLIP and DINOv2, which make the image tokens
* ``patch_autoencoder`` - the small autoencoder of toys and of the small model
* ``components`` - all networks together: toy size, full size with random weights, or from starting weights
* ``schedule`` - the noise schedule of SD-1.5
* ``attention_recorder`` - which reference token filled which masked token
* ``norms/`` - norms and activations that take less memory or fewer kernels in training
* ``library_logs`` - what diffusers and transformers print
* ``flux2_klein/`` - the second family: FLUX.2 klein, one transformer that sees all images as one sequence
* ``pretrained/`` - starting weights: found, read, checked, fetched
"""
