"""Imported by the server of `zoo.children` before it forks: everything heavy that most commands need."""

import lightning.pytorch.cli
import torchmetrics
import torchvision

import zoo.job

__all__ = ["lightning", "torchmetrics", "torchvision", "zoo"]
