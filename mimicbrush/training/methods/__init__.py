"""Other training methods, in addition to MimicBrush with its own loss.

* `consistency_distillation`: a trained model learns to edit in few steps.
* `flux2_klein`: a second family, one transformer that sees all images as one sequence.
* `flux2_klein_export`: what a run of it leaves.
* `small_encoders`: the small model's frozen networks.
"""
