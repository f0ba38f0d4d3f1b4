"""What processes that tests run have loaded from the start: libraries whose import takes seconds, also where it comes late."""

import torch._dynamo  # noqa: F401
from diffusers import AutoencoderKL  # noqa: F401

import library.generation.pipeline
import library.models.sdxl.family
import library.models.sdxl.text_encoders
import library.training.finetune_recipe
import library.training.network_recipe
import library.training.recipe  # noqa: F401
