"""The options of each script: its groups, by topic."""

from dataclasses import dataclass, field, fields
from typing import ClassVar, get_type_hints

from library.options.declare import OptionGroup
from library.options.groups.cache import CacheOptions, LatentCacheOptions
from library.options.groups.cache_tool import CacheTextToolOptions, CacheToolOptions
from library.options.groups.caption import CaptionOptions, CaptionTextOptions
from library.options.groups.compile import CompileOptions
from library.options.groups.config import ConfigOptions
from library.options.groups.console import ConsoleOptions
from library.options.groups.control_net import ControlNetLLLiteOptions, ControlNetOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.distributed import DistributedOptions, ProcessGroupOptions
from library.options.groups.ema import EmaOptions
from library.options.groups.finetune import FinetuneOptions
from library.options.groups.forecast import ForecastOptions
from library.options.groups.generation import (
    GenModelOptions,
    GenNetworkOptions,
    InputImageOptions,
    PictureOptions,
    PromptOptions,
    RefinementOptions,
    SizeConditioningOptions,
)
from library.options.groups.hub import HubOptions
from library.options.groups.image import ImageOptions
from library.options.groups.length import LengthOptions
from library.options.groups.logging import LoggingOptions
from library.options.groups.loss import ElementLossOptions, LossOptions
from library.options.groups.model import ModelOptions
from library.options.groups.modelspec import ModelSpecOptions
from library.options.groups.network import NetworkOptions
from library.options.groups.noise import DdpmNoiseOptions, NoiseOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.output import ModelOutputOptions, OutputOptions, SavingOptions
from library.options.groups.precision import (
    FinetunePrecisionOptions,
    PrecisionOptions,
    TrainingPrecisionOptions,
    VaePrecisionOptions,
    WorkingPrecisionOptions,
)
from library.options.groups.preflight import PreflightOptions
from library.options.groups.sample import SampleOptions
from library.options.groups.scheduler import SchedulerOptions
from library.options.groups.state import StateFileOptions, StateOptions
from library.options.groups.textual_inversion import TextualInversionOptions, WordOutputOptions
from library.options.groups.validation import ValidationOptions


@dataclass(frozen=True)
class ScriptOptions:
    """Options of one script: every field is a group."""

    script: ClassVar[str]
    """The script's path from the root of the repository."""
    purpose: ClassVar[str]
    """One sentence for the head of `--help`."""
    additions: ClassVar[frozenset[str]] = frozenset()
    """Options that sd-scripts does not have there; they make no abbreviation ambiguous that is clear without them."""
    lacks: ClassVar[frozenset[str]] = frozenset()
    """Options of its groups that the script does not take; they stay at their defaults."""

    @classmethod
    def groups(cls) -> dict[str, type[OptionGroup]]:
        """Return the group classes by attribute name, in the order of `--help`."""
        hints = get_type_hints(cls)
        return {attribute.name: hints[attribute.name] for attribute in fields(cls)}


