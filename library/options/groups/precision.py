"""Options about number types, memory and attention."""

from typing import ClassVar, Literal

from library.options.declare import OptionGroup, flag, option
from library.options.groups.attention import AttentionChoice


class WorkingPrecisionOptions(AttentionChoice, OptionGroup):
    """Number types, memory and attention."""

    topic: ClassVar[str] = "Precision, memory and attention"

    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Number type of the computation and of frozen weights.")
    full_fp16: bool = flag("Keep trained weights and gradients in float16 too; needs --mixed_precision fp16.")
    full_bf16: bool = flag("Keep trained weights and gradients in bfloat16 too; needs --mixed_precision bf16.")
    fp8_base: bool = flag(
        "Hold the frozen weights of linear layers and convolutions in 8 bits, U-Net and text encoders, each tensor with a scale."
    )
    gradient_checkpointing: bool = flag("Compute activations again in the backward pass: less memory, slower steps.")
    xformers: bool = flag("Use the attention of xformers.")
    sdpa: bool = flag("Use the attention of PyTorch, which is the default.")
    mem_eff_attn: bool = flag("Use slow attention in small pieces that needs little memory.")


class VaePrecisionOptions(WorkingPrecisionOptions):
    """Number types, memory and attention where there is a VAE."""

    no_half_vae: bool = flag("Keep the VAE in float32 whatever the mixed precision.")
    vae_tiling: bool = flag("Let the VAE work on pictures above 1024 in overlapping tiles: less memory, slightly other latents.")


class StepPrecisionOptions(WorkingPrecisionOptions):
    """Number types, memory and attention of a training step."""

    checkpoint_fraction: float = option(
        1.0, "Share of the U-Net's blocks that --gradient_checkpointing computes again, the cheapest first.", gt=0, le=1
    )
    cpu_offload_checkpointing: bool = flag(
        "Keep in main memory what --gradient_checkpointing keeps of the U-Net: least memory on the accelerator, slower steps."
    )
    blocks_to_swap: int | None = option(
        None, "Keep this many blocks of the U-Net in main memory, and bring each to the accelerator when it is wanted.", ge=0
    )
    offload_fraction: float | None = option(
        None, "The same for as many blocks as hold this share of the U-Net's weights.", ge=0, le=1
    )
    base_quant: Literal["fp8", "int8", "nf4"] | None = option(
        None,
        "Hold the frozen weights of linear layers and convolutions in 8 or 4 bits: fp8, the same as --fp8_base, int8, or nf4 "
        "(text encoders: int8).",
    )

    @property
    def swaps_blocks(self) -> bool:
        """Whether some blocks of the denoiser are in main memory."""
        return bool(self.blocks_to_swap or self.offload_fraction)

    @property
    def denoiser_quant(self) -> str | None:
        """How the frozen weights of the denoiser are held: "fp8", "int8" or "nf4"; None: as they are."""
        return self.base_quant or ("fp8" if self.fp8_base else None)

    @property
    def text_encoder_quant(self) -> str | None:
        """The same for text encoders that stay loaded: their outputs are what a network learns to answer to, hence 8 bits."""
        quant = self.base_quant or ("fp8" if self.fp8_base else None)
        return "int8" if quant == "nf4" else quant


class TrainingPrecisionOptions(VaePrecisionOptions, StepPrecisionOptions):
    """Number types, memory and attention of training."""


class PrecisionOptions(TrainingPrecisionOptions):
    """Number types, memory and attention of network training."""

    fp8_base_unet: bool = flag("The same as --fp8_base for the U-Net alone.")

    @property
    def denoiser_quant(self) -> str | None:
        """How the frozen weights of the denoiser are held: "fp8", "int8" or "nf4"; None: as they are."""
        return super().denoiser_quant or ("fp8" if self.fp8_base_unet else None)


class FinetunePrecisionOptions(TrainingPrecisionOptions):
    """Number types, memory and attention of fine-tuning."""

    diffusers_xformers: bool = flag("The same as --xformers.")
