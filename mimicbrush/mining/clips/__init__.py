"""Clips from the web, from a list with their licences: downloaded, checked, and passed to the miner.

* `clip_list`: reads such a list, and writes that of the clips that are here, with who made them.
* `fetch`: fetches the clips of a list.
"""
