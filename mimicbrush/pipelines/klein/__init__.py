"""FLUX.2 klein as an editor that imitates. ``pipelines/flux2_klein.py`` opens and writes it.

* ``folder`` - finds and reads the folder of a run without loading it; no torch
* ``pipeline`` - `KleinPipeline`: the whole edit
"""
