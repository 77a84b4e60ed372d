"""Where the base, the experts and the suites' data come from: local folders, hubs, MLflow, object stores."""

from poemerge.sources.bring import bring, holds, read_source_json, recover
from poemerge.sources.lock import Change, Entry, Lock
from poemerge.sources.refusal import Refusal, RetryPolicy
from poemerge.sources.resolve import find_problems, resolve, workplace

__all__ = [
    "Change",
    "Entry",
    "Lock",
    "Refusal",
    "RetryPolicy",
    "bring",
    "find_problems",
    "holds",
    "read_source_json",
    "recover",
    "resolve",
    "workplace",
]
