"""What else is trained, beside MimicBrush by its own loss.

* `consistency_distillation`: a trained model learns to edit in few steps.
* `small_encoders`: the small model's frozen networks.
"""
