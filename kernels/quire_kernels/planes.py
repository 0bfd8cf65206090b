"""Bit planes: small codes stored one bit position at a time, so that a reader may stop after the top planes.

Knows nothing of what the codes mean. Plane 0 holds every code's most significant bit; within a plane, code i
is bit i % 8 (least significant first) of byte i // 8. Unused bits of the last byte are zero.
"""

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


def unpack(planes: UInt8, n: int) -> UInt8:
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
