"""Downloads clips from the web, from a list with their licences, and checks them for the miner.

* `clip_list`: reads such a list, and writes the list and the authors of the downloaded clips.
* `fetch`: downloads the clips of a list.
"""
