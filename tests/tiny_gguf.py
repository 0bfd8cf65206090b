"""Writes small models with random weights that llama.cpp loads in milliseconds: one function, many kinds.

The weights are scaled so that attention matters: other tokens before a token give it clearly other logits. The
vocabulary has a token for every byte, so any text can be tokenized. What such a model says means nothing.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Setting = bool | int | float | str | list[int]
UNKNOWN, BOS, EOS, TURN, TURN_END, FIRST_BYTE = 0, 1, 2, 3, 4, 5
WORDS = [
    *"etaoinshrdlucmfwygpbvk.,▁",
    *("▁t", "he", "▁a", "in", "er", "▁the", "an", "on", "▁s", "re", "nd", "▁w", "at", "ing", "ou", "en"),
]
VOCABULARY = FIRST_BYTE + 256 + len(WORDS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Long-context factors as Llama 3 has them: fast pairs keep their frequency, slow ones turn up to 8 times slower.
LLAMA3_FACTORS = (1.0, 8.0)


def write_tiny_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    context: int = 2048,
    seed: int = 0,
    chat_template: str = CHAT_TEMPLATE,
    bos: bool = True,
    half: bool = False,
    rope_base: float = 10000.0,
    rope_factors: bool = False,
    metadata: Mapping[str, Setting] | None = None,
) -> Path:
    """Writes a model and returns its path.

    architecture: llama, qwen2 (biases), qwen3 (norms of queries and keys) or gemma (outside Quire's allow list).
    chat_template: empty for a base model.  half: weights in float16 instead of float32.
    rope_factors: with Llama 3's `rope_freqs.weight`.  metadata: more keys, or other values for those written
    here; all but general.* and tokenizer.* stand below the architecture's name.
    """
    width, hidden = heads * head_dim, 2 * heads * head_dim
    settings: dict[str, Setting] = {
        "general.name": f"tiny {architecture}",
        "context_length": context,
        "embedding_length": width,
        "block_count": layers,
        "feed_forward_length": hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope_base,
        "tokenizer.ggml.add_bos_token": bos,
        **({"tokenizer.chat_template": chat_template} if chat_template else {}),
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        _add(writer, key if key.startswith(("general.", "tokenizer.")) else f"{architecture}.{key}", value)
    _add_vocabulary(writer)

    random = np.random.default_rng(seed)

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        values = random.standard_normal((rows, columns)) * gain / np.sqrt(columns)
        writer.add_tensor(name, values.astype(np.float16 if half else np.float32))

    def vector(name: str, values: npt.NDArray[np.float64]) -> None:
        writer.add_tensor(name, values.astype(np.float32))

    matrix("token_embd.weight", VOCABULARY, width, gain=np.sqrt(width) / (8 if architecture == "gemma" else 1))
    if rope_factors:
        vector("rope_freqs.weight", np.linspace(*LLAMA3_FACTORS, head_dim // 2))
    for layer in range(layers):
        block = f"blk.{layer}"
        vector(f"{block}.attn_norm.weight", random.uniform(0.8, 1.2, width))
        sharpness = 1.0 if architecture == "qwen3" else 1.5
        matrix(f"{block}.attn_q.weight", heads * head_dim, width, sharpness)
        matrix(f"{block}.attn_k.weight", kv_heads * head_dim, width, sharpness)
        matrix(f"{block}.attn_v.weight", kv_heads * head_dim, width, 1.5)
        matrix(f"{block}.attn_output.weight", width, heads * head_dim, 1.5)
        if architecture == "qwen2":
            vector(f"{block}.attn_q.bias", random.standard_normal(heads * head_dim))
            vector(f"{block}.attn_k.bias", random.standard_normal(kv_heads * head_dim))
            vector(f"{block}.attn_v.bias", 0.3 * random.standard_normal(kv_heads * head_dim))
        if architecture == "qwen3":
            vector(f"{block}.attn_q_norm.weight", random.uniform(1.0, 2.0, head_dim))
            vector(f"{block}.attn_k_norm.weight", random.uniform(1.0, 2.0, head_dim))
        vector(f"{block}.ffn_norm.weight", random.uniform(0.8, 1.2, width))
        matrix(f"{block}.ffn_gate.weight", hidden, width)
        matrix(f"{block}.ffn_up.weight", hidden, width)
        matrix(f"{block}.ffn_down.weight", width, hidden)
    vector("output_norm.weight", random.uniform(0.8, 1.2, width))
    if architecture != "gemma":  # shares its embedding
        matrix("output.weight", VOCABULARY, width, gain=3.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """SentencePiece's kind: bytes for everything, some letters and words that merge by score."""
    kinds = gguf.TokenType
    control = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", *control, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS])
    writer.add_token_scores([0.0] * (FIRST_BYTE + 256) + [float(-rank) for rank in range(len(WORDS))])
    writer.add_token_types(
        [kinds.UNKNOWN, *[kinds.CONTROL] * len(control), *[kinds.BYTE] * 256, *[kinds.NORMAL] * len(WORDS)]
    )
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNKNOWN)


def _add(writer: gguf.GGUFWriter, key: str, value: Setting) -> None:
    match value:
        case list():
            writer.add_array(key, value)
        case str():
            writer.add_string(key, value)
        case bool():
            writer.add_bool(key, value)
        case float():
            writer.add_float32(key, value)
        case _:
            writer.add_uint32(key, value)
