"""How a network learns to make a frozen model follow control images: the recipe of `sdxl_train_control_net_lllite.py`."""

import logging
from dataclasses import dataclass

from torch import nn

from library.options.scripts import SdxlTrainControlNetLLLiteOptions
from library.training.frozen_model import FrozenModelRecipe
from library.training.modelspec import model_spec
from library.training.preparation import TextSide
from library.training.setting import MetadataAt, Setting, Trained
from library.training.trainable import NetworkTrainable
from networks.control_net_lllite import ControlNetLLLite, Widths

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControlNetLLLiteRecipe(FrozenModelRecipe):
    """Trains a ControlNet-LLLite and leaves the model as it is."""

    options: SdxlTrainControlNetLLLiteOptions

    tracker_name = "lllite_control_net_train"

    def make_trainable(self, setting: Setting, denoiser: nn.Module, text: TextSide, vae: nn.Module | None) -> Trained:
        """Put the network's modules before the U-Net's layers, and load their weights."""
        options = self.options
        control = options.control
        widths = Widths(control.cond_emb_dim or 0, control.network_dim or 0)
        network = ControlNetLLLite(denoiser, widths, dropout=control.network_dropout or 0.0)
        if control.network_weights is not None:
            network.load_weights(control.network_weights)
            log.info("Loaded %s.", control.network_weights)
        network.apply_to()
        network.to(setting.accelerator.device, setting.dtypes.trained)
        groups = [{"params": list(network.parameters()), "lr": options.optimizer.learning_rate}]
        trainable = NetworkTrainable(network, denoiser, text.encoders, max_norm=None)
        name = setting.family.denoiser_name
        return Trained(trainable, groups, [name], trains_text=False, extension=options.output.extension, control=network)

    def metadata(self, setting: Setting, trained: Trained) -> MetadataAt:
        """A control network says what model it is for; how it was trained is for other networks."""
        return model_spec(setting, "ControlNet", "/control-net-lllite").alone()
