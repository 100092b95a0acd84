"""Generation past the local window: what leaves it goes to memory, step by step.

MemoryGeneration.generate ─► Hugging Face's loop ─► LongMemModel.forward ─► advance
                                                                            │ WindowCache
                                                                            └ ScratchMemory
"""

from memlayer.generation.generate import MemoryGeneration
from memlayer.generation.step import advance, new_window
from memlayer.generation.window import WindowCache

__all__ = ["MemoryGeneration", "WindowCache", "advance", "new_window"]
