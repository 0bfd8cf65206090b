"""The only reader of GGUF files: metadata, tensor directory, model shape, fingerprint, and whether KV can be stitched.

Reads the header alone and skips the token lists, so that it takes milliseconds where a general reader takes
seconds. Knows nothing of tokenizing or running a model.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from quire_engine.errors import ModelError
from quire_engine.types import ModelShape, Rope

Scalar = int | float | bool | str

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _F32 = 8, 9, 0
_FINGERPRINT_SAMPLES, _SAMPLE_BYTES = 256, 4096

# Architectures whose KV may be moved, and how their RoPE pairs channels. Everything else is answered by full prefill.
_ROPE_LAYOUTS = {"llama": "adjacent", "qwen2": "halves", "qwen3": "halves"}


@dataclass(frozen=True)
class Tensor:
    ggml_type: int
    shape: tuple[int, ...]  # GGUF order: the contiguous dimension first
    offset: int  # bytes from the start of the file


@dataclass(frozen=True)
class Gguf:
    """The header of one GGUF file. Array metadata are kept only when numeric and short (per-layer lists)."""

    path: Path
    metadata: dict[str, Scalar | tuple[Scalar, ...]]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def name(self) -> str:
        return str(self.metadata.get("general.name", self.path.stem))

    def number(self, key: str, default: float) -> float:
        """A number below this file's architecture, such as `rope.freq_base`; of a per-layer list, the first."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return float(value[0] if isinstance(value, tuple) else value)

    def whole(self, key: str, default: int) -> int:
        """As `number`, for counts such as `attention.head_count`."""
        return int(self.number(key, default))

    def varies(self, key: str) -> bool:
        """Whether layers differ in this number."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return isinstance(value, tuple) and len(set(value)) > 1

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata


def read(path: Path) -> Gguf:
    """Reads a header. Raises ModelError when the file is absent, truncated or not GGUF."""
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except FileNotFoundError as error:
        raise ModelError(f"There is no model file at {path}.", "Give the path of a .gguf file.") from error
    except OSError as error:
        raise ModelError(f"The model file {path} cannot be read: {error.strerror}.") from error
    except (struct.error, KeyError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        raise ModelError(
            f"{path} is damaged or incomplete.", "Download or copy the model file again.", repr(error)
        ) from error


def shape(gguf: Gguf) -> ModelShape:
    """The KV shape of a model; for architectures that cannot be stitched RoPE is a best guess."""
    heads = gguf.whole("attention.head_count", 1)
    kv_heads = gguf.whole("attention.head_count_kv", heads)
    key_dim = gguf.whole("attention.key_length", gguf.whole("embedding_length", 0) // max(heads, 1))
    return ModelShape(
        architecture=gguf.architecture,
        layers=gguf.whole("block_count", 0),
        heads=heads,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=gguf.whole("attention.value_length", key_dim),
        context_tokens=gguf.whole("context_length", 2048),
        rope=_rope(gguf, key_dim),
    )


def why_not_stitchable(gguf: Gguf) -> str:
    """One sentence why chunk KV cannot be reused with this model; empty when it can."""
    kind = gguf.architecture
    if any(f".{part}." in key for key in gguf.metadata for part in ("ssm", "wkv")):
        return f"{gguf.name} is recurrent ({kind}): its state cannot be cut into chunks."
    if gguf.has("rope.dimension_sections"):
        return f"{gguf.name} uses multi-axis RoPE (M-RoPE): chunks cannot be moved to other positions."
    if gguf.has("attention.kv_lora_rank"):
        return f"{gguf.name} keeps latent attention (MLA) instead of keys and values."
    if gguf.number("attention.sliding_window", 0) > 0:
        return f"{gguf.name} uses sliding-window attention: a chunk read alone saw a different window."
    if kind not in _ROPE_LAYOUTS:
        return f"Reuse has not been verified for the architecture {kind or 'of this file'}."
    scaling = str(gguf.metadata.get(f"{kind}.rope.scaling.type", "none"))
    if scaling not in ("none", "linear"):
        return f"{gguf.name} scales RoPE by {scaling}, which depends on the prompt's length."
    if gguf.varies("attention.head_count") or gguf.varies("attention.head_count_kv"):
        return f"{gguf.name} has different numbers of attention heads in different layers."
    return ""


def fingerprint(gguf: Gguf) -> bytes:
    """SHA-256 over the file's size, its header and evenly spaced samples of its weights.

    Reading 1 MiB instead of gigabytes: enough to tell quantisations and fine-tunes apart, which differ everywhere,
    not to detect deliberate forgery.
    """
    digest = hashlib.sha256(b"quire model fingerprint 1")
    size = gguf.path.stat().st_size
    first_tensor = min((t.offset for t in gguf.tensors.values()), default=size)
    digest.update(struct.pack("<Q", size))
    with gguf.path.open("rb") as file:
        digest.update(file.read(first_tensor))
        for i in range(_FINGERPRINT_SAMPLES):
            file.seek(first_tensor + (size - first_tensor) * i // _FINGERPRINT_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def _rope(gguf: Gguf, key_dim: int) -> Rope:
    factor = gguf.number("rope.scaling.factor", gguf.number("rope.scale_linear", 1.0))
    if gguf.metadata.get(f"{gguf.architecture}.rope.scaling.type") == "none":
        factor = 1.0
    return Rope(
        layout="halves" if _ROPE_LAYOUTS.get(gguf.architecture) == "halves" else "adjacent",
        dims=int(gguf.number("rope.dimension_count", key_dim)),
        base=gguf.number("rope.freq_base", 10000.0),
        scale=1.0 / factor if factor else 1.0,
        factors=_rope_factors(gguf),
    )


def _rope_factors(gguf: Gguf) -> tuple[float, ...]:
    tensor = gguf.tensors.get("rope_freqs.weight")
    if tensor is None or tensor.ggml_type != _F32:
        return ()
    values = np.fromfile(gguf.path, dtype="<f4", count=tensor.shape[0], offset=tensor.offset)
    return tuple(float(value) for value in values)


def _read(path: Path, file: BinaryIO) -> Gguf:
    magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF model.", "Quire runs models in llama.cpp's GGUF format.")
    version, tensor_count, metadata_count = struct.unpack("<IQQ", _exactly(file, 20))
    if version not in (2, 3):
        raise ModelError(f"{path} is GGUF version {version}; versions 2 and 3 are known.")
    metadata: dict[str, Scalar | tuple[Scalar, ...]] = {}
    for _ in range(metadata_count):
        key = _string(file)
        (kind,) = struct.unpack("<I", _exactly(file, 4))
        value = _array(file) if kind == _ARRAY else _scalar(file, kind)
        if value != ():
            metadata[key] = value
    directory = [_tensor(file) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    assert isinstance(alignment, int)
    data = -(-file.tell() // alignment) * alignment
    tensors = {name: Tensor(kind, dims, data + offset) for name, kind, dims, offset in directory}
    return Gguf(path, metadata, tensors)


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise struct.error("the file ends inside its header")
    return data


def _string(file: BinaryIO) -> str:
    (size,) = struct.unpack("<Q", _exactly(file, 8))
    return _exactly(file, size).decode("utf-8")


def _scalar(file: BinaryIO, kind: int) -> Scalar:
    if kind == _STRING:
        return _string(file)
    code = "<" + _SCALARS[kind]
    (value,) = struct.unpack(code, _exactly(file, struct.calcsize(code)))
    return value  # type: ignore[no-any-return]


def _array(file: BinaryIO) -> tuple[Scalar, ...]:
    kind, count = struct.unpack("<IQ", _exactly(file, 12))
    if kind == _STRING:
        for _ in range(count):  # token lists: stepped over, never kept
            (size,) = struct.unpack("<Q", _exactly(file, 8))
            file.seek(size, 1)
        return ()
    code = _SCALARS[kind]
    raw = _exactly(file, count * struct.calcsize("<" + code))
    return struct.unpack(f"<{count}{code}", raw) if count <= 1024 else ()


def _tensor(file: BinaryIO) -> tuple[str, int, tuple[int, ...], int]:
    name = _string(file)
    (dimensions,) = struct.unpack("<I", _exactly(file, 4))
    dims = struct.unpack(f"<{dimensions}Q", _exactly(file, 8 * dimensions))
    kind, offset = struct.unpack("<IQ", _exactly(file, 12))
    return name, kind, dims, offset
