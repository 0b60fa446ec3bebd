"""A tiny random target with a tokenizer, and hidden-state caches of its states."""

import hashlib
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from training import HIDDEN, PROMPT, VOCAB, MakeCache
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from draftsmith.data.shards.manifest import CacheIdentity, Manifest
from draftsmith.data.shards.shards import ShardContent, write_shard
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import PRE_NORM, Target


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights."""
    folder = tmp_path_factory.mktemp("target")
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def target(target_dir: Path) -> Target:
    return Target.load(str(target_dir))


@pytest.fixture(scope="session")
def make_cache(target: Target, target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeCache:
    """make_cache(lengths, poison=None, fingerprint=None, layers=...) -> folder of a finished cache."""

    def make(
        lengths: list[int],
        seed: int = 0,
        poison: int | None = None,
        fingerprint: str | None = None,
        layers: tuple[str, ...] = (PRE_NORM,),
    ) -> Path:
        folder = tmp_path_factory.mktemp("cache")
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, VOCAB, (len(lengths),), generator=generator).tolist()
        # Each token follows from the one before: something a drafter can learn.
        texts = [
            2 + (start + torch.arange(length)) % (VOCAB - 2) for start, length in zip(starts, lengths, strict=True)
        ]
        with torch.no_grad():
            outputs = [target.prefix(ids[None], layers=layers) for ids in texts]
        hidden = {name: [output.feature(name)[0].clone() for output in outputs] for name in layers}
        if poison is not None:
            hidden[PRE_NORM][poison][-4, 0] = float("nan")
        masks = [torch.arange(length) >= PROMPT for length in lengths]
        content = ShardContent(
            ids=[f"s{index}" for index in range(len(lengths))],
            offsets=torch.tensor([0, *lengths]).cumsum(0),
            input_ids=torch.cat(texts),
            loss_mask=torch.cat(masks),
            hidden={name: torch.cat(states) for name, states in hidden.items()},
            greedy_ids=None,
        )
        record = write_shard(folder / "shard-00000.safetensors", content)
        identity = CacheIdentity(
            target=str(target_dir),
            target_revision=None,
            target_fingerprint=fingerprint or target.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(load_tokenizer(str(target_dir))),
            template_fingerprint="",
            layers=layers,
            hidden_size=HIDDEN,
            dtype="float32",
            target_dtype="float32",
            source=hashlib.sha256(torch.cat(texts).numpy().tobytes()).hexdigest(),
            split=None,
            mask="ids",
            max_length=128,
            local_horizon=0,
            shard_mib=1.0,
            batch_tokens=1024,
        )
        counts = (record.num_samples, record.num_tokens, record.num_labelled)
        Manifest(identity, *counts, num_dropped=0, num_cut=0).with_shards([record]).save(folder)
        return folder

    return make
