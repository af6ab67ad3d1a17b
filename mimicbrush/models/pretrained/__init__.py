"""Starting weights in files.

In reading order:

* ``files`` - a network in a folder: its config, and the heads of its safetensors files; no torch
* ``weights`` - where starting weights lie, in a folder or the Hugging Face cache, and how they are fetched
* ``requirements`` - what they must be, so that the method can begin from them
* ``stored_weights`` - names and configs as libraries of all ages wrote them
* ``check`` - whether a network has the weights that its config asks for
* ``fetch`` - all of this for every part, with a report
"""
