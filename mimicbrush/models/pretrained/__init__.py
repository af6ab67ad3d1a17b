"""Finds, checks and downloads starting weights.

In reading order:

* ``files`` - reads a network in a folder: its config, and the headers of its safetensors files; no torch
* ``weights`` - finds starting weights in a folder or the Hugging Face cache, and downloads them
* ``requirements`` - checks whether training can start from them
* ``stored_weights`` - names and configs as different versions of the libraries write them
* ``check`` - checks whether a network has the weights that its config asks for
* ``fetch`` - downloads and checks every part, with a report
"""
