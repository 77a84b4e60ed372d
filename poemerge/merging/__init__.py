"""Merging checkpoints of any size: plan, stream, resume, publish."""

from poemerge.merging.plan import Plan
from poemerge.merging.run import MergeResult, merge, prepare
from poemerge.merging.settings import FamilyChoice, Selection

__all__ = ["FamilyChoice", "MergeResult", "Plan", "Selection", "merge", "prepare"]
