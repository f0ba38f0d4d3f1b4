"""From the text beside an image to the caption of one use of it.

The order of the steps is fixed: dropout, choice of line, prefix and suffix, wildcards, tags, secondary separator. All randomness
comes from the generator that is passed in, and is drawn in that order, as in sd-scripts. Two things differ from it. Prefix and
suffix belong to whichever line is chosen, not to the first and the last. And a keep_tokens_separator is a mark that does its work
and goes, also where no tag moves; there the words around it would be trained with it.
"""

import random
import re
from typing import Any

from library.options.dataset_config import CaptionRules

_WILDCARD = re.compile(r"\{([^}]+)\}")
_OPEN, _CLOSE = "\x02", "\x03"  # stand for literal braces while wildcards are replaced
_ALL_TAGS = 2**62  # an update at which any warm-up of tags is over


def caption_for_use(
    text: str, rules: CaptionRules, epoch: int, rng: random.Random, *, update: int = 0, total_updates: int = 0
) -> str:
    """Return the caption for one use of an image.

    Args:
        text: the image's own caption; several lines only where wildcards are enabled.
        rules: the subset's caption settings.
        epoch: counted from 1, for dropout in every n-th epoch.
        rng: drawn from only by the settings that need it.
        update: optimizer updates before the one the caption is for; decides how far the warm-up of tags has come.
        total_updates: of the whole run, for a warm-up whose length is a fraction of it.
    """
    if is_dropped(rules, epoch, rng):
        return ""
    if rules.templates:
        return rng.choice(rules.templates)
    caption = _with_prefix_and_suffix(_one_line(text, rules, rng), rules)
    if rules.enable_wildcard:
        caption = replace_wildcards(caption, rng)
    if rules.moves_tags or (rules.keep_tokens_separator and rules.keep_tokens_separator in caption):
        caption = _rearranged(caption, rules, rng, warmed_up(rules, update, total_updates))
    if rules.secondary_separator:
        caption = caption.replace(rules.secondary_separator, rules.caption_separator)
    return caption


def settled_caption(text: str, rules: CaptionRules) -> str:
    """Return the caption with nothing left to chance: no tag moves or goes, and of alternatives the first is taken."""
    return caption_for_use(text, rules, epoch=1, rng=_Settled(), update=_ALL_TAGS)


class _Settled(random.Random):
    """A generator that never decides against what stands there."""

    def random(self) -> float:
        return 1.0 - 2.0**-53  # below 1, so that what happens with certainty still does

    def shuffle(self, x: Any) -> None:
        """Leave the order."""

    def choice(self, seq: Any) -> Any:
        return seq[0]


def replace_wildcards(text: str, rng: random.Random) -> str:
    """Replace each `{a|b}` by one of its parts; `{{` and `}}` are braces."""
    text = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    text = _WILDCARD.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    return text.replace(_OPEN, "{").replace(_CLOSE, "}")


def is_dropped(rules: CaptionRules, epoch: int, rng: random.Random) -> bool:
    """Say whether a use in an epoch (counted from 1) has no caption; draws only where there is a rate."""
    by_chance = rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate
    every = rules.caption_dropout_every_n_epochs
    return by_chance or (every > 0 and epoch % every == 0)


def _one_line(text: str, rules: CaptionRules, rng: random.Random) -> str:
    if "\n" not in text:
        return text
    return rng.choice(text.split("\n")) if rules.enable_wildcard else text.split("\n")[0]


def _with_prefix_and_suffix(caption: str, rules: CaptionRules) -> str:
    prefix = f"{rules.caption_prefix} " if rules.caption_prefix else ""
    suffix = f" {rules.caption_suffix}" if rules.caption_suffix else ""
    return prefix + caption + suffix


def warmed_up(rules: CaptionRules, update: int, total_updates: int) -> tuple[int, int] | None:
    """Return the update and the length, in updates, of the warm-up of tags, or None when it is over."""
    length = rules.token_warmup_step
    length = int(length * total_updates) if length < 1 else int(length)
    return (update, length) if update < length else None


def _rearranged(caption: str, rules: CaptionRules, rng: random.Random, warmup: tuple[int, int] | None) -> str:
    """Shorten, shuffle and drop the flexible tags; the parts are joined by a comma and a space whatever separated them."""
    fixed, flexible, fixed_end = _tags(caption, rules)
    if warmup is not None:
        update, length = warmup
        more = max(len(flexible) - rules.token_warmup_min, 0)
        flexible = flexible[: rules.token_warmup_min + update * more // length]
    if rules.shuffle_caption:
        rng.shuffle(flexible)
    if rules.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= rules.caption_tag_dropout_rate]
    return ", ".join(fixed + flexible + fixed_end)


def _tags(caption: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """Split a caption into tags that stay in front, tags that may move or go, and tags that stay at the end."""
    mark = rules.keep_tokens_separator
    if mark and mark in caption:
        front, _, rest = caption.partition(mark)
        middle, _, end = rest.partition(mark)
        parts = [[tag.strip() for tag in part.split(rules.caption_separator) if tag.strip()] for part in (front, middle, end)]
        return parts[0], parts[1], parts[2]
    tags = [tag.strip() for tag in caption.strip().split(rules.caption_separator)]
    return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []
