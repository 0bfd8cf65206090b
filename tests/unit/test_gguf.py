"""Reading GGUF headers: shape, RoPE, what is refused and why, damage, and the fingerprint."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from quire_engine import gguf
from quire_engine.errors import ModelError
from quire_engine.types import ModelShape, Rope
from tiny_gguf import LLAMA3_FACTORS, Setting, write_tiny_gguf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "model.gguf")


def read_tiny(tmp_path: Path, architecture: str = "llama", metadata: dict[str, Setting] | None = None) -> gguf.Gguf:
    """A tiny model's header with more metadata."""
    return gguf.read(write_tiny_gguf(tmp_path / "m.gguf", architecture, metadata=metadata))


def test_shape(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", layers=3, heads=6, kv_heads=3, head_dim=8, context=777, rope_base=5e5)
    assert gguf.shape(gguf.read(path)) == ModelShape(
        architecture="llama",
        layers=3,
        heads=6,
        kv_heads=3,
        key_dim=8,
        value_dim=8,
        context_tokens=777,
        rope=Rope("adjacent", 8, 5e5),
    )


def test_dimensions_follow_from_the_width_where_the_file_does_not_name_them(model: Path) -> None:
    header = gguf.read(model)
    for key in ("key_length", "value_length", "head_count_kv"):
        del header.metadata[f"llama.attention.{key}"]
    for key in ("dimension_count", "freq_base"):
        del header.metadata[f"llama.rope.{key}"]
    shape = gguf.shape(header)
    assert (shape.kv_heads, shape.key_dim, shape.value_dim) == (4, 16, 16)
    assert shape.rope == Rope("adjacent", 16, 10000.0)


@pytest.mark.parametrize(("architecture", "layout"), [("llama", "adjacent"), ("qwen2", "halves"), ("qwen3", "halves")])
def test_rope_layout(tmp_path: Path, architecture: str, layout: str) -> None:
    header = read_tiny(tmp_path, architecture)
    assert gguf.shape(header).rope.layout == layout
    assert gguf.why_not_stitchable(header) == ""


def test_rope_scale_and_partial_rotation(tmp_path: Path) -> None:
    scaling: dict[str, Setting] = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    header = read_tiny(tmp_path, metadata={**scaling, "rope.dimension_count": 8})
    assert gguf.why_not_stitchable(header) == ""
    assert gguf.shape(header).rope == Rope("adjacent", 8, 10000.0, scale=0.25)


def test_a_scaling_factor_counts_only_when_there_is_scaling(tmp_path: Path) -> None:
    """llama.cpp: "never scale if scaling type is none"."""
    header = read_tiny(tmp_path, metadata={"rope.scaling.type": "none", "rope.scaling.factor": 4.0})
    assert gguf.shape(header).rope.scale == 1.0


def test_rope_factors(tmp_path: Path) -> None:
    header = gguf.read(write_tiny_gguf(tmp_path / "m.gguf", rope_factors=True))
    factors = gguf.shape(header).rope.factors
    assert (len(factors), factors[0], factors[-1]) == (8, *LLAMA3_FACTORS)
    assert factors == tuple(sorted(factors))
    assert gguf.why_not_stitchable(header) == ""


@pytest.mark.parametrize(
    ("architecture", "metadata", "sentence"),
    [
        ("llama", {"ssm.state_size": 16}, "tiny llama is recurrent (llama): its state cannot be cut into chunks."),
        ("qwen2", {"wkv.head_size": 64}, "tiny qwen2 is recurrent (qwen2): its state cannot be cut into chunks."),
        (
            "qwen2",
            {"rope.dimension_sections": [4, 6, 6, 0]},
            "tiny qwen2 uses multi-axis RoPE (M-RoPE): chunks cannot be moved to other positions.",
        ),
        (
            "llama",
            {"attention.kv_lora_rank": 8},
            "tiny llama keeps latent attention (MLA) instead of keys and values.",
        ),
        (
            "llama",
            {"attention.sliding_window": 128},
            "tiny llama uses sliding-window attention: a chunk read alone saw a different window.",
        ),
        ("gemma", {}, "Reuse has not been verified for the architecture gemma."),
        (
            "llama",
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            "tiny llama scales RoPE by yarn, which depends on the prompt's length.",
        ),
        (
            "qwen3",
            {"attention.head_count_kv": [2, 1]},
            "tiny qwen3 has different numbers of attention heads in different layers.",
        ),
    ],
)
def test_refusals(tmp_path: Path, architecture: str, metadata: dict[str, Setting], sentence: str) -> None:
    header = read_tiny(tmp_path, architecture, metadata)
    assert gguf.why_not_stitchable(header) == sentence
    assert gguf.shape(header).layers == 2  # still known well enough for full prefill


def test_equal_per_layer_lists_count_as_one_number(tmp_path: Path) -> None:
    header = read_tiny(tmp_path, metadata={"attention.head_count_kv": [2, 2], "attention.head_count": [4, 4]})
    assert gguf.why_not_stitchable(header) == ""
    assert (gguf.shape(header).heads, gguf.shape(header).kv_heads) == (4, 2)


def test_mixed_query_heads_do_not_break_the_shape(tmp_path: Path) -> None:
    """Pruned models (Nemotron, OpenELM) have fewer heads in some layers; full prefill must still work."""
    header = read_tiny(tmp_path, "gemma", {"attention.head_count": [4, 2], "attention.head_count_kv": [2, 1]})
    assert gguf.shape(header).layers == 2
    assert gguf.why_not_stitchable(header)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no model file at"):
        gguf.read(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        gguf.read(tmp_path)


@pytest.mark.parametrize("data", [b"", b"GGU", b"PK\x03\x04" + bytes(100), b"%PDF-1.7\n" * 20])
def test_not_gguf(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match="is not a GGUF model"):
        gguf.read(tmp_path / "m.gguf")


def test_unknown_version(model: Path) -> None:
    data = model.read_bytes()
    for version in (1, 4, 1 << 24):
        model.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
        with pytest.raises(ModelError, match=f"is GGUF version {version}"):
            gguf.read(model)


def test_a_header_cut_anywhere_is_damaged(model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    header = min(tensor.offset for tensor in gguf.read(model).tensors.values())
    # The alignment's padding may be missing: nothing is read there.
    directory = len(data[:header].rstrip(b"\0"))
    cut = tmp_path / "cut.gguf"
    for length in [4, 7, 8, 23, 24, 25, *range(30, directory, 97), directory - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ModelError, match="is damaged or incomplete") as error:
            gguf.read(cut)
        assert error.value.hint


@pytest.mark.parametrize("count_at", [8, 16, 24], ids=["tensors", "metadata", "first key"])
def test_absurd_counts_are_damage(model: Path, count_at: int) -> None:
    data = bytearray(model.read_bytes())
    data[count_at : count_at + 8] = struct.pack("<Q", 1 << 62)
    model.write_bytes(data)
    with pytest.raises(ModelError, match="is damaged or incomplete"):
        gguf.read(model)


def test_token_lists_are_not_kept(model: Path) -> None:
    header = gguf.read(model)
    assert "tokenizer.ggml.tokens" not in header.metadata
    assert header.metadata["tokenizer.ggml.model"] == "llama"
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True


def of(path: Path) -> bytes:
    return gguf.fingerprint(gguf.read(path))


def test_a_copy_has_the_same_fingerprint(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "renamed.gguf")
    assert of(tmp_path / "renamed.gguf") == of(model)
    assert len(of(model)) == 32


@pytest.mark.parametrize(
    "other",
    [
        lambda path: write_tiny_gguf(path, seed=1),
        lambda path: write_tiny_gguf(path, rope_base=10001.0),
        lambda path: write_tiny_gguf(path, bos=False),
        lambda path: write_tiny_gguf(path, chat_template="{{ messages[0].content }}"),
        lambda path: write_tiny_gguf(path, metadata={"general.name": "tiny llamb"}),
        lambda path: write_tiny_gguf(path, metadata={"rope.scaling.type": "linear"}),
    ],
    ids=["weights", "rope", "bos", "template", "name", "more metadata"],
)
def test_any_other_model_has_another_fingerprint(model: Path, tmp_path: Path, other: Callable[[Path], Path]) -> None:
    assert of(other(tmp_path / "other.gguf")) != of(model)


@pytest.mark.parametrize("where", [0.0, 0.37, 0.999])
def test_one_changed_weight_changes_the_fingerprint(model: Path, where: float) -> None:
    """The samples of a small file cover all of it."""
    before, data = of(model), bytearray(model.read_bytes())
    first = min(tensor.offset for tensor in gguf.read(model).tensors.values())
    data[first + int(where * (len(data) - first))] ^= 1
    model.write_bytes(data)
    assert of(model) != before


def test_a_longer_file_has_another_fingerprint(model: Path) -> None:
    before = of(model)
    with model.open("ab") as file:
        file.write(b"\0")
    assert of(model) != before
