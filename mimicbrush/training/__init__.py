"""The training loop and what it needs: noise, loss, checkpoints, tracking."""
