"""FLUX.2 klein, the second family: one transformer reads the hole, the source and the references as one sequence.

In reading order:

* ``full_size`` - what the published networks are: layers, widths, numbers of parameters, with their sources
* ``prompt`` - the fixed prompt, encoded once and kept in a file
"""
