"""What drawing pictures asks of its options."""

from collections.abc import Iterator
from pathlib import Path

from library.options.groups.generation import GenNetworkOptions, PictureOptions, PromptOptions
from library.options.scripts import SdxlGenImgOptions


def generation_problems(options: SdxlGenImgOptions) -> Iterator[str]:
    """Yield what keeps pictures from being drawn."""
    if options.model.ckpt is None:
        yield "--ckpt is missing. Name an SDXL checkpoint file or a diffusers folder."
    yield from _prompt_problems(options.prompt)
    yield from _picture_problems(options.picture)
    yield from _gen_network_problems(options.network)


def _prompt_problems(prompt: PromptOptions) -> Iterator[str]:
    if prompt.prompt is None and prompt.from_file is None and not prompt.interactive:
        yield "There is nothing to draw: give --prompt, or --from_file with one prompt per line."
    if prompt.from_file is not None and not Path(prompt.from_file).is_file():
        yield f"--from_file: there is no file {prompt.from_file}."


def _picture_problems(picture: PictureOptions) -> Iterator[str]:
    for name, side in (("W", picture.W), ("H", picture.H)):
        if side is not None and side % 8:
            yield f"--{name} must be a multiple of 8, not {side}; {round(side / 8) * 8} is near."


def _gen_network_problems(network: GenNetworkOptions) -> Iterator[str]:
    modules, files = len(network.network_module or ()), len(network.network_weights or ())
    if modules != files:
        yield f"--network_module and --network_weights belong together, one file per module; there are {modules} and {files}."
    for name, given in (("network_mul", network.network_mul), ("network_args", network.network_args)):
        if len(given or ()) > max(modules, files):
            yield f"--{name} takes one value per network; there are {len(given or ())} values and {max(modules, files)} networks."


def generation_notes(options: SdxlGenImgOptions) -> Iterator[str]:
    """Yield what is odd about a run that draws, but can be done."""
    model, prompt = options.model, options.prompt
    if model.clip_skip is not None:
        yield "--clip_skip has no influence on SDXL, which always uses the second to last layer."
    if model.fp16 and model.bf16:
        yield "--fp16 and --bf16 were both given; float16 is used."
    if prompt.no_preview:
        yield "--no_preview has no effect: images are written to --outdir and never shown in a window."
