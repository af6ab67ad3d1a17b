"""Clips of the web: a list names them with their licences, and they are fetched, checked and handed to the miner.

* `clip_list`: reads such a list, and writes that of the clips that are here, with who made them.
* `fetch`: fetches the clips of a list.
"""
