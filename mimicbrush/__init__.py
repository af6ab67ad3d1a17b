"""MimicBrush: zero-shot image editing with reference imitation (arXiv 2406.07547).

Importing this package loads nothing heavy and changes nothing in the process. Import what you need from a subpackage,
for instance ``from mimicbrush.pipelines import MimicBrushPipeline``.
"""

__version__ = "0.1.0"
