"""One training run, as each process of `accelerate launch` runs it: see test_processes.py."""

from __future__ import annotations

import argparse
import os
import random
import signal
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import memlayer
from memlayer.data import Document
from memlayer.training import Trainer, TrainingOptions

STEPS = 50


def main(settings: argparse.Namespace) -> None:
    """Train a tiny model for 50 steps, or go on."""
    choose = random.Random(0)
    words = ["memory", "layer", "chunk", "token", "bank", "key", "value", "segment", "gate"]
    documents = [
        Document(id=str(number), text=" ".join(choose.choice(words) for _ in range(9 + 7 * number)))
        for number in range(9)
    ]
    config = memlayer.LongMemConfig(
        backend="torch",
        segment_length=16,
        memory_size=64,
        top_k=8,
        chunk_size=4,
        layer_reduction_factor=1 if settings.side_rank else 2,
        side_rank=settings.side_rank,
    )
    options = TrainingOptions(
        steps=STEPS,
        batch_size=settings.rows,
        gradient_accumulation=2,
        stride=settings.stride,
        excerpt_tokens=40 if settings.lead else None,
        lead_tokens=settings.lead,
        memory_dropout=0.1,
        learning_rate=1e-3,
        gate_learning_rate=1e-2,
        eval_every=25,
        eval_tokens=128,
        save_every=10,
        gradient_checkpointing=settings.gradient_checkpointing,
        compile=settings.compile,
        report_to=tuple(settings.report_to),
    )
    trainer = Trainer(
        memlayer.wrap(AutoModelForCausalLM.from_pretrained(settings.backbone), config),
        AutoTokenizer.from_pretrained(settings.backbone),
        documents,
        documents[-2:],
        options,
        output=settings.output,
        resume=settings.output.exists(),
        progress=False,
    )
    layer = trainer.model.side_network.layers[0]
    held = sum(getattr(w, "_local_tensor", w).numel() for w in layer.parameters())
    print(f"holds {held} of {sum(w.numel() for w in layer.parameters())} weights", flush=True)
    if settings.kill_after is not None:
        step = trainer._train_step

        def fatal() -> dict[str, object]:
            if trainer.step == settings.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return step()

        trainer._train_step = fatal  # type: ignore[method-assign]
    trainer.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("backbone")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--kill-after", type=int, metavar="STEP")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--side-rank", type=int)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--lead", type=int, default=0, help="of excerpts; whole documents without")
    parser.add_argument("--report-to", action="append", default=[])
    main(parser.parse_args())
