"""Builds the sample base model: a Llama-architecture checkpoint with a real tokenizer.

The weights are not trained. The output layer remembers which token follows which in the corpus, and random
attention and feed-forward layers mix the context in, so that greedy decoding yields varied, word-like text in
which every layer matters.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraserve.errors import BadInputError
from loraserve.samples.text import CORPUS

Matrix = NDArray[np.float32]

MODEL_NAME = "loraserve/sample-llama"
BOS, EOS = "<|begin|>", "<|end|>"
SPECIAL_TOKENS = (BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_MAX_HIDDEN = 8192
_RECALL_GAIN = 1.5
_MIX_GAIN = 0.9
_TIE_BREAK = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


def build_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    hidden_size: int = 256,
    num_layers: int = 2,
    vocab_size: int = 1024,
) -> Path:
    """Write a float32 LlamaForCausalLM with its tokenizer into `directory` and return it.

    Heads are 64 wide (two query heads to a key-value head), so `hidden_size` is a multiple of 128.
    """
    if hidden_size % 128 or not 128 <= hidden_size <= _MAX_HIDDEN:
        raise BadInputError(
            f"hidden_size is {hidden_size}; expected a multiple of 128, from 128 to {_MAX_HIDDEN}"
        )
    if num_layers < 1:
        raise BadInputError(f"num_layers is {num_layers}; expected at least 1")
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    corpus_ids, vocab = _write_tokenizer(directory, vocab_size)
    sizes = _Sizes(
        hidden=hidden_size,
        intermediate=2 * hidden_size,
        layers=num_layers,
        heads=hidden_size // 64,
        kv_heads=hidden_size // 128,
        head_dim=64,
        vocab=vocab,
    )
    write_json(directory / "config.json", _config(sizes))
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "do_sample": False},
    )
    weights = _weights(sizes, corpus_ids, np.random.default_rng(seed))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(directory: Path, vocab_size: int) -> tuple[NDArray[np.int64], int]:
    """Train and write the tokenizer; returns the corpus as token ids and the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = CORPUS.replace("\n", " ")
    tokenizer.train_from_iterator([text], trainer)
    corpus_ids = np.array(tokenizer.encode(text).ids, dtype=np.int64)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(directory / "tokenizer_config.json", settings)
    return corpus_ids, tokenizer.get_vocab_size()


def _config(sizes: _Sizes) -> dict[str, Any]:
    return {
        "_name_or_path": MODEL_NAME,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": sizes.vocab,
    }


def _weights(sizes: _Sizes, corpus_ids: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Matrix]:
    embedding = rng.standard_normal((sizes.vocab, sizes.hidden), dtype=np.float32)
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.ones(sizes.hidden, dtype=np.float32),
        "lm_head.weight": _recall(embedding, corpus_ids, rng),
    }
    for layer in range(sizes.layers):
        weights |= _layer(sizes, f"model.layers.{layer}", rng)
    return weights


def _recall(embedding: Matrix, corpus_ids: NDArray[np.int64], rng: np.random.Generator) -> Matrix:
    """An output layer that answers a token's embedding with the tokens that follow it in the corpus.

    Tokens that follow nothing (special tokens, most bytes) get rows of zeros: they are never the likeliest,
    so that greedy output does not end early and stays printable.
    """
    vocab, hidden = embedding.shape
    counts = np.zeros((vocab, vocab), dtype=np.float32)
    np.add.at(counts, (corpus_ids[:-1], corpus_ids[1:]), 1.0)
    # Common followers (commas, articles) would win from every context: weigh each down by its frequency.
    weighted = np.sqrt(counts) / np.sqrt(np.maximum(counts.sum(axis=0, keepdims=True), 1.0))
    recalled = _RECALL_GAIN * (weighted.T @ embedding) / np.sqrt(hidden)
    # Tokens that follow the same ones have equal rows: noise parts them, for ties would make greedy output
    # depend on the order of additions.
    noise = _TIE_BREAK * rng.standard_normal((vocab, hidden), dtype=np.float32)
    follows = (counts.sum(axis=0) > 0)[:, None]
    output: Matrix = np.where(follows, recalled + noise, 0.0).astype(np.float32)
    return output


def _layer(sizes: _Sizes, prefix: str, rng: np.random.Generator) -> dict[str, Matrix]:
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    shapes = {
        "self_attn.q_proj": (queries, sizes.hidden, 1.5),
        "self_attn.k_proj": (keys, sizes.hidden, 1.5),
        "self_attn.v_proj": (keys, sizes.hidden, 1.0),
        "self_attn.o_proj": (sizes.hidden, queries, _MIX_GAIN),
        "mlp.gate_proj": (sizes.intermediate, sizes.hidden, 1.0),
        "mlp.up_proj": (sizes.intermediate, sizes.hidden, 1.0),
        "mlp.down_proj": (sizes.hidden, sizes.intermediate, _MIX_GAIN),
    }
    weights = {
        f"{prefix}.{name}.weight": (gain / np.float32(np.sqrt(columns))).astype(np.float32)
        * rng.standard_normal((rows, columns), dtype=np.float32)
        for name, (rows, columns, gain) in shapes.items()
    }
    ones = np.ones(sizes.hidden, dtype=np.float32)
    return weights | {
        f"{prefix}.input_layernorm.weight": ones,
        f"{prefix}.post_attention_layernorm.weight": ones,
    }
