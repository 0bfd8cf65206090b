"""llama.cpp behind a narrow door: tokens, batches, sequences, state blobs, cells, captured queries, abort.

The only module that calls llama.cpp's C functions. It knows nothing of chunks, plans or prompts.
A context has one unified KV cache; a cell may belong to several sequences at once, so that copying between
sequences moves no data.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import llama_cpp.llama_cpp as c
import numpy as np
import numpy.typing as npt
from llama_cpp._ggml import libggml

from quire_engine.errors import Aborted, ModelError, QuireError
from quire_engine.runtimes import llama_state
from quire_engine.runtimes.llama_amx import avoid_amx
from quire_engine.types import Float16, Float32

BATCH_TOKENS = 1024  # twice llama.cpp's default: 8 % faster here, docs/decisions/llama_cpp_spans.md
KV_F16 = 1  # ggml_type of the KV cache; flash attention on, which also keeps V rows contiguous
_FLASH_ATTENTION_ON = 1
_NO_ABORT = c.ggml_abort_callback(0)  # a null pointer: llama.cpp asks nobody
_INT32 = ctypes.POINTER(ctypes.c_int32)
_ABORTED = 2  # llama_decode's code for "aborted, the memory keeps the finished part"

libggml.ggml_get_name.restype = ctypes.c_char_p
libggml.ggml_get_name.argtypes = [ctypes.c_void_p]
libggml.ggml_op_desc.restype = ctypes.c_char_p
libggml.ggml_op_desc.argtypes = [ctypes.c_void_p]
libggml.ggml_nbytes.restype = ctypes.c_size_t
libggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
for _moves in (libggml.ggml_backend_tensor_get, libggml.ggml_backend_tensor_set):
    _moves.restype = None
    _moves.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

Rows = npt.NDArray[np.intp]
OnLayer = Callable[[int, Rows], None]
_Watch = Callable[[int, bool], bool]


class _Tensor(ctypes.Structure):
    """The beginning of a ggml_tensor, which has no functions that tell where it comes from."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


# llama.cpp writes hundreds of lines to stderr; failures reach us through return codes.
_no_log = c.llama_log_callback(lambda _level, _text, _data: None)


class LlamaModel:
    """Weights and vocabulary of one GGUF file; `vocabulary_only` loads in milliseconds and cannot compute."""

    def __init__(self, path: Path, vocabulary_only: bool = False) -> None:
        c.llama_log_set(_no_log, ctypes.c_void_p(0))
        c.llama_backend_init()
        avoid_amx()
        parameters = c.llama_model_default_params()
        parameters.vocab_only = vocabulary_only
        if not vocabulary_only:
            parameters.n_gpu_layers = -1
        self.handle = c.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.handle:
            raise ModelError(
                f"llama.cpp cannot load {path}.",
                "The file may be damaged, or too new for this version. Try another model with --model.",
            )
        self.vocabulary = c.llama_model_get_vocab(self.handle)
        self.adds_bos = bool(c.llama_vocab_get_add_bos(self.vocabulary))

    def tokenize(self, text: str, special: bool = False, start: bool = False) -> list[int]:
        """Token ids of a text. special: read control tokens written in it (templates only, never documents).
        start: put BOS in front where the model wants one."""
        data = text.encode("utf-8", errors="replace")
        capacity = len(data) + 16
        tokens = (ctypes.c_int32 * capacity)()
        count = c.llama_tokenize(self.vocabulary, data, len(data), tokens, capacity, start, special)
        if count < 0:
            raise ModelError("llama.cpp could not tokenize the text.", details=f"code {count}")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of one token; control tokens give nothing."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = int(c.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, False))
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    @property
    def end_text(self) -> str:
        """How the token that ends a text is written; empty where there is none."""
        token = int(c.llama_vocab_eos(self.vocabulary))
        text = c.llama_vocab_get_text(self.vocabulary, token) if token >= 0 else b""
        return str(text.decode("utf-8", errors="replace"))

    def is_end(self, token: int) -> bool:
        return bool(c.llama_vocab_is_eog(self.vocabulary, token))

    @property
    def vocabulary_size(self) -> int:
        return int(c.llama_vocab_n_tokens(self.vocabulary))


