"""FLUX.2 klein, the second family: one transformer reads the hole, the source and the references as one sequence.

In reading order:

* ``full_size`` - what the published networks are: layers, widths, numbers of parameters, with their sources; no torch
* ``files`` - where a base model lies on this machine; no torch
* ``components`` - the networks: loaded from a folder or the local cache, or at toy size from random numbers
* ``prompt`` - the fixed prompt, encoded once and kept in a file
* ``fetch`` - a base model fetched and checked, and the prompt encoded
* ``sequence`` - from images to tokens with position ids, as diffusers' `Flux2KleinPipeline` makes them
* ``attention`` - what target tokens ask and reference tokens answer: queries and keys of chosen layers
* ``recording_tap`` - the same, for the recorders that also serve the U-Nets
* ``lora`` - LoRA files: written as diffusers reads them, checked and loaded
* ``comfyui`` - the same under the names that ComfyUI reads
"""
