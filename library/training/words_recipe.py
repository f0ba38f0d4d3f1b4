"""How a new word is learned while the model stays as it is: the recipe of `sdxl_train_textual_inversion.py`.

Textual inversion (Gal et al. 2022, "An Image is Worth One Word"): the only trained numbers are the vectors of the word, one set
for each text encoder.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from library.models.family import Family, ModelSource
from library.models.new_words import NewWord
from library.options.errors import UserError
from library.options.groups.textual_inversion import TextualInversionOptions
from library.options.scripts import SdxlTrainTextualInversionOptions
from library.training.frozen_model import FrozenModelRecipe
from library.training.full_tensors import Gathered
from library.training.modelspec import model_spec
from library.training.position import Position
from library.training.preparation import TextSide
from library.training.setting import MetadataAt, Setting, Trained

log = logging.getLogger(__name__)

_ANYTHING = "something"
"""What a word begins as where nothing is said: a word of no kind."""


def open_with_word(open_family: Callable[[ModelSource], Family], word: NewWord, source: ModelSource) -> Family:
    """Open a model with a word besides its vocabulary; a part of this can be pickled."""
    return open_family(source).with_words([word])


@dataclass(frozen=True)
class WordRecipe(FrozenModelRecipe):
    """Trains the vectors of one new word."""

    options: SdxlTrainTextualInversionOptions

    tracker_name = "textual_inversion"

    def make_trainable(self, setting: Setting, denoiser: nn.Module, text: TextSide, vae: nn.Module | None) -> Trained:
        """Put the word's vectors behind the text encoders' tables."""
        family, options = setting.family, self.options
        encoders = [encoder for encoder in text.encoders if encoder is not None]
        rows = [vectors.to(setting.dtypes.trained) for vectors in first_vectors(family, encoders, options.word)]
        parameters = family.extend_vocabulary(encoders, rows)
        groups = [{"params": [parameter.requires_grad_(True)], "lr": options.optimizer.learning_rate} for parameter in parameters]
        if options.precision.gradient_checkpointing:
            family.enable_text_checkpointing(encoders)
        trainable = WordTrainable(family, parameters)
        return Trained(trainable, groups, list(family.encoder_names), trains_text=True, extension=options.output.extension)

    def metadata(self, setting: Setting, trained: Trained) -> MetadataAt:
        """A word says what model it is for."""
        return model_spec(setting, "TextualInversion", "/textual-inversion").alone()


class WordTrainable:
    """The vectors of a word, as the loop and the saver see them.

    Args:
        family: writes the file.
        vectors: (n, width) for each text encoder; the encoders hold the same parameters.
    """

    norms: Mapping[str, Tensor | float] = MappingProxyType({})
    set_strength: None = None

    def __init__(self, family: Family, vectors: Sequence[nn.Parameter]) -> None:
        self.family = family
        self.vectors = list(vectors)
        self.module: nn.Module = nn.ParameterDict(dict(zip(family.encoder_names, vectors, strict=True)))

    def on_epoch_start(self) -> None:
        """Vectors have no training mode."""

    def on_batch_start(self) -> None:
        """Nothing changes from batch to batch."""

    def before_step(self) -> None:
        """No account is kept of gradients."""

    def after_update(self) -> None:
        """Nothing is limited after an update."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Nothing is switched off for previews and saving."""
        return nullcontext()

    def save(
        self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], position: Position, gathered: Gathered
    ) -> None:
        """Write the vectors; see `Trainable.save`."""
        self.family.save_word(path, self.vectors, dtype, metadata)


def first_vectors(family: Family, encoders: Sequence[nn.Module], options: TextualInversionOptions) -> list[Tensor]:
    """Return what the word's vectors begin with, (n, width) float32 for each text encoder.

    Args:
        family: of the encoders.
        encoders: as loaded.
        options: `--weights` names a file to go on from, `--init_word` words to copy.

    Raises:
        UserError: the file cannot be used, or has another number of vectors.
    """
    count = options.num_vectors_per_token
    if options.weights is not None:
        saved = family.read_word(options.weights)
        if len(saved[0]) != count:
            raise UserError(
                f"--weights {options.weights} has {len(saved[0])} vectors, and --num_vectors_per_token is {count}. "
                f"Give --num_vectors_per_token {len(saved[0])}."
            )
        return saved
    given = (options.init_word or "").strip()
    text = given or _ANYTHING
    found = family.word_vectors(text, encoders)
    num_found = len(found[0])
    if not num_found:
        raise UserError(f"--init_word {text!r} has no token in the vocabulary. Give a word that the model knows, such as girl.")
    if not given:
        log.info('The word begins as "%s". --init_word with a word of the same kind is a better start.', text)
    elif num_found not in (1, count):
        used = "over and over" if num_found < count else f"the first {count} of them"
        log.warning('--init_word "%s" is %d tokens, and the new word has %d vectors: %s are used.', text, num_found, count, used)
    return [vectors[torch.arange(count) % num_found] for vectors in found]
