"""Imported by the server of `zoo.children` before it forks: everything heavy that most commands need."""

import gc

from zoo.collector import paused_collector

with paused_collector():
    import lightning.pytorch.cli
    import torchmetrics
    import torchvision

    import zoo.job

# what is there stays; the children's collectors, which would write to its memory pages, leave it alone
gc.freeze()

__all__ = ["lightning", "torchmetrics", "torchvision", "zoo"]
