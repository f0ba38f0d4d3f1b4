"""How a ControlNet is trained beside a frozen model: the recipe of `sdxl_train_control_net.py`."""

import logging
from dataclasses import dataclass
from typing import cast

from torch import nn

from library.options.scripts import SdxlTrainControlNetOptions
from library.training.denoiser import prepare_denoiser
from library.training.frozen_model import FrozenModelRecipe
from library.training.modelspec import model_spec
from library.training.preparation import TextSide
from library.training.setting import MetadataAt, Setting, Trained
from library.training.trainable import NetworkTrainable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControlNetRecipe(FrozenModelRecipe):
    """Trains a ControlNet and leaves the model as it is."""

    options: SdxlTrainControlNetOptions

    tracker_name = "sdxl_control_net_train"

    def make_trainable(self, setting: Setting, denoiser: nn.Module, text: TextSide, vae: nn.Module | None) -> Trained:
        """Copy the U-Net's way down, or load a ControlNet, and let it take part in the U-Net's forward pass."""
        options, device = self.options, setting.accelerator.device
        file = options.control.controlnet_model_name_or_path
        network = setting.family.make_control_net(file, setting.dtypes.trained, device)
        if file is not None:
            log.info("Loaded %s.", file)
        prepare_denoiser(setting.family, cast(nn.Module, network), options.precision, device)
        network.apply_to(denoiser)
        parts = {
            "controlnet": (network.new_parameters(), options.control.control_net_lr),
            setting.family.denoiser_name: (network.copied_parameters(), options.optimizer.learning_rate),
        }
        for parameters, rate in parts.values():
            for parameter in parameters:
                parameter.requires_grad_(rate != 0)
        trained = {name: {"params": parameters, "lr": rate} for name, (parameters, rate) in parts.items() if rate}
        trainable = NetworkTrainable(network, denoiser, text.encoders, max_norm=None)
        return Trained(
            trainable, [*trained.values()], [*trained], trains_text=False, extension=options.output.extension, control=network
        )

    def metadata(self, setting: Setting, trained: Trained) -> MetadataAt:
        """A ControlNet says what model it is for; how it was trained is for other networks."""
        return model_spec(setting, "ControlNet", "/controlnet").alone()
