"""How fast states are extracted, against the bare target forward on the same batches, and how fast they are read back.

    python -m benchmarks.data.hidden_state_cache TARGET REPLIES [--device cuda:0] [--dtype float32] [--samples 400]

Extraction and bare forward are run in turns, so that both see the same machine.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from draftsmith.data.cache.extract import HiddenStateCache, extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.cache.features import features, length_batches, padded_ids
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.corpus import Corpus
from draftsmith.data.shards.packing import packed_batches
from draftsmith.data.shards.shards import write_shard
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.options import PlacementOptions
from draftsmith.models.target.target import Target


def bare_forward(target: Target, samples: list[TokenizedSample], batch_tokens: int) -> None:
    """What extraction cannot avoid: the target's own forward on the same padded batches."""
    for rows in length_batches([len(sample.input_ids) for sample in samples], batch_tokens):
        target.prefix(padded_ids([samples[row] for row in rows]).to(target.device))
    if target.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("replies", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    target = Target.load(options.target, dtype=options.dtype, device=options.device)
    tokenizer = load_tokenizer(options.target)
    corpus = Corpus(options.replies, lambda: ChatTemplate(tokenizer), None, target.max_positions or 4096)
    samples = list(corpus)[: options.samples]
    tokens = sum(len(sample.input_ids) for sample in samples)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        extract(
            options.target,
            options.replies,
            where / "cache",
            storage=StorageOptions(batch_tokens=options.batch_tokens),
            target_dtype=options.dtype,
            where=PlacementOptions(device=options.device),
        )
        cache = HiddenStateCache(where / "cache")
        bare, whole = [], []
        for _ in range(options.repeats + 1):
            started = time.perf_counter()
            bare_forward(target, samples, options.batch_tokens)
            between = time.perf_counter()
            write_shard(where / "shard.safetensors", features(target, samples, cache.manifest.identity))
            whole.append(time.perf_counter() - between)
            bare.append(between - started)
        forward, extraction = statistics.median(bare[1:]), statistics.median(whole[1:])
        print(f"bare forward  {tokens / forward:12,.0f} tokens/s")
        print(f"extraction    {tokens / extraction:12,.0f} tokens/s  ({forward / extraction:.2f} of the bare forward)")
        started = time.perf_counter()
        HiddenStateCache(where / "cache")
        checked = time.perf_counter() - started
        cache = HiddenStateCache(where / "cache", check="off")
        started = time.perf_counter()
        read = sum(batch.input_ids.shape[0] for batch in packed_batches(cache, cache.sample_lengths, 4096))
        reading = time.perf_counter() - started
        print(f"reading       {read / reading:12,.0f} tokens/s  packed into batches; checksums first: {checked:.2f} s")


if __name__ == "__main__":
    main()
