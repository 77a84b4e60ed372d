"""The merging methods that a product of experts is measured against; see `poemerge.numerics.baselines`."""

from poemerge.numerics.baselines import (
    dare_ties,
    iso_c,
    karcher,
    mean,
    slerp,
    task_arithmetic,
    ties,
    tsv_m,
    wudi,
    wudi_descent,
)

__all__ = [
    "dare_ties",
    "iso_c",
    "karcher",
    "mean",
    "slerp",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "wudi",
    "wudi_descent",
]