@dataclass(frozen=True)
class TrainingOptions(ScriptOptions):
    """What every training script takes; this is all that the training loop and its verbs know of the options."""

    follows_images: ClassVar[bool] = False
    """Whether the images of conditioning_data_dir are what a model learns to follow; elsewhere they are masks of the loss."""

    model: ModelOptions = field(default_factory=ModelOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    preflight: PreflightOptions = field(default_factory=PreflightOptions)
    forecast: ForecastOptions = field(default_factory=ForecastOptions)
    caption: CaptionOptions = field(default_factory=CaptionOptions)
    image: ImageOptions = field(default_factory=ImageOptions)
    cache: LatentCacheOptions = field(default_factory=LatentCacheOptions)
    length: LengthOptions = field(default_factory=LengthOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    precision: TrainingPrecisionOptions = field(default_factory=TrainingPrecisionOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    output: SavingOptions = field(default_factory=SavingOptions)
    state: StateOptions = field(default_factory=StateOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    sample: SampleOptions = field(default_factory=SampleOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    modelspec: ModelSpecOptions = field(default_factory=ModelSpecOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    compile: CompileOptions = field(default_factory=CompileOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)

    @property
    def trains_denoiser(self) -> bool:
        """Whether weights of the denoiser itself are trained."""
        return False


_TRAINING_ADDITIONS = frozenset(
    {
        "blocks_to_swap",
        "dataset_report",
        "dry_run",
        "dry_run_vram",
        "memory_budget",
        "ema_decay",
        "ema_device",
        "log_events",
        "log_grad_norm",
        "logit_mean",
        "logit_std",
        "loss_ledger",
        "masked_loss_normalize",
        "offload_fraction",
        "on_non_finite",
        "optimizer_states",
        "resume_changed",
        "strict_config",
        "base_quant",
        "cache_latents_posterior",
        "checkpoint_fraction",
        "text_cache_variants",
        "timestep_distribution",
        "true_crop_conditioning",
        "vae_tiling",
    }
)


_BEYOND_NETWORKS = frozenset(
    {"cpu_offload_checkpointing", "initial_epoch", "initial_step", "skip_until_initial_step", *ValidationOptions.model_fields}
)
"""What sd-scripts has for networks only, and every training script has here."""


@dataclass(frozen=True)
class SdxlTrainOptions(TrainingOptions):
    """Options of `sdxl_train.py`."""

    script: ClassVar[str] = "sdxl_train.py"
    purpose: ClassVar[str] = "Fine-tune a whole SDXL model: the U-Net, and the text encoders if wanted."
    additions: ClassVar[frozenset[str]] = _TRAINING_ADDITIONS | _BEYOND_NETWORKS | {"prior_loss_weight"}

    cache: CacheOptions = field(default_factory=CacheOptions)
    precision: FinetunePrecisionOptions = field(default_factory=FinetunePrecisionOptions)
    output: ModelOutputOptions = field(default_factory=ModelOutputOptions)
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)

    @property
    def trains_denoiser(self) -> bool:
        """Whether weights of the denoiser itself are trained."""
        rates = self.finetune.block_rates
        return bool(self.optimizer.learning_rate) and (rates is None or any(rates))


@dataclass(frozen=True)
class SdxlTrainNetworkOptions(TrainingOptions):
    """Options of `sdxl_train_network.py`."""

    script: ClassVar[str] = "sdxl_train_network.py"
    purpose: ClassVar[str] = "Train a LoRA or another network on an SDXL model."
    additions: ClassVar[frozenset[str]] = _TRAINING_ADDITIONS | {"fused_optimizer_groups", "text_encoder_lr1", "text_encoder_lr2"}

    cache: CacheOptions = field(default_factory=CacheOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)


@dataclass(frozen=True)
class SdxlTrainTextualInversionOptions(TrainingOptions):
    """Options of `sdxl_train_textual_inversion.py`."""

    script: ClassVar[str] = "sdxl_train_textual_inversion.py"
    purpose: ClassVar[str] = "Teach SDXL a new word and leave the model as it is (textual inversion)."
    additions: ClassVar[frozenset[str]] = (
        (_TRAINING_ADDITIONS - {"text_cache_variants"})
        | {"caption_dropout_every_n_epochs", "caption_dropout_rate", "caption_tag_dropout_rate", "weighted_captions"}
        | _BEYOND_NETWORKS
        | {"fused_optimizer_groups"}
    )

    output: WordOutputOptions = field(default_factory=WordOutputOptions)
    word: TextualInversionOptions = field(default_factory=TextualInversionOptions)


@dataclass(frozen=True)
class _ControlOptions(TrainingOptions):
    """What both scripts take whose networks follow control images."""

    follows_images: ClassVar[bool] = True
    lacks: ClassVar[frozenset[str]] = frozenset({"masked_loss", "masked_loss_normalize", "prior_loss_weight", "reg_data_dir"})
    additions: ClassVar[frozenset[str]] = (_TRAINING_ADDITIONS - lacks) | _BEYOND_NETWORKS | {"fused_optimizer_groups"}

    cache: CacheOptions = field(default_factory=CacheOptions)
    output: OutputOptions = field(default_factory=OutputOptions)


@dataclass(frozen=True)
class SdxlTrainControlNetLLLiteOptions(_ControlOptions):
    """Options of `sdxl_train_control_net_lllite.py`."""

    script: ClassVar[str] = "sdxl_train_control_net_lllite.py"
    purpose: ClassVar[str] = "Train a ControlNet-LLLite, with which an SDXL model follows images such as outlines."

    control: ControlNetLLLiteOptions = field(default_factory=ControlNetLLLiteOptions)


@dataclass(frozen=True)
class SdxlTrainControlNetOptions(_ControlOptions):
    """Options of `sdxl_train_control_net.py`."""

    script: ClassVar[str] = "sdxl_train_control_net.py"
    purpose: ClassVar[str] = "Train a ControlNet, with which an SDXL model follows images such as outlines."

    control: ControlNetOptions = field(default_factory=ControlNetOptions)


@dataclass(frozen=True)
class _CachingOptions(ScriptOptions):
    """What both caching tools take: the options of training, most of them without effect there."""

    additions: ClassVar[frozenset[str]] = frozenset(
        {
            "strict_config",
            "cache_latents_posterior",
            "log_events",
            "log_grad_norm",
            "loss_ledger",
            "text_cache_variants",
            "true_crop_conditioning",
        }
    ) | frozenset(ValidationOptions.model_fields)

    model: ModelOptions = field(default_factory=ModelOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    image: ImageOptions = field(default_factory=ImageOptions)
    length: LengthOptions = field(default_factory=LengthOptions)
    precision: WorkingPrecisionOptions = field(default_factory=WorkingPrecisionOptions)
    noise: DdpmNoiseOptions = field(default_factory=DdpmNoiseOptions)
    loss: ElementLossOptions = field(default_factory=ElementLossOptions)
    output: SavingOptions = field(default_factory=SavingOptions)
    state: StateFileOptions = field(default_factory=StateFileOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    sample: SampleOptions = field(default_factory=SampleOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    modelspec: ModelSpecOptions = field(default_factory=ModelSpecOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    distributed: ProcessGroupOptions = field(default_factory=ProcessGroupOptions)
    compile: CompileOptions = field(default_factory=CompileOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)


@dataclass(frozen=True)
class CacheLatentsOptions(_CachingOptions):
    """Options of `tools/cache_latents.py`."""

    script: ClassVar[str] = "tools/cache_latents.py"
    purpose: ClassVar[str] = "Encode the images of a dataset and keep the latents on disk beside them."
    additions: ClassVar[frozenset[str]] = _CachingOptions.additions | {"vae_tiling"}

    caption: CaptionTextOptions = field(default_factory=CaptionTextOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    precision: VaePrecisionOptions = field(default_factory=VaePrecisionOptions)
    tool: CacheToolOptions = field(default_factory=CacheToolOptions)


@dataclass(frozen=True)
class CacheTextEncoderOutputsOptions(_CachingOptions):
    """Options of `tools/cache_text_encoder_outputs.py`."""

    script: ClassVar[str] = "tools/cache_text_encoder_outputs.py"
    purpose: ClassVar[str] = "Encode the captions of a dataset and keep the results on disk beside the images."

    caption: CaptionOptions = field(default_factory=CaptionOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    tool: CacheTextToolOptions = field(default_factory=CacheTextToolOptions)


@dataclass(frozen=True)
class SdxlGenImgOptions(ScriptOptions):
    """Options of `sdxl_gen_img.py`."""

    script: ClassVar[str] = "sdxl_gen_img.py"
    purpose: ClassVar[str] = "Draw images with an SDXL model."

    model: GenModelOptions = field(default_factory=GenModelOptions)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    picture: PictureOptions = field(default_factory=PictureOptions)
    network: GenNetworkOptions = field(default_factory=GenNetworkOptions)
    size: SizeConditioningOptions = field(default_factory=SizeConditioningOptions)
    input: InputImageOptions = field(default_factory=InputImageOptions)
    refinement: RefinementOptions = field(default_factory=RefinementOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)


SCRIPTS: tuple[type[ScriptOptions], ...] = (
    SdxlTrainOptions,
    SdxlTrainNetworkOptions,
    SdxlTrainTextualInversionOptions,
    SdxlTrainControlNetOptions,
    SdxlTrainControlNetLLLiteOptions,
    SdxlGenImgOptions,
    CacheLatentsOptions,
    CacheTextEncoderOutputsOptions,
)
