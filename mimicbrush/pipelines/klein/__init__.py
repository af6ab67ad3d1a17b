"""FLUX.2 klein as an editor that imitates. ``pipelines/flux2_klein.py`` opens and writes it.

* ``folder`` - what a run of it leaves, found and read without loading it; no torch
* ``pipeline`` - `KleinPipeline`: the whole edit
"""
