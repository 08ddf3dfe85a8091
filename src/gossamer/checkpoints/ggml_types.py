"""The tensor types of ggml: their block sizes, and the formats that hold their values without loss."""

from __future__ import annotations

from gossamer.errors import CheckpointError, UnsupportedError

__all__ = ["LOSSLESS", "TYPES", "row_bytes"]

TYPES: dict[str, tuple[int, int, int]] = {
    # name: (id in the file, elements of a block, bytes of a block)
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36),
    "Q1_0": (41, 128, 18),
}

LOSSLESS: dict[str, str] = {
    # The format expression that holds exactly the values of the type.
    "Q4_0": "int4/g32",
    "Q4_1": "uint4/g32-m(f16)",
    "Q5_0": "int5/g32",
    "Q5_1": "uint5/g32-m(f16)",
    "Q8_0": "int8/g32",
    "Q2_K": "uint2/g16*(uint4/g16-z(0))-m(uint4/g16-z(0))",
    "Q3_K": "int3/g16*(int6/g16)",
    "Q4_K": "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))",
    "Q5_K": "uint5/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))",
    "Q6_K": "int6/g16*(int8/g16)",
    "MXFP4": "e2m1/g32*e8m0",
    "NVFP4": "e2m1/g16*e4m3",
}


def row_bytes(type: str, cols: int) -> int:
    """Bytes of one row of `cols` elements.

    UnsupportedError: an unknown type; CheckpointError: cols is not a multiple of the type's block.
    """
    if type not in TYPES:
        raise UnsupportedError(f"the tensor type '{type}' is not known; known are {', '.join(TYPES)}")
    _, elems, nbytes = TYPES[type]
    if cols % elems:
        raise CheckpointError(
            f"rows of {cols} elements cannot be {type}, whose blocks hold {elems} elements; "
            f"the row length must be a multiple of {elems}"
        )
    return cols // elems * nbytes
