"""Pretend that the optional packages are absent.

On PYTHONPATH, this module blocks them in any Python process; tests/conftest.py imports it to block them here.
A None in `sys.modules` makes `import` fail and `importlib.util.find_spec` say "not there".
"""

import sys

ABSENT = ("torchvision", "decord", "torchcodec", "wandb", "trackio", "ray", "pillow_heif")
for _name in ABSENT:
    sys.modules[_name] = None  # type: ignore[assignment]
