"""LoRA for the U-Net and the text encoders: `--network_module networks.lora`.

The functions and methods here are the contract between training scripts and network modules, which third-party modules such as
`lycoris.kohya` follow too; hence the positional arguments that are not used here (`vae`, for one). Layers are found by class name:
linear layers and 1×1 convolutions of the U-Net's transformers, of CLIP's attention and MLP, and with `conv_dim` those of the
residual blocks and samplers with their 3×3 convolutions.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from library.options.errors import UserError
from networks.lora_args import LoRAArgs, parse_lora_args
from networks.lora_blocks import NUM_BLOCKS, block_index
from networks.lora_files import RankAndAlpha, normalise, ranks_of, read_lora
from networks.lora_module import Dropouts, is_spatial
from networks.lora_network import LoRANetwork
from networks.targets import Target, text_encoder_targets, unet_targets

__all__ = ["LoRANetwork", "create_network", "create_network_from_weights"]

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0

TextEncoders = nn.Module | Sequence[nn.Module | None] | None


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> LoRANetwork:
    """Make the adapters of a new LoRA, not applied yet.

    Args:
        multiplier: strength of the adapters, 1 in training.
        network_dim: rank of linear and 1×1 layers; None for 4.
        network_alpha: α of linear and 1×1 layers; None for 1, 0 for the rank.
        vae: not used.
        text_encoder: the encoders in their order; one that is not loaded is None and gets no adapters.
        unet: the U-Net.
        neuron_dropout: `--network_dropout`.
        network_args: the pairs of `--network_args`, see `networks.lora_args`.

    Raises:
        UserError: wrong or unknown network arguments, or a model without any layer to adapt.
    """
    args = parse_lora_args(network_args)
    rule = _rank_rule(args, network_dim or DEFAULT_RANK, DEFAULT_ALPHA if network_alpha is None else network_alpha)
    sized = [(target, rule(target)) for target in _all_targets(text_encoder, unet, args.has_convolutions)]
    return _network(sized, multiplier, neuron_dropout, args)


def create_network_from_weights(
    multiplier: float,
    file: str | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **network_args: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """Make adapters with the ranks and alphas of a file; its weights are returned, not loaded into them.

    Args:
        multiplier: strength of the adapters.
        file: a LoRA file; may be None where `weights_sd` is given.
        vae: not used.
        text_encoder: as in `create_network`.
        unet: the U-Net.
        weights_sd: the tensors of the file, where they were read already.
        for_inference: leave every dropout out.
        network_args: as in `create_network`; ranks and alphas among them give way to those of the file, with a warning.

    Returns:
        The network, and the file's tensors under the names the network uses.

    Raises:
        UserError: the file is no LoRA, or of another model.
    """
    args = parse_lora_args({} if for_inference else network_args)
    weights = read_lora(str(file)) if weights_sd is None else normalise(weights_sd, str(file or "the given weights"))
    ranks = ranks_of(weights)
    _warn_of_file_ranks(args)
    sized = [(target, ranks.get(target.name)) for target in _all_targets(text_encoder, unet, with_convolutions=True)]
    matched = {target.name for target, size in sized if size}
    if not matched:
        raise UserError(
            f"{file or 'The given file'} fits nothing in this model: it names {next(iter(ranks))}. Is it for another model?"
        )
    if skipped := _not_matched(ranks, matched, text_encoder):
        logger.warning(
            "%s: %d of %d adapters are not in this model and are left out, %s first.", file, len(skipped), len(ranks), skipped[0]
        )
    return _network(sized, multiplier, None, args), weights


def _network(
    sized: Iterable[tuple[Target, RankAndAlpha | None]], multiplier: float, neuron_dropout: float | None, args: LoRAArgs
) -> LoRANetwork:
    dropouts = Dropouts(
        neuron=(args.dropout if neuron_dropout is None else neuron_dropout) or 0.0,
        rank=args.rank_dropout or 0.0,
        module=args.module_dropout or 0.0,
    )
    return LoRANetwork([(target, size) for target, size in sized if size is not None], multiplier, dropouts, args)


def _all_targets(text_encoder: TextEncoders, unet: nn.Module, with_convolutions: bool) -> list[Target]:
    """Return the targets of all parts; encoders are numbered by their place where there is a list of several."""
    encoders = [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder or [])
    targets: list[Target] = []
    for number, encoder in enumerate(encoders, start=1):
        if encoder is not None:
            targets += text_encoder_targets(encoder, "lora_te" if len(encoders) == 1 else f"lora_te{number}")
    return targets + unet_targets(unet, with_convolutions)


def _rank_rule(args: LoRAArgs, dim: int, alpha: float) -> Callable[[Target], RankAndAlpha | None]:
    """Return the function that gives a target its rank and alpha, or None where it is left alone."""
    lr_weights = args.lr_weights()
    by_block = args.block_dims is not None or lr_weights is not None
    dims, alphas = args.block_dims or (dim,) * NUM_BLOCKS, args.block_alphas or (alpha,) * NUM_BLOCKS
    conv_alpha = DEFAULT_ALPHA if args.conv_alpha is None else args.conv_alpha
    conv_dims = args.conv_block_dims or (args.conv_dim or 0,) * NUM_BLOCKS
    conv_alphas = args.conv_block_alphas or (conv_alpha,) * NUM_BLOCKS

    def rule(target: Target) -> RankAndAlpha | None:
        block = block_index(target.name)
        if block is None or not by_block:
            rank, own_alpha = (args.conv_dim or 0, conv_alpha) if is_spatial(target.layer) else (dim, alpha)
        elif lr_weights is not None and lr_weights[block] == 0:
            return None
        else:
            rank = (conv_dims if is_spatial(target.layer) else dims)[block]
            own_alpha = (conv_alphas if is_spatial(target.layer) else alphas)[block]
        return RankAndAlpha(rank, own_alpha or rank) if rank else None

    return rule


def _warn_of_file_ranks(args: LoRAArgs) -> None:
    keys = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
    if given := [key for key in keys if getattr(args, key) is not None]:
        logger.warning("Ranks and alphas come from the weights file; --network_args %s are not used.", ", ".join(given))


def _not_matched(ranks: Mapping[str, RankAndAlpha], matched: set[str], text_encoder: TextEncoders) -> list[str]:
    """Return the file's adapters that found no layer, apart from those of encoders that are not loaded."""
    encoders = [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder or [])
    absent = tuple(f"lora_te{number}_" for number, encoder in enumerate(encoders, start=1) if encoder is None)
    return sorted(name for name in ranks if name not in matched and not name.startswith(absent))
