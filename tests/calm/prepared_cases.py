"""Small texts and their preparation, for the tests of prepared text."""

import json

import numpy as np

from calm.data.mixture import parse_weights
from calm.data.options import CorpusOptions
from calm.data.part_writer import Job
from calm.data.parts import open_source
from calm.data.prepared import PreparedText
from calm.data.preparing import request_of, write_shards
from calm.data.shards import token_dtype
from calm.data.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def random_texts(count, seed=0, longest=60):
    """Texts of small letters, each with its number, so that no two are equal."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, longest, count)
    return [
        "".join(map(chr, random.integers(97, 123, length))) + f"{number}"
        for number, length in enumerate(lengths)
    ]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def prepare(folder, texts, *, workers=1, mixture=None, size=300, **settings):
    """Prepare texts (a name or names by source) with the byte tokenizer, in shards of `size`."""
    named = texts if isinstance(texts, dict) else {"data": texts}
    options = {"percentage": 0, "patch_size": 4, "text_unit": "line", "on_error": "stop"}
    options |= settings
    corpus = CorpusOptions(
        text_unit=options["text_unit"],
        on_error=options["on_error"],
        cache_dir=str(folder.parent / "cache"),
    )
    sources = [open_source(name, text, corpus) for name, text in named.items()]
    job = Job(
        folder=folder,
        tokenizer=TOKENIZER,
        dtype=token_dtype(259),
        shard_size=size,
        tables={source.name: source.tables for source in sources if source.tables is not None},
        **options,
    )
    weights = None if mixture is None else parse_weights(mixture, named)
    request = request_of(sources, "bytes", **settings)
    write_shards(job, sources, request, weights=weights, workers=workers)
    return PreparedText(folder)


def blocks_of(prepared, split="train", *, block_size=16, layout=None, max_blocks=None):
    return prepared.blocks(
        split,
        block_size=block_size,
        pad_token_id=TOKENIZER.pad_token_id,
        layout=layout,
        max_blocks=max_blocks,
    )
