"""The codecs that `--base_quant` names."""

from collections.abc import Mapping

from library.memory.blockwise import INT8, NF4
from library.memory.fp8 import SCALED_FLOAT8
from library.memory.packed import Codec

CODECS: Mapping[str, Codec] = {"fp8": SCALED_FLOAT8, "int8": INT8, "nf4": NF4}
"""By the option's value."""
