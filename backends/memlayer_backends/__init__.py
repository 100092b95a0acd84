"""The retrieval backends that come with memlayer, registered as any third party's are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memlayer import hookimpl

if TYPE_CHECKING:
    from memlayer.hookspecs import Register


@hookimpl
def register_backends(register: Register) -> None:
    """Name the backends; each is imported on first use."""
    register("torch", "memlayer_backends.torch_exact:TorchBackend")
    register(
        "faiss", "memlayer_backends.faiss_cpu:FaissBackend", extra="faiss", requires=("faiss",)
    )
    register(
        "faiss-gpu",
        "memlayer_backends.faiss_gpu:FaissGpuBackend",
        extra="faiss-gpu",
        requires=("faiss",),
    )
    register(
        "hnswlib",
        "memlayer_backends.hnswlib_graph:HnswlibBackend",
        extra="hnswlib",
        requires=("hnswlib",),
    )
    register("auto", "memlayer_backends.auto:AutoBackend")
