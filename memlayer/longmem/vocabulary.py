"""The tokenizer of a fairseq model whose text was split by GPT-2's byte-pair encoding.

encoder.json, vocab.bpe    text -> GPT-2's ids
dict.txt                   a line for each of those ids: its number + 4 is what the model knows
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memlayer.errors import DataError

FILES = ("dict.txt", "encoder.json", "vocab.bpe")
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def fairseq_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Make a tokenizer that gives the ids of a fairseq model.

    Args:
        folder: with ``dict.txt``, ``encoder.json`` and ``vocab.bpe``.

    Raises:
        DataError: if a file is missing, or they do not belong together.
    """
    place = Path(folder)
    texts = {}
    for name in FILES:
        try:
            texts[name] = (place / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot read {place / name} ({error}); a fairseq vocabulary is {', '.join(FILES)}"
            ) from error
    try:
        own = {str(number): token for token, number in json.loads(texts["encoder.json"]).items()}
    except (AttributeError, ValueError) as error:
        raise DataError(f"{place / 'encoder.json'} is no table of tokens ({error})") from error
    vocabulary = {token: number for number, token in enumerate(SPECIAL_TOKENS.values())}
    for line in texts["dict.txt"].splitlines():
        word = line.rpartition(" ")[0]
        # Others than numbers are fillers, which make the size of the vocabulary a round one.
        if word.isdecimal() and word not in own:
            raise DataError(f"{place / 'dict.txt'} has id {word}, which encoder.json has not")
        vocabulary[own.get(word, word)] = len(vocabulary)
    lines = texts["vocab.bpe"].splitlines()
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
    if lines and lines[0].startswith("#version"):
        merges = merges[1:]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(f"the files of {place} do not belong together ({error})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
