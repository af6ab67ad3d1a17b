"""A blind user study, as in the paper (Sec. 4).

Files, in reading order:

* `pages`: the page for the raters, and the key that they do not get.
* `score`: from their answers to how often each editor was ranked best.
"""
