"""MimicBrush: zero-shot image editing with reference imitation (arXiv 2406.07547).

Importing this package loads nothing heavy; import what you need from its rooms, for instance
``from mimicbrush.pipelines import MimicBrushPipeline``.
"""

import os

__version__ = "0.1.0"

# OpenMP reads this when torch is loaded. By default its threads spin while they wait for each other, and on
# a CPU that anything else is using, small networks then run many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
