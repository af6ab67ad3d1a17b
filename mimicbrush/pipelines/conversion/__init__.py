"""The released weights, to and from a pipeline folder.

In reading order:

* ``layout`` - where the released weights lie on the hub, and in folders of it
* ``hub`` - the released weights of the hub as a pipeline folder: fetched once, converted once
* ``import_released`` - released files -> a pipeline folder
* ``export_released`` - a pipeline folder, or a checkpoint of a run -> a file that the released code loads
* ``key_maps`` - names of weights, in released files and here
* ``depth_anything`` - Depth Anything in the transformers format
* ``untrusted_files``, ``unpickle_process`` - weights out of files of any format, without trusting them
* ``inspection`` - what a file or folder holds
* ``comparison`` - how far weights have moved from those that training began with
"""
