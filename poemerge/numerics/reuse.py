"""What solves of the same deltas share, kept in memory while somebody solves them again and again: a sweep."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor

__all__ = ["kept", "reusing"]

Made = TypeVar("Made", bound=tuple[Tensor | None, ...])


class _Store:
    """Products by the bytes of what they were made from; full when `limit` bytes are held, and then as it is: trials
    come round in the same order, so that what was used longest ago is needed next."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.lock = threading.Lock()
        self.products: dict[bytes, tuple[Tensor | None, ...]] = {}


_store: _Store | None = None


@contextmanager
def reusing(limit: int) -> Iterator[None]:
    """Within this block, in every thread, the Gram products of deltas on the CPU are made once, up to `limit` bytes."""
    global _store
    outer, _store = _store, _Store(limit)
    try:
        yield
    finally:
        _store = outer


def kept(sources: Sequence[Tensor], make: Callable[[], Made]) -> Made:
    """What `make` makes of `sources` alone: taken from the store where the same bytes were there before.

    The tensors are shared by all who ask for them, and must not be written to. Outside `reusing`, or on a GPU, where
    they are made faster than bytes are compared, it is just `make()`.
    """
    store = _store
    if store is None or any(source.device.type != "cpu" for source in sources):
        return make()
    digest = hashlib.blake2b(digest_size=32)
    for source in sources:
        digest.update(f"{source.dtype} {tuple(source.shape)} ".encode())
        digest.update(source.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    key = digest.digest()
    with store.lock:
        found = store.products.get(key)
    if found is not None:
        return cast("Made", found)
    made = make()
    size = sum(one.numel() * one.element_size() for one in made if one is not None)
    with store.lock:
        if key not in store.products and size <= store.left:
            store.products[key] = made
            store.left -= size
    return made
