"""FLUX.2 klein, the second family of models: one transformer reads target, source and references as one sequence.

In reading order:

* ``full_size`` - sizes of the published networks: layers, widths, numbers of parameters, with their sources; no torch
* ``files`` - finds a base model on this machine; no torch
* ``components`` - the networks: loaded from a folder or the local cache, or at toy size from random numbers
* ``prompt`` - the fixed prompt, encoded once and kept in a file
* ``fetch`` - downloads and checks a base model, and encodes the prompt
* ``sequence`` - from images to tokens with position ids, as diffusers' `Flux2KleinPipeline` makes them
* ``attention`` - queries of target tokens and keys of reference tokens, taken from chosen layers
* ``recording_tap`` - passes them to the recorders that the U-Nets also use
* ``lora`` - LoRA files: written as diffusers reads them, checked and loaded
* ``comfyui`` - LoRA files with the names that ComfyUI reads
"""
