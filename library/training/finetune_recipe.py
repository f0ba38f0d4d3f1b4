"""How parts of a model are trained themselves: the recipe of `sdxl_train.py`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.models.family import Family
from library.options.errors import UserError
from library.options.scripts import SdxlTrainOptions
from library.training.modelspec import model_spec
from library.training.preparation import TextSide
from library.training.setting import MetadataAt, PartDTypes, Setting, Trained
from library.training.trainable import ModelTrainable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneRecipe:
    """Trains the denoiser, the text encoders, or both."""

    options: SdxlTrainOptions

    tracker_name = "finetuning"

    @property
    def encoder_rates(self) -> tuple[float, ...]:
        """The learning rate of each text encoder; 0 for one that is not trained."""
        return self.options.finetune.text_encoder_rates(self.options.optimizer.learning_rate)

    def dtypes_of_parts(self, setting: Setting) -> PartDTypes:
        """Load in the type of trained weights whatever is trained, so that no digit of them is lost."""
        dtypes = setting.dtypes
        return PartDTypes(
            denoiser=dtypes.trained if self.options.optimizer.learning_rate else dtypes.compute,
            text_encoders=dtypes.trained if any(self.encoder_rates) else dtypes.compute,
        )

    def make_trainable(self, setting: Setting, denoiser: nn.Module, text: TextSide, vae: nn.Module | None) -> Trained:
        """Unfreeze what has a learning rate; the rest stays frozen in the type of the computation."""
        options, family = self.options, setting.family
        groups = denoiser_groups(family, denoiser, options.optimizer.learning_rate, options.finetune.block_rates)
        parts = {family.denoiser_name: denoiser} if groups else {}
        names = zip(family.encoder_names, text.encoders, self.encoder_rates, strict=True)
        for number, (name, encoder, rate) in enumerate(names, start=1):
            if encoder is None:
                continue
            if rate:
                parts[name] = encoder
                groups[f"text_encoder{number}"] = {"params": text_encoder_parameters(family, encoder), "lr": rate}
            else:
                encoder.to(setting.dtypes.compute)
        if not groups:
            raise UserError(
                "Nothing is trained: all learning rates are 0. Raise --learning_rate, --block_lr or --learning_rate_te1."
            )
        for group in groups.values():
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        if options.precision.gradient_checkpointing:
            family.enable_text_checkpointing([parts[name] for name in family.encoder_names if name in parts])
        trainable = ModelTrainable(
            family,
            parts,
            options.output.layout,
            v_prediction=setting.objective.prediction == "v",
            zero_terminal_snr=setting.objective.zero_terminal_snr,
        )
        return Trained(trainable, list(groups.values()), list(groups), any(self.encoder_rates), options.output.extension)

    def metadata(self, setting: Setting, trained: Trained) -> MetadataAt:
        """A whole model says what it is."""
        return model_spec(setting, "Checkpoint").alone()


def denoiser_groups(
    family: Family, denoiser: nn.Module, rate: float, block_rates: Sequence[float] | None
) -> dict[str, dict[str, Any]]:
    """Return the denoiser's parameter groups by what they train: one, or one for each block that has a rate.

    Args:
        family: knows the blocks.
        denoiser: frozen.
        rate: `--learning_rate`; 0 leaves the whole denoiser frozen.
        block_rates: `--block_lr`; 0 leaves a block frozen: without gradient, memory for one, or a share in the gradient's norm.
    """
    if not rate:
        return {}
    if block_rates is None:
        return {family.denoiser_name: {"params": list(denoiser.parameters()), "lr": rate}}
    blocks = zip(family.denoiser_blocks(denoiser), block_rates, strict=True)
    return {f"block{number}": {"params": block, "lr": each} for number, (block, each) in enumerate(blocks) if each and block}


def text_encoder_parameters(family: Family, encoder: nn.Module) -> list[nn.Parameter]:
    """Return an encoder's parameters but those without influence on what the denoiser sees."""
    unused = {id(parameter) for parameter in family.unused_text_parameters(encoder)}
    return [parameter for parameter in encoder.parameters() if id(parameter) not in unused]