class LlamaContext:
    """One KV cache of `cells` tokens shared by `sequences` sequences. Not thread-safe."""

    def __init__(self, model: LlamaModel, cells: int, sequences: int, threads: int, kv_type: int = KV_F16) -> None:
        """kv_type: ggml's number for the type of the cache."""
        self.model = model
        self.cells = cells
        self.sequences = sequences
        self.batch_tokens = BATCH_TOKENS
        self._cache_tensors = 2 * int(c.llama_model_n_layer(model.handle))
        self._watch: _Watch | None = None
        self._failure: BaseException | None = None  # of the watch: ctypes would swallow it
        self._caches: dict[tuple[str, int], int] = {}  # ("k" or "v", layer) -> the tensor that holds all cells' rows
        self._eval_callback = c.ggml_backend_sched_eval_callback(self._on_node)
        parameters = c.llama_context_default_params()
        parameters.n_ctx = cells
        parameters.n_batch = parameters.n_ubatch = self.batch_tokens
        parameters.n_seq_max = sequences
        parameters.kv_unified = True
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = _FLASH_ATTENTION_ON
        parameters.type_k = parameters.type_v = kv_type
        parameters.swa_full = True
        parameters.no_perf = True
        parameters.cb_eval = self._eval_callback
        self.handle = c.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise ModelError(
                f"llama.cpp could not make a context of {cells} tokens.",
                "Close other programs to free memory, or ask with a smaller --context-tokens.",
            )
        self.memory = c.llama_get_memory(self.handle)
        self._abort_callback = _NO_ABORT

    def close(self) -> None:
        if self.handle:
            c.llama_free(self.handle)
            self.handle, self.cells = None, 0

    def decode(
        self, tokens: Sequence[int], positions: npt.ArrayLike, sequences: npt.ArrayLike, scored: int = 0
    ) -> None:
        """Computes tokens at their positions, each in its sequence (scalars broadcast). scored: how many of the last
        ones give scores, at most BATCH_TOKENS.

        Raises Aborted when the abort check said so, ContextOverflow never (callers size the context).
        """
        count = len(tokens)
        token_ids = np.asarray(tokens, dtype=np.int32)
        place = np.ascontiguousarray(np.broadcast_to(np.asarray(positions, dtype=np.int32), (count,)))
        owner = np.ascontiguousarray(np.broadcast_to(np.asarray(sequences, dtype=np.int32), (count,)))
        wanted = np.zeros(count, dtype=np.int8)
        wanted[count - scored :] = 1
        for start in range(0, count, self.batch_tokens):
            part = slice(start, min(start + self.batch_tokens, count))
            self._decode(token_ids[part], place[part], owner[part], wanted[part])

    def _decode(
        self,
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        owners: npt.NDArray[np.int32],
        wanted: npt.NDArray[np.int8],
    ) -> None:
        ones = np.ones(len(tokens), dtype=np.int32)
        addresses = owners.ctypes.data + 4 * np.arange(len(tokens), dtype=np.uint64)
        batch = c.llama_batch(
            n_tokens=len(tokens),
            token=tokens.ctypes.data_as(_INT32),
            pos=positions.ctypes.data_as(_INT32),
            n_seq_id=ones.ctypes.data_as(_INT32),
            seq_id=ctypes.cast(addresses.ctypes.data, ctypes.POINTER(_INT32)),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        code = c.llama_decode(self.handle, batch)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if code == _ABORTED:
            raise Aborted
        if code != 0:
            raise QuireError(
                "llama.cpp refused a batch of tokens.",
                "Ask again; if it happens again, use --dial exact and report it.",
                f"llama_decode returned {code} for {len(tokens)} tokens in a context of {self.cells}",
            )

    def scores(self, count: int) -> Float32:
        """What follows each of the last tokens [count, vocabulary], after a decode that asked for that many."""
        size = (self.model.vocabulary_size,)
        found = np.empty((count, *size), np.float32)
        for place in range(count):
            found[place] = np.ctypeslib.as_array(c.llama_get_logits_ith(self.handle, place - count), size)
        return found

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Makes the cells of `source` at positions start..stop belong to `target` too; no data moves."""
        if start < stop:
            c.llama_memory_seq_cp(self.memory, source, target, start, stop)

    def remove(self, sequence: int, start: int = 0, stop: int = -1) -> bool:
        """Takes positions start..stop from a sequence; false where the model's memory cannot lose only a part."""
        return bool(c.llama_memory_seq_rm(self.memory, sequence, start, stop))

    def read_state(self, sequence: int) -> npt.NDArray[np.uint8]:
        """The state blob of one sequence; llama_state.py knows its layout."""
        size = int(c.llama_state_seq_get_size(self.handle, sequence))
        blob = np.empty(size, dtype=np.uint8)
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = int(c.llama_state_seq_get_data(self.handle, pointer, size, sequence))
        if written == 0:
            raise QuireError("llama.cpp did not give its KV state.", details=f"size {size}")
        return blob[:written]

    def write_state(self, sequence: int, blob: npt.NDArray[np.uint8]) -> None:
        """Replaces one sequence by the rows of a state blob."""
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not c.llama_state_seq_set_data(self.handle, pointer, blob.size, sequence):
            raise QuireError("llama.cpp did not accept the stored KV.", "Ask with --dial exact.")

    def cell_rows(self, kind: str, layer: int, cells: Rows) -> Float16:
        """Keys ("k") or values ("v") that a layer has in these cells [cells, kv_heads * dim]."""
        first, stop = int(cells.min()), int(cells.max()) + 1
        tensor = self._cache(kind, layer)
        rows = np.empty((stop - first, _row_bytes(tensor) // 2), dtype=np.float16)
        libggml.ggml_backend_tensor_get(tensor, rows.ctypes.data, first * _row_bytes(tensor), rows.nbytes)
        return rows[cells - first]

    def set_cell_rows(self, kind: str, layer: int, cells: Rows, rows: Float16) -> None:
        """Overwrites keys or values. rows: as cell_rows gives them."""
        tensor, rows = self._cache(kind, layer), np.ascontiguousarray(rows)
        size = _row_bytes(tensor)
        edges = np.flatnonzero(np.diff(cells) != 1) + 1
        for start, stop in pairwise([0, *edges.tolist(), len(cells)]):
            offset, count = int(cells[start]) * size, (stop - start) * size
            libggml.ggml_backend_tensor_set(tensor, rows[start:stop].ctypes.data, offset, count)

    def _cache(self, kind: str, layer: int) -> int:
        if (kind, layer) not in self._caches:  # llama.cpp tells nobody; a graph shows them
            last = self.sequences - 1
            self.remove(last)
            self.decode((0,), 0, last)
            self.remove(last)
        if (kind, layer) not in self._caches:
            raise llama_state.unexpected(f"no node writes cache_{kind}_l{layer}")
        return self._caches[kind, layer]

    @contextmanager
    def capturing_queries(self, layers: Sequence[int]) -> Iterator[dict[int, list[Float32]]]:
        """Within the block, decode keeps the rotated queries of `layers` and stops after the last of them.

        Yields layer -> list of [tokens, heads, head_dim] arrays, one per batch. What is computed meanwhile has no
        valid KV in the layers after the last one and no logits: use a scratch sequence and remove it.
        """
        captured: dict[int, list[Float32]] = {}

        def look(tensor: int, ask: bool) -> bool:
            name = libggml.ggml_get_name(tensor)
            if not name.startswith(b"Qcur-") or libggml.ggml_op_desc(tensor) != b"ROPE":
                return False
            layer = int(name[5:])
            if ask:
                return layer in layers
            values = np.empty(libggml.ggml_nbytes(tensor) // 4, dtype=np.float32)
            libggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            captured.setdefault(layer, []).append(values)
            return layer != max(layers)  # false ends the computation: deeper layers are not needed

        with self._watching(look):
            yield captured

    @contextmanager
    def stopping_after(self, layers: int) -> Iterator[None]:
        """Within the block, decode computes only the first `layers` layers; deeper KV of its tokens is not valid."""
        with self.capturing_queries([layers]):  # the next layer's queries need nothing of its own keys
            yield

    @contextmanager
    def settling(self, on_layer: OnLayer, layers: int) -> Iterator[None]:
        """Within the block, decode calls on_layer(layer, cells of the batch's tokens) when their keys and values are in
        the cells, before anything attends to the layer, and ends with the last layer's call: there are no scores."""

        def look(tensor: int, ask: bool) -> bool:
            written = _written_by(tensor)
            if written is None or written[0] != "v":  # keys are written before values
                return False
            if not ask:
                on_layer(written[1], _set_rows_cells(tensor))
            return ask or written[1] != layers - 1

        with self._watching(look):
            yield

    @contextmanager
    def _watching(self, watch: _Watch) -> Iterator[None]:
        self._watch = watch
        try:
            yield
        finally:
            self._watch = None

    def abort_when(self, should_stop: Callable[[], bool] | None) -> None:
        """From now on decode raises Aborted soon after should_stop() turns true; None: never.

        Not used while generating: the check runs once per graph node and costs a millisecond a token.
        """
        # Kept alive while llama.cpp may call it.
        self._abort_callback = _NO_ABORT if should_stop is None else c.ggml_abort_callback(lambda _data: should_stop())
        if self.handle:
            c.llama_set_abort_callback(self.handle, self._abort_callback, ctypes.c_void_p(0))

    def _on_node(self, tensor: int, ask: bool, _data: int | None) -> bool:
        """llama.cpp asks for every graph node whether its value is wanted, then shows it; false then ends the work."""
        try:
            if len(self._caches) < self._cache_tensors and (written := _written_by(tensor)):
                self._caches[written] = _Tensor.from_address(tensor).view_src
            return self._watch is not None and self._watch(tensor, ask)
        except BaseException as error:
            self._failure = error
            return ask


def _written_by(node: int) -> tuple[str, int] | None:
    """Which cache a graph node writes rows to: keys or values, and the layer."""
    name = libggml.ggml_get_name(node)
    if not name.startswith(b"cache_") or libggml.ggml_op_desc(node) != b"SET_ROWS":
        return None
    kind, layer = name.split(b" ")[0].removeprefix(b"cache_").split(b"_l")
    return kind.decode(), int(layer)


def _set_rows_cells(node: int) -> Rows:
    """The cells that a node writes its rows to, in the order of the batch's tokens."""
    numbers = _Tensor.from_address(node).src[1]
    cells = np.empty(libggml.ggml_nbytes(numbers) // 8, dtype=np.int64)
    libggml.ggml_backend_tensor_get(numbers, cells.ctypes.data, 0, cells.nbytes)
    return cells.astype(np.intp)


def _row_bytes(tensor: int) -> int:
    return int(_Tensor.from_address(tensor).nb[1])
