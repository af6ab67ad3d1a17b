"""The report of a mined folder: one HTML page of numbers, plots and images.

In reading order:

* `page`: builds the page.
* `statistics`: the numbers, by columns of the manifest.
* `plots`: histograms and bars as SVG.
* `thumbnails`: images of kept pairs, refused pairs and photographs.
* `audit`: the examples of refused pairs that the miner keeps for the report.
"""
