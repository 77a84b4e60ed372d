"""Which precision products are carried out in, whatever the caller has switched on."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["full_precision", "working_dtype"]


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
