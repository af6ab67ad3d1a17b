"""The benchmark: the paper's four tracks and its metrics (Sec. 3.4).

Files, in reading order:

* `layout`: the released folder layout, read and written.
* `options`: options of a run.
* `run`: editors in; results, tables and a page out.
* `run_editor`: one editor on all cases.
* `metrics`: the metrics of one case.
* `subjects`: subjects without their background, as the networks see them.
* `backbones`: the networks that measure likeness.
* `efficientnet_lite0`: a perceptual distance whose weights come in a package.
* `table`: means with intervals, beside the paper's.
* `html_report`: one page with tables and images.
"""
