"""Which compilers --torch_compile can be given."""

from collections.abc import Iterator

from library.options.groups.compile import GONE_BACKENDS, CompileOptions


def compile_problems(options: CompileOptions) -> Iterator[str]:
    """Yield why blocks cannot be compiled by what was asked for."""
    if not options.torch_compile:
        return
    if options.dynamo_backend in GONE_BACKENDS:
        yield (
            f"--dynamo_backend {options.dynamo_backend}: no version of PyTorch that this suite runs on has this compiler. "
            "Choose inductor, which is the default."
        )
    if options.dynamo_backend == "cudagraphs":
        yield (
            "--dynamo_backend cudagraphs records kernels to repeat them, which has not been tried with blocks that share what is "
            "compiled and are trained. Choose inductor."
        )
