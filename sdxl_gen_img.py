"""Draw images with an SDXL model.

    # one prompt, four images, two at a time
    python sdxl_gen_img.py --ckpt sdxl.safetensors --outdir out --bf16 --sampler euler_a --steps 28 --scale 6 \\
        --prompt "a lighthouse at dusk, (oil painting:1.2) --n blurry --w 1216 --h 832" --images_per_prompt 4 --batch_size 2

    # a file with one prompt per line, long prompts, a LoRA at strength 0.8
    python sdxl_gen_img.py --ckpt sdxl.safetensors --outdir out --bf16 --from_file prompts.txt --max_embeddings_multiples 3 \\
        --network_module networks.lora --network_weights out/my_lora.safetensors --network_mul 0.8

    # the LoRA merged into the weights: faster; prompts typed in one after another
    python sdxl_gen_img.py --ckpt sdxl.safetensors --outdir out --bf16 --interactive \\
        --network_module networks.lora --network_weights out/my_lora.safetensors --network_merge

A prompt may end in options: --n negative prompt, --w and --h size, --s steps, --l guidance scale, --d seed or seeds, --am network
strengths, --ow --oh --nw --nh --ct --cl sizes SDXL is told. docs/options.md explains every option of the command line.
"""

import logging
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from library.generation.additions import ControlFile, guide_images, planned_controls, planned_words, with_guide_images
from library.generation.network_files import NetworkFile, planned_networks
from library.generation.plan import (
    PictureSettings,
    batches,
    find_problems,
    locate_prompt,
    log_notes,
    plan_pictures,
    raise_refusals,
    read_prompts,
    requests_of,
    resolve_checkpoint,
)
from library.generation.request import ImageRequest
from library.generation.seeds import SeedSeries
from library.options.console import set_up_logging
from library.options.entry import run_script
from library.options.errors import UsageError, UserError
from library.options.groups.generation import GenModelOptions
from library.options.parse import parse
from library.options.scripts import SdxlGenImgOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.generation.networks import AttachedNetworks
    from library.generation.output import PictureFiles
    from library.generation.pipeline import Pipeline
    from library.models.sdxl.family import SdxlFamily

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Draw what the command line asks for.

    Raises:
        UsageError: the command line or a prompt cannot be used; nothing has been loaded then.
        UserError: a file cannot be used, or a picture came out black.
    """
    # What was asked, checked before anything heavy is imported.
    options = parse(SdxlGenImgOptions, argv, find_problems)
    set_up_logging(options.console)
    checkpoint = resolve_checkpoint(options.model.ckpt or "")
    networks, words, controls = planned_networks(options.network), planned_words(options.network), planned_controls(options.network)
    settings, prompts = PictureSettings.of(options), read_prompts(options.prompt)
    log_notes(prompts, settings)
    guides = guide_images(options.network)
    requests = with_guide_images(plan_pictures(prompts, settings), guides, len(controls))

    # The model, its words and networks, the folder.
    pipeline = load_pipeline(checkpoint, words, options)
    attached = attach(networks, pipeline, options)
    attach_controls(controls, pipeline, options)
    files = open_folder(checkpoint, options)

    # The pictures.
    draw_all(requests, options.prompt.batch_size, pipeline, attached, files)
    if options.prompt.interactive:
        drawn = len(requests)
        for typed in typed_prompts(settings):
            typed = with_guide_images(typed, guides, len(controls), drawn)
            drawn += len(typed)
            draw_all(typed, options.prompt.batch_size, pipeline, attached, files)
    if pipeline.num_not_finite:
        raise UserError(f"{pipeline.num_not_finite} of the pictures came out black, for the reasons told above.")


# ---------------------------------------------------------------- model


def load_pipeline(checkpoint: str, words: Sequence[str], options: SdxlGenImgOptions) -> "Pipeline":
    """Load the model onto the best device there is, and teach it learned words."""
    import torch

    from library.generation.pipeline import Pipeline
    from library.models.family import Components, ModelSource
    from library.models.prompt_weights import PromptStyle
    from library.models.sdxl.family import SdxlFamily

    model = options.model
    dtype, device = compute_dtype(model), best_device()
    family = SdxlFamily.open(
        ModelSource(checkpoint, model.vae, prefer_fp16_variant=model.fp16, tokenizer_cache_dir=model.tokenizer_cache_dir)
    )
    logger.info(f"Loading {checkpoint} in {dtype} on {device}")
    # SDXL's own VAE overflows in float16.
    vae_dtype = torch.float32 if model.no_half_vae or model.fp16 else dtype
    unet, vae = family.load_denoiser(dtype, device), family.load_vae(vae_dtype, device)
    family.set_attention(unet, model.attention)
    if model.opt_channels_last:
        for part in (unet, vae):
            part.to(memory_format=torch.channels_last)
    encoders = family.load_text_encoders(dtype, device)
    if words:
        family = with_learned_words(family, encoders, words)
    components = Components(unet, vae, [*encoders])
    style = PromptStyle(max_chunks=options.prompt.max_embeddings_multiples or 1)
    return Pipeline(
        family,
        components,
        device=device,
        prediction_type="v_prediction" if family.declared_prediction() == "v" else "epsilon",
        zero_terminal_snr=family.declares_zero_terminal_snr(),
        style=style,
        vae_batch_size=vae_batch_size(options),
    )


def with_learned_words(family: "SdxlFamily", encoders: Sequence["nn.Module"], paths: Sequence[str]) -> "SdxlFamily":
    """Put the vectors of learned words into the text encoders, and return the family that reads those words."""
    import torch

    from library.models.new_words import NewWord

    vectors = [family.read_word(path) for path in paths]
    family = family.with_words([NewWord(Path(path).stem, len(rows[0])) for path, rows in zip(paths, vectors, strict=True)])
    family.extend_vocabulary(encoders, [torch.cat(rows) for rows in zip(*vectors, strict=True)])
    logger.info("Words added: %s", ", ".join(f"{word.text} ({word.num_vectors} vectors)" for word in family.words))
    return family


def compute_dtype(model: GenModelOptions) -> "torch.dtype":
    """Return the number type of the model; float16 wins where both were asked for."""
    import torch

    return torch.float16 if model.fp16 else torch.bfloat16 if model.bf16 else torch.float32


def best_device() -> "torch.device":
    """Return the accelerator torch finds, or the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def vae_batch_size(options: SdxlGenImgOptions) -> int:
    """Return how many pictures are decoded at once: a number, or a share of the batch."""
    batch_size, given = options.prompt.batch_size, options.model.vae_batch_size
    if given is None:
        return batch_size
    return int(given) if given >= 1 else max(1, int(batch_size * given))


