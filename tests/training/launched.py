"""One training run, as each process of `accelerate launch` runs it: see test_processes.py."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import memlayer
from memlayer.data import Document
from memlayer.training import Trainer, TrainingOptions

STEPS = 50


def main(backbone: str, output: str, rows: str = "4", stop_after: str = "0") -> None:
    """Train a tiny model for 50 steps, or go on; `stop_after` kills it amid a step."""
    choose = random.Random(0)
    words = ["memory", "layer", "chunk", "token", "bank", "key", "value", "segment", "gate"]
    documents = [
        Document(id=str(number), text=" ".join(choose.choice(words) for _ in range(9 + 7 * number)))
        for number in range(9)
    ]
    config = memlayer.LongMemConfig(
        backend="torch", segment_length=16, memory_size=64, top_k=8, chunk_size=4
    )
    options = TrainingOptions(
        steps=STEPS,
        batch_size=int(rows),
        gradient_accumulation=2,
        learning_rate=1e-3,
        gate_learning_rate=1e-2,
        eval_every=25,
        eval_tokens=128,
        save_every=10,
    )
    trainer = Trainer(
        memlayer.wrap(AutoModelForCausalLM.from_pretrained(backbone), config),
        AutoTokenizer.from_pretrained(backbone),
        documents,
        documents[-2:],
        options,
        output=output,
        resume=Path(output).exists(),
        progress=False,
    )
    layer = trainer.model.side_network.layers[0]
    held = sum(getattr(w, "_local_tensor", w).numel() for w in layer.parameters())
    print(f"holds {held} of {sum(w.numel() for w in layer.parameters())} weights", flush=True)
    if int(stop_after):
        step = trainer._train_step

        def fatal() -> dict[str, object]:
            if trainer.step == int(stop_after):
                import os
                import signal

                os.kill(os.getpid(), signal.SIGKILL)
            return step()

        trainer._train_step = fatal  # type: ignore[method-assign]
    trainer.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
