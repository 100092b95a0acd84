"""Products of float32 that are float32, whatever the process allows elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and reduced float32 products (TF32, BF16) off, as long as it lasts.

    Autocast is a setting of the thread, the other one of the process: where a user allows reduced
    products, those of other threads are more exact meanwhile.
    """
    module = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = getattr(module, "matmul", None)
    allowed = getattr(matmul, "fp32_precision", None)  # torch 2.9 and later
    legacy = allowed is None and torch.get_float32_matmul_precision()
    reduced = allowed not in (None, "none", "ieee")
    with torch.autocast(device.type, enabled=False):
        if reduced:
            matmul.fp32_precision = "ieee"  # type: ignore[union-attr]
        elif legacy and legacy != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if reduced:
                matmul.fp32_precision = allowed  # type: ignore[union-attr]
            elif legacy and legacy != "highest":
                torch.set_float32_matmul_precision(legacy)
