"""Training: a loop for any model with a small protocol, and this protocol for the two U-Nets of MimicBrush.

In reading order:

* `trainer`: the loop, from a batch to a checkpoint.
* `method`: the protocol of what can be trained, and MimicBrush as the first method.
* `noise`: timesteps, noise and drops of a batch, from the keys of its samples.
* `objective`: conditions of a batch, prediction of the trained networks, denoising loss.
* `correspondence_loss`: the loss that teaches the reference attention where to look.
* `options`: options of a run.
* `lora`: which networks are trained, fully or by adapters.
* `performance`: speed and memory, without changing what is learnt; FLOP of a step.
* `guards`: steps without finite gradients, signals, the time limit, unreadable pairs.
* `metrics`: figures of each logged step and of evaluations, and the trackers that show them.
* `state`: all that changes in a run: to a checkpoint and back.
* `checkpoints`: checkpoints on the disk, verified by hashes, and the background writer.
* `export`: from weights to a pipeline that edits.
* `methods/`: what else is trained: distillation to few steps, and the small model's frozen networks.
"""
