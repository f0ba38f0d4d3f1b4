"""Options about torch.compile."""

from typing import ClassVar, Literal

from library.options.declare import OptionGroup, flag, option


class CompileOptions(OptionGroup):
    """Compilation of the model."""

    topic: ClassVar[str] = "torch.compile"

    torch_compile: bool = flag("Compile the model; slow to start, faster steps.")
    dynamo_backend: Literal[
        "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs",
        "ofi", "fx2trt", "onnxrt", "tensort", "ipex", "tvm",
    ] = option("inductor", "Compiler behind --torch_compile.")  # fmt: skip
