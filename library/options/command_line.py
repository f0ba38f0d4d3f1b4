"""Reading the command line as argparse does, but to the end: every mistake is collected instead of stopping at the first."""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from library.options.nearest import nearest
from library.options.record import Kind, Option

_NEGATIVE_NUMBER = re.compile(r"^-(\d+|\d*\.\d+|\d+\.)(e[-+]?\d+)?%?$", re.IGNORECASE)


@dataclass
class CommandLine:
    """What was typed."""

    typed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The texts of each option that was given, by name; the last use of an option counts."""
    problems: list[str] = field(default_factory=list)
    wants_help: bool = False


@dataclass(frozen=True)
class _Word:
    """One argument: an option with perhaps `=value` attached, or a plain text."""

    text: str
    is_option: bool
    attached: str | None = None


def scan(
    argv: Sequence[str], options: Mapping[str, Option], elsewhere: Container[str] = (), additions: Container[str] = ()
) -> CommandLine:
    """Sort arguments to options.

    Args:
        argv: the arguments without the script's name.
        options: the script's options by name. Unambiguous beginnings of names are accepted.
        elsewhere: names of options that only other scripts have, for a better message.
        additions: names of options that make no beginning of another name ambiguous, see `ScriptOptions.additions`.
    """
    words = _words(argv, options)
    line = CommandLine()
    position = 0
    owner = "at the start"
    while position < len(words):
        word = words[position]
        position += 1
        if not word.is_option:
            line.problems.append(f"{word.text!r} stands alone {owner}. Put a value that contains blanks in quotes.")
            continue
        name = _resolve(word.text, options, elsewhere, additions, line)
        following = _plain_texts(words, position)
        if name is None:
            position += len(following)
        elif name == "help":
            line.wants_help = True
        else:
            position += _take(options[name], word, following, line)
            owner = f"after {options[name].flag}"
    return line


def _words(argv: Sequence[str], options: Mapping[str, Option]) -> list[_Word]:
    words: list[_Word] = []
    for position, text in enumerate(argv):
        if text == "--":
            return words + [_Word(rest, is_option=False) for rest in argv[position + 1 :]]
        words.append(_word(text, options))
    return words


def _word(text: str, options: Mapping[str, Option]) -> _Word:
    if not text.startswith("-") or text == "-" or _NEGATIVE_NUMBER.match(text):
        return _Word(text, is_option=False)
    name, equals, value = text.partition("=")
    if " " in name or (" " in text and not _candidates(name, options)):
        return _Word(text, is_option=False)
    return _Word(name, is_option=True, attached=value if equals else None)


def _plain_texts(words: Sequence[_Word], start: int) -> list[str]:
    texts: list[str] = []
    for word in words[start:]:
        if word.is_option:
            break
        texts.append(word.text)
    return texts


def _candidates(typed: str, options: Mapping[str, Option]) -> list[str]:
    if typed == "-h":
        return ["help"]
    if not typed.startswith("--"):
        return []
    beginning = typed[2:]
    if beginning in options or beginning == "help":
        return [beginning]
    return [name for name in ("help", *options) if name.startswith(beginning)]


def _resolve(
    typed: str, options: Mapping[str, Option], elsewhere: Container[str], additions: Container[str], line: CommandLine
) -> str | None:
    fitting = _candidates(typed, options)
    candidates = [name for name in fitting if name not in additions] or fitting
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        line.problems.append(f"{typed} could be any of {', '.join('--' + name for name in candidates)}. Type more of the name.")
        return None
    name = typed.lstrip("-")
    if name in elsewhere:
        line.problems.append(f"{typed} is an option of other scripts of the suite, not of this one. Leave it out.")
        return None
    near = nearest(name, ("help", *options))
    line.problems.append(f"{typed} is not an option." + (f" Did you mean --{near}?" if near else " --help lists all options."))
    return None


def _take(option: Option, word: _Word, following: Sequence[str], line: CommandLine) -> int:
    """Note what is given to one option; return how many of the texts that follow belong to it."""
    if option.kind is Kind.FLAG:
        if word.attached is not None:
            line.problems.append(
                f"{option.flag} takes no value, but {word.attached!r} was given. Leave the option out to switch it off."
            )
        line.typed[option.name] = ()
        return 0
    if word.attached is not None:
        line.typed[option.name] = (word.attached,)
        return 0
    if option.many:
        line.typed[option.name] = tuple(following)
        return len(following)
    if not following:
        line.problems.append(f"{option.flag} needs a value. One that starts with a dash is written {option.flag}=VALUE.")
        return 0
    line.typed[option.name] = (following[0],)
    return 1
