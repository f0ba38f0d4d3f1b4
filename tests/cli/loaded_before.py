"""What processes that tests run have loaded from the start: the libraries whose import takes seconds."""

import library.generation.pipeline
import library.models.sdxl.family
import library.training.finetune_recipe
import library.training.network_recipe
import library.training.recipe  # noqa: F401
