"""SDXL behind the family interface."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from library.diffusion.objective import DdpmObjective, Objective
from library.diffusion.schedule import NoiseSchedule
from library.files.hashes import weight_files
from library.files.remembered import remembered_hash
from library.models.family import LatentCacheSpec, ModelSource, SizeConditioning, TextCacheSpec, TextCond, Tokens
from library.models.new_words import ExtendedEmbedding, NewWord
from library.models.prompt_weights import PromptStyle
from library.models.sdxl.build import build_part, file_names
from library.models.sdxl.checkpoint import Checkpoint, told_prediction
from library.models.sdxl.control_net import SdxlControlNet, make_control_net
from library.models.sdxl.embeddings import size_embedding
from library.models.sdxl.open_model import check_parts, open_checkpoint
from library.models.sdxl.save_model import save_model, stored_model
from library.models.sdxl.sizes import SdxlSizes
from library.models.sdxl.text_rows import merge_rows, text_body
from library.models.sdxl.tokenizer import ClipBpe, load_bpe, tokenize
from library.models.sdxl.unet import UNet, UNetEncoder
from library.models.sdxl.vae import VAE_TILE
from library.models.sdxl.weighted_text import encode_prompts
from library.models.weights import Hold, content_hash, fill
from library.models.word_files import read_word, save_word
from library.options.errors import UserError
from library.options.groups.loss import LossOptions
from library.options.groups.model import ModelOptions
from library.options.groups.noise import NoiseOptions

logger = logging.getLogger(__name__)

_NPZ_NAMES = {"hidden1": "hidden_state1", "hidden2": "hidden_state2", "pool2": "pool2"}
"""Our names of text outputs, and those of the cache files that sd-scripts reads."""
_HASHED_AS = "content hash 1"
"""What is remembered of files; to be changed where another hash is made of them."""
_WORD_KEYS = ("clip_l", "clip_g")
"""Names of the vectors for TE1 and TE2 in files of learned words."""
_OTHER_PREDICTION = {
    "v": "The base model says that it predicts v: add --v_parameterization",
    "epsilon": "The base model says that it predicts noise: leave out --v_parameterization",
}


def _pack(cond: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {
        _NPZ_NAMES[name]: (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy() for name, value in cond.items()
    }


def _unpack(arrays: Mapping[str, np.ndarray[Any, Any]]) -> TextCond:
    return {name: torch.from_numpy(arrays[stored]) for name, stored in _NPZ_NAMES.items()}


@dataclass(frozen=True)
class SdxlFamily:
    """An SDXL model, opened: its files are checked and its sizes known, none of its tensors is loaded.

    Make it with `open`.
    """

    source: ModelSource
    checkpoint: Checkpoint
    sizes: SdxlSizes
    words: tuple[NewWord, ...] = ()
    """Words besides the vocabulary."""

    name = "sdxl"
    latent_channels = 4
    latent_stride = 8
    size_multiple = 32
    vae_tile = VAE_TILE
    denoiser_name = "unet"
    encoder_names = ("te1", "te2")
    large_modules = ("ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer")
    part_titles: ClassVar[Mapping[str, str]] = {"unet": "U-Net", "te1": "CLIP-L", "te2": "OpenCLIP bigG"}
    latent_cache = LatentCacheSpec("_sdxl.npz")
    text_cache = TextCacheSpec("_te_outputs.npz", frozenset(_NPZ_NAMES.values()), _pack, _unpack)

    @classmethod
    def open(cls, source: ModelSource) -> "SdxlFamily":
        """Find the model's files, check that they are a complete SDXL model, and read its sizes; only headers are read.

        Raises:
            UserError: a file is missing, damaged, incomplete or not SDXL; the message says what it is.
        """
        checkpoint = open_checkpoint(source)
        return cls(source, checkpoint, check_parts(checkpoint))

    @cached_property
    def _bpe(self) -> ClipBpe:
        bpe = load_bpe(self.source.tokenizer_cache_dir)
        return bpe.with_words(self.words) if self.words else bpe

    def with_words(self, words: Sequence[NewWord]) -> "SdxlFamily":
        """Return this family with words besides the vocabulary; see `Family.with_words`."""
        for word in words:
            if taken := self._bpe.taken(word):
                raise UserError(
                    f"{taken[0]!r} is in the vocabulary of the text encoders and cannot become a new word. Choose another, such as "
                    f"{word.text}-concept."
                )
        return replace(self, words=tuple(words))

    def read_word(self, path: str | Path) -> list[Tensor]:
        """Return the vectors of a learned word for TE1 and TE2; see `Family.read_word`."""
        return read_word(path, _WORD_KEYS, (self.sizes.te1.width, self.sizes.te2.width))

    def save_word(
        self, path: str | Path, rows: Sequence[Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """Write the vectors of a learned word as `clip_l` and `clip_g`; see `Family.save_word`."""
        save_word(path, dict(zip(_WORD_KEYS, rows, strict=True)), dtype, metadata)

    def word_vectors(self, text: str, encoders: Sequence[nn.Module]) -> list[Tensor]:
        """Return the vectors of a text's tokens in the tables of TE1 and TE2; see `Family.word_vectors`."""
        ids = self._bpe.with_words(()).encode(text)  # the new words themselves have no vectors yet
        return [_token_embedding(encoder).weight.detach()[ids].float() for encoder in encoders]

    def extend_vocabulary(self, encoders: Sequence[nn.Module], rows: Sequence[Tensor]) -> list[nn.Parameter]:
        """Put the vectors of new words behind the encoders' tables; see `Family.extend_vocabulary`."""
        extended = []
        for encoder, new in zip(encoders, rows, strict=True):
            table = _token_embedding(encoder)
            extended.append(ExtendedEmbedding(table, new.to(table.weight.device)))
            cast(Any, text_body(encoder).embeddings).token_embedding = extended[-1]
        return [embedding.rows for embedding in extended]

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the hidden states of TE1 and TE2, and of the pooled text; see `Family.text_shapes`."""
        te1, te2 = self.sizes.te1, self.sizes.te2
        return {"hidden1": (tokens, te1.width), "hidden2": (tokens, te2.width), "pool2": (te2.projection_dim,)}

    def load_text_encoders(self, dtype: torch.dtype, device: torch.device, hold: Hold | None = None) -> list[nn.Module]:
        """Load TE1 and TE2, frozen and in evaluation mode; see `Family.load_denoiser`."""
        return [self._load("te1", dtype, device, hold), self._load("te2", dtype, device, hold)]

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Load the VAE, frozen and in evaluation mode. In float16 SDXL's own overflows: load it in float32 then."""
        vae = self._load("vae", dtype, device)
        if self.source.tile_vae:
            cast(Any, vae).enable_tiling()
        return vae

    def load_denoiser(self, dtype: torch.dtype, device: torch.device, hold: Hold | None = None) -> nn.Module:
        """Load the U-Net, frozen and in evaluation mode; see `Family.load_denoiser`."""
        return self._load("unet", dtype, device, hold)

    def make_control_net(self, file: str | None, dtype: torch.dtype, device: torch.device) -> SdxlControlNet:
        """Make a ControlNet of the U-Net, whose weights are read from the files again; see `Family.make_control_net`."""
        return make_control_net(self.sizes, self.checkpoint.parts["unet"], file, dtype, device)

    def trusts_foreign_text_caches(self) -> bool:
        """Trust them for diffusers folders: of single files, sd-scripts reads OpenCLIP's projection the wrong way round."""
        return Path(self.source.path).is_dir()

    def fingerprint(self, part: str) -> str:
        """Hash the values of a part ("vae" or "text_encoders"): copies of a model, or the same weights in another layout, agree."""
        return "-".join(self._content_hash(name) for name in {"vae": ("vae",), "text_encoders": ("te1", "te2")}[part])

    def _content_hash(self, part: str) -> str:
        compute = partial(content_hash, self.checkpoint.parts[part])
        origin = self.checkpoint.origins.get(part)
        if origin is None:
            return compute()
        variant = f"{self.source.prefer_fp16_variant} {self.source.keep_vae_precision}"
        return remembered_hash(f"{_HASHED_AS} {part} {variant}", weight_files(origin), compute)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Turn B texts into `ids1` and `ids2`, int64 (B, n, 77), on the CPU."""
        ids1, ids2 = tokenize(self._bpe, texts, self.source.max_token_length)
        return {"ids1": ids1, "ids2": ids2}

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has; both encoders read the same."""
        return self._bpe.count(texts)

    def encode_text(self, tokens: Tokens, encoders: Sequence[nn.Module | None]) -> TextCond:
        """Run TE1 and TE2, each if it is not None, on its device and in its dtype.

        Returns:
            `hidden1` (B, 75n + 2, width of TE1), `hidden2` (B, 75n + 2, width of TE2) and `pool2` (B, its projection width), the
            pooled output of each text's first row.
        """
        te1, te2 = encoders
        cond: TextCond = {}
        if te1 is not None:
            cond["hidden1"] = merge_rows(_by_rows(te1(_flat_ids(tokens["ids1"], te1)), tokens["ids1"]))
        if te2 is not None:
            hidden, pooled = te2(_flat_ids(tokens["ids2"], te2))
            cond["hidden2"] = merge_rows(_by_rows(hidden, tokens["ids2"]))
            cond["pool2"] = _by_rows(pooled, tokens["ids2"])[:, 0]
        return cond

    def encode_prompts(self, texts: Sequence[str], encoders: Sequence[nn.Module | None], style: PromptStyle) -> list[TextCond]:
        """Encode a picture's weighted prompts to one length; see `Family.encode_prompts`."""
        return encode_prompts(self._bpe, lambda tokens: self.encode_text(tokens, encoders), texts, style)

    def encode_images(self, vae: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
        """Sample the VAE posterior: mean + exp(logvar / 2) · noise, unscaled.

        The VAE runs in the dtype of its weights, also under autocast.

        Args:
            vae: as loaded by `load_vae`.
            images: (B, 3, H, W) in [-1, 1].
            noise: (B, 4, H/8, W/8) standard normal.

        Returns:
            (B, 4, H/8, W/8) float32.
        """
        posterior = _posterior(vae, images)
        mean: Tensor = posterior.mean.float()
        sample: Tensor = mean + posterior.std.float() * noise.to(mean)
        return sample

    def encode_posterior(self, vae: nn.Module, images: Tensor) -> Tensor:
        """Return the VAE posterior's mean and log-variance, unscaled; see `Family.encode_posterior`."""
        posterior = _posterior(vae, images)
        return torch.cat([posterior.mean.float(), posterior.logvar.float()], dim=1)

    def to_model_units(self, latents: Tensor) -> Tensor:
        """Scale latents of the VAE to the standard deviation of about 1 that the U-Net sees."""
        return latents * self.sizes.vae.scaling_factor

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Decode what the U-Net sees, (B, 4, h, w), to images (B, 3, 8h, 8w), float32 in [-1, 1], not clamped.

        The VAE runs in the dtype of its weights, also under autocast.
        """
        weight = next(vae.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            unscaled = latents.float() / self.sizes.vae.scaling_factor
            images: Tensor = cast(Any, vae).decode(unscaled.to(weight.device, weight.dtype)).sample
        return images.float()

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, cond: TextCond, sizes: SizeConditioning | None
    ) -> Tensor:
        """Run the U-Net; see `Family.predict`. `sizes` is required."""
        if sizes is None:
            raise ValueError("SDXL is conditioned on image sizes; predict needs them")
        context = torch.cat([cond["hidden1"], cond["hidden2"]], dim=-1)
        vector = torch.cat([cond["pool2"].float(), size_embedding(sizes, self.sizes.size_dim)], dim=1)
        out: Tensor = denoiser(noisy, timesteps, context, vector)
        return out

    def declared_prediction(self) -> str | None:
        """Return what the files say the U-Net predicts, "v" or "epsilon"; None where they say nothing."""
        return "v" if "v_pred" in self.checkpoint.markers else told_prediction(self.checkpoint.metadata)

    def declares_zero_terminal_snr(self) -> bool:
        """Return whether the files say that the noise schedule ends in pure noise."""
        return "ztsnr" in self.checkpoint.markers

    def make_objective(self, model: ModelOptions, noise: NoiseOptions, loss: LossOptions, device: torch.device) -> Objective:
        """Make the objective of epsilon or v-prediction; see `Family.make_objective`."""
        schedule = NoiseSchedule.make(zero_terminal_snr=noise.zero_terminal_snr, device=device)
        objective = DdpmObjective(schedule, model.v_parameterization, noise, loss)
        declared = self.declared_prediction()
        if declared is not None and declared != objective.prediction:
            logger.warning("%s, or it unlearns what it knows.", _OTHER_PREDICTION[declared])
        return objective

    def skeletons(self) -> dict[str, nn.Module]:
        """Build U-Net, TE1 and TE2 on the meta device."""
        return {part: build_part(part, self.sizes) for part in (self.denoiser_name, *self.encoder_names)}

    def with_changes(self, changes: Mapping[str, Mapping[str, Callable[[Tensor], Tensor]]]) -> "SdxlFamily":
        """Return this family with some of its weights changed whenever they are read; see `Family.with_changes`."""
        parts = dict(self.checkpoint.parts)
        for part, changed in changes.items():
            names = file_names(build_part(part, self.sizes))
            entries = {names[name]: (parts[part][names[name]], change) for name, change in changed.items()}
            parts[part] = parts[part] | {stored: entry.then(change, entry.shape) for stored, (entry, change) in entries.items()}
        origins = {part: origin for part, origin in self.checkpoint.origins.items() if part not in changes}
        return replace(self, checkpoint=replace(self.checkpoint, parts=parts, origins=origins))

    def without_values(self) -> "SdxlFamily":
        """Return this family with tensors that have shapes but no values; see `Family.without_values`."""
        parts = {
            part: {name: replace(entry, read=partial(torch.empty, entry.shape)) for name, entry in entries.items()}
            for part, entries in self.checkpoint.parts.items()
        }
        return replace(self, checkpoint=replace(self.checkpoint, parts=parts))

    def set_attention(self, denoiser: nn.Module, kind: str) -> None:
        """Choose how the U-Net, or a ControlNet, computes attention: "sdpa", "xformers", "mem_eff_attn" or "plain"."""
        cast(UNetEncoder, denoiser).set_attention(kind)

    def enable_gradient_checkpointing(self, denoiser: nn.Module, fraction: float = 1.0) -> None:
        """Keep only the inputs of blocks for the backward pass; see `Family.enable_gradient_checkpointing`."""
        cast(UNetEncoder, denoiser).enable_gradient_checkpointing(fraction)

    def enable_text_checkpointing(self, encoders: Sequence[nn.Module | None]) -> None:
        """Keep only the inputs of layers for the backward pass; puts the encoders in training mode."""
        for encoder in encoders:
            if encoder is not None:
                model: Any = encoder
                # Its name in newer versions of transformers, then the older one.
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable({"use_reentrant": False})
                model.train()  # transformers checkpoint in this mode only; CLIP has no dropout that it would switch on

    def file_names(self, part: str, module: nn.Module) -> dict[str, str]:
        """Return, for each tensor name of a part's module, its name in files."""
        return file_names(module)

    def blocks(self, denoiser: nn.Module) -> Mapping[str, nn.Module]:
        """Return the U-Net's residual blocks, basic transformer blocks and samplers; see `Family.blocks`."""
        return cast(UNet, denoiser).blocks()

    def denoiser_blocks(self, denoiser: nn.Module) -> list[list[nn.Parameter]]:
        """Return the U-Net's parameters in the 23 blocks of `--block_lr`.

        0 is the embedding of time and size, 1 to 9 the input blocks, 10 to 12 the middle blocks, 13 to 21 the output blocks, 22 the
        head. Blocks that a reduced U-Net lacks are empty.
        """
        unet = cast(UNet, denoiser)
        blocks = [[*unet.time_embed.parameters(), *unet.label_emb.parameters()]]
        for group, number in ((unet.input_blocks, 9), (unet.middle_block, 3), (unet.output_blocks, 9)):
            members = [list(block.parameters()) for block in group]
            blocks += [*members, *([] for _ in range(number - len(members)))]
        return [*blocks, list(unet.out.parameters())]

    def unused_text_parameters(self, encoder: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of a text encoder that the U-Net sees nothing of: TE1's last layer and final norm."""
        if hasattr(encoder, "text_projection"):
            return []  # its pooled output goes through everything
        body: Any = text_body(encoder)
        return [*body.encoder.layers[-1].parameters(), *body.final_layer_norm.parameters()]

    def save_model(
        self,
        path: Path,
        layout: str,
        trained: Mapping[str, Mapping[str, Tensor]],
        *,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        v_prediction: bool,
        zero_terminal_snr: bool,
        progress: tuple[int, int] = (0, 0),
    ) -> None:
        """Write a whole model; see `Family.save_model`."""
        wanted = {"v_pred": v_prediction, "ztsnr": v_prediction and zero_terminal_snr}
        model = stored_model(self.checkpoint, trained, frozenset(marker for marker, is_wanted in wanted.items() if is_wanted))
        save_model(path, layout, model, self.sizes, dtype=dtype, metadata=metadata, progress=progress)

    def network_metadata(self) -> dict[str, str]:
        """Say which models network files fit, in the `ss_*` keys that user interfaces read."""
        return {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"}

    def model_spec(self) -> dict[str, str]:
        """Say what a base model is, in `modelspec` fields."""
        return {
            "architecture": "stable-diffusion-xl-v1-base",
            "implementation": "https://github.com/Stability-AI/generative-models",
        }

    def _load(self, part: str, dtype: torch.dtype, device: torch.device, hold: Hold | None = None) -> nn.Module:
        module = build_part(part, self.sizes)
        return fill(module, self.checkpoint.parts[part], file_names(module), dtype, device, hold)


def _posterior(vae: nn.Module, images: Tensor) -> Any:
    """Run a VAE's encoder, also under autocast, in the dtype of its weights."""
    weight = next(vae.parameters())
    with torch.autocast(weight.device.type, enabled=False):
        return cast(Any, vae).encode(images.to(weight.device, weight.dtype)).latent_dist


def _token_embedding(encoder: nn.Module) -> Any:
    """Return the table of an encoder's vocabulary."""
    return cast(Any, text_body(encoder).embeddings).token_embedding


def _flat_ids(ids: Tensor, encoder: nn.Module) -> Tensor:
    """(B, n, 77) to (B·n, 77) on the encoder's device."""
    return ids.flatten(0, 1).to(next(encoder.parameters()).device, non_blocking=True)


def _by_rows(states: Tensor, ids: Tensor) -> Tensor:
    """(B·n, …) to (B, n, …)."""
    rows: Tensor = states.unflatten(0, ids.shape[:2])
    return rows
