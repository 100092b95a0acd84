"""Find a decoder's parts where no adapter describes its family: by what its modules do.

    a few tokens ─► probe.py ─► what every module was given and gave; every attention product
                                   │
    matching.py ◄──────────────────┘   which module's output is the query, the key, the value
         │
    parts.py ─► `DecoderParts`, or one sentence that says why not

Names play no part. A few random tokens are run, and a module is taken for the keys' because what it
gives *is* the keys, number by number. What cannot be shown so is refused.
"""

from __future__ import annotations

from memlayer.discovery.parts import discover, parts_of

__all__ = ["discover", "parts_of"]
