"""FLUX.2 klein, the second family: one transformer reads the hole, the source and the references as one sequence.

In reading order:

* ``components`` - its networks: loaded from a folder or the local cache, or at toy size from random numbers
* ``sequence`` - from images to tokens with position ids, as diffusers' `Flux2KleinPipeline` makes them
* ``attention`` - what target tokens ask and reference tokens answer: queries and keys of chosen layers
"""
