"""Bit planes: small codes stored one bit position at a time, so that a reader may stop after the top planes.

Plane 0 holds every code's most significant bit; within a plane, code i is bit i % 8 (least significant first) of byte
i // 8. Unused bits of the last byte are zero. Where channels have widths of their own, plane p holds only those wider
than p, so that the last planes are short: channels by falling width, so that each plane has a beginning of that row.
Knows nothing of what the codes mean.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]


def _spread_tables() -> npt.NDArray[np.uint64]:
    """Table [bit, byte]: the eight bits of a byte, each moved to the given bit of one of eight code bytes."""
    bits_of_byte = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    # Eight code bytes seen as one uint64: right in either byte order, as they are written back the same way.
    return np.stack([(bits_of_byte << bit).view(np.uint64)[:, 0] for bit in range(8)])


_SPREAD = _spread_tables()


def plane_bytes(codes: int) -> int:
    """Bytes of one plane of so many codes."""
    return -(-codes // 8)


def pack(codes: UInt8, bits: int) -> UInt8:
    """Codes [n], each below 2**bits -> planes [bits, ceil(n / 8)], most significant first.

    Raises ValueError when bits is not 1..8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    # Kept at their full width: packbits counts any non-zero value as a one.
    return np.stack([np.packbits(codes & (1 << bit), bitorder="little") for bit in reversed(range(bits))])


def unpack(planes: UInt8 | Sequence[UInt8], n: int) -> UInt8:
    """The top planes of n codes [planes, ceil(n / 8)] -> those codes [n], read as codes of that many bits."""
    width = len(planes)
    codes = _SPREAD[width - 1].take(planes[0])  # [ceil(n / 8)] uint64, eight codes each
    spread = np.empty_like(codes)
    for plane, bit in zip(planes[1:], reversed(range(width - 1)), strict=True):
        # mode="wrap" only spares NumPy a second buffer: a byte cannot leave the table.
        np.take(_SPREAD[bit], plane, out=spread, mode="wrap")
        codes |= spread
    unpacked: UInt8 = codes.view(np.uint8)[:n]
    return unpacked


def channels_in_planes(widths: UInt8) -> list[int]:
    """How many channels each plane holds, for channels of these widths (0..8)."""
    return [int(np.count_nonzero(widths > plane)) for plane in range(int(widths.max(initial=0)))]


def pack_by_width(codes: UInt8, widths: UInt8) -> tuple[UInt8, ...]:
    """Codes [rows, channels], each below 2**width of its channel -> the planes, most significant first."""
    widest, order = int(widths.max(initial=0)), _falling(widths)
    aligned = codes[:, order] << (widest - widths[order])  # every channel's first bit is the same one
    return tuple(
        np.packbits(aligned[:, :held] & (1 << (widest - 1 - plane)), bitorder="little")
        for plane, held in enumerate(channels_in_planes(widths))
    )


def unpack_by_width(planes: Sequence[UInt8], widths: UInt8, start: int, stop: int) -> UInt8:
    """The top planes of rows 0, 1, ... -> codes [stop - start, channels] of rows start..stop, as if all channels had
    that many bits: narrow ones end in zeros. start: a multiple of 8."""
    rows, kept = stop - start, len(planes)
    sorted_codes = np.zeros((rows, len(widths)), np.uint8)
    for plane, held in enumerate(channels_in_planes(widths)[:kept]):
        codes = planes[plane][start * held // 8 : plane_bytes(stop * held)]
        spread = _SPREAD[kept - 1 - plane].take(codes).view(np.uint8)
        sorted_codes[:, :held] |= spread[: rows * held].reshape(rows, held)
    unpacked = np.empty_like(sorted_codes)
    # mode="wrap" as in unpack; permuted as bytes, because four times as much as float32 takes longer.
    np.take(sorted_codes, np.argsort(_falling(widths)), axis=1, out=unpacked, mode="wrap")
    return unpacked


def _falling(widths: UInt8) -> npt.NDArray[np.intp]:
    """Channels, the widest first, equal ones in their order."""
    return np.argsort(-widths.astype(np.int8), kind="stable")
