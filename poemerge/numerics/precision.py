"""Which precision products are carried out in, whatever the caller has switched on."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["autocast", "full_precision", "multiplies_bfloat16", "working_dtype"]


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; elsewhere it is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast() -> AbstractContextManager[Any]:
    """A network's products in bfloat16 over float32 weights where this CPU multiplies it natively, else in float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if multiplies_bfloat16() else contextlib.nullcontext()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything narrower is worked on in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, no bfloat16 inside float32 products, no autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