def attach(networks: Sequence[NetworkFile], pipeline: "Pipeline", options: SdxlGenImgOptions) -> "AttachedNetworks":
    """Load the network files into the model."""
    from library.generation.networks import attach_networks

    return attach_networks(
        networks,
        pipeline.components,
        dtype=compute_dtype(options.model),
        device=pipeline.device,
        precalculate=options.network.network_pre_calc,
        show_metadata=options.network.network_show_meta,
    )


def attach_controls(controls: Sequence[ControlFile], pipeline: "Pipeline", options: SdxlGenImgOptions) -> None:
    """Load the control networks into the model."""
    from library.generation.controls import Controls

    denoiser = pipeline.components.denoiser
    if controls and denoiser is not None:
        pipeline.controls = Controls.attach(controls, denoiser, compute_dtype(options.model), pipeline.device)


# ---------------------------------------------------------------- pictures


def open_folder(checkpoint: str, options: SdxlGenImgOptions) -> "PictureFiles":
    """Return where pictures are written."""
    from library.generation.output import PictureFiles

    return PictureFiles(options.prompt.outdir, sequential=options.prompt.sequential_file_name, model_name=Path(checkpoint).stem)


def draw_all(
    requests: Sequence[ImageRequest], batch_size: int, pipeline: "Pipeline", attached: "AttachedNetworks", files: "PictureFiles"
) -> None:
    """Draw and write every picture; each batch is on disk before the next begins, so stopping loses only what is being drawn."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with tqdm(total=len(requests), unit="picture", disable=not requests) as bar, logging_redirect_tqdm():
        for batch in batches(requests, batch_size):
            strengths = attached.set_strengths(batch[0].network_mul)
            pictures = pipeline.draw(batch, on_step=lambda done, steps: bar.set_postfix_str(f"step {done}/{steps}"))
            for place, (picture, request) in enumerate(zip(pictures, batch, strict=True)):
                logger.info(f"Saved {files.save(picture, request, place, datetime.now(), strengths)}")
            bar.update(len(batch))


def typed_prompts(settings: PictureSettings) -> Iterator[list[ImageRequest]]:
    """Ask for prompts until the input ends; yield the pictures of each. A line that cannot be drawn is told and asked again."""
    series = SeedSeries(settings.picture.seed, 0)
    while True:
        try:
            line = input("Prompt (end with Ctrl+D): ")
        except EOFError:
            return
        if not line.strip():
            continue
        prompt = locate_prompt(line, "prompt")
        try:
            raise_refusals([prompt])
        except UsageError as error:
            logger.error(str(error))
            continue
        log_notes([prompt], settings)
        yield requests_of(prompt, settings, series)


if __name__ == "__main__":
    run_script(main)
