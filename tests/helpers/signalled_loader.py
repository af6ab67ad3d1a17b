"""Loads batches in workers while SIGTERM and SIGUSR1 reach the whole group of processes: signalled_loader.py MINED."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch.utils.data._utils.worker as torch_worker

from mimicbrush.data.dataset import PairDataset
from mimicbrush.data.loader import poll_batches
from mimicbrush.data.options import DataOptions
from mimicbrush.data.pair_sources import load_pair_sources
from mimicbrush.data.sampler import RankBatches

#: A worker of torch looks every five seconds whether its parent is still there; here it does so more often.
_LOOK_S, _IDLE_S = 0.1, 1.0


class WatchfulDataset(PairDataset):
    """The same samples; where it is unpickled, which is in a worker, the worker looks after its parent more often."""

    def __setstate__(self, state: Any) -> None:
        torch_worker.MP_STATUS_CHECK_INTERVAL = _LOOK_S
        self.__dict__.update(state)


def main() -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # what a run does with them is not the matter here
    options = DataOptions(root=sys.argv[1], heldout_ratio=0.0)
    dataset = WatchfulDataset(load_pair_sources(options), 32, options, seed=1)
    polled = poll_batches(dataset, RankBatches(0, 12, 1, 1, 0, 1), num_workers=1)
    batches = (batch for batch in polled if batch is not None)
    next(batches)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.killpg(0, number)
    time.sleep(_IDLE_S)
    for _ in range(11):
        next(batches)
    print("went on")


if __name__ == "__main__":
    main()
