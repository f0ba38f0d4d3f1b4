"""Options about caching latents and text-encoder outputs."""

from typing import Any, ClassVar

from pydantic import model_validator

from library.options.declare import OptionGroup, flag, option


class LatentCacheOptions(OptionGroup):
    """Images that are encoded once before training, and where the latents are kept."""

    topic: ClassVar[str] = "Caching"

    cache_latents: bool = flag("Encode every image once before training and keep the latents in memory.")
    cache_latents_to_disk: bool = flag("Keep the latents on disk beside the images; implies --cache_latents.")
    cache_latents_posterior: bool = flag(
        "Cache what the VAE says of an image, mean and log-variance, and draw latents from it anew at each use."
    )
    vae_batch_size: int = option(1, "Images per call of the VAE.", ge=1)
    skip_cache_check: bool = flag("Trust cache files that exist without opening them.")
    highvram: bool = flag("Do not empty the device's memory cache between batches while caching latents.")

    @property
    def text(self) -> "CacheOptions | None":
        """The options of cached text where text is cached, else None."""
        return None

    @model_validator(mode="before")
    @classmethod
    def _disk_implies_caching(cls, given: dict[str, Any]) -> dict[str, Any]:
        implied = [name for name in ("cache_latents", "cache_text_encoder_outputs") if given.get(f"{name}_to_disk") is True]
        return given | dict.fromkeys(implied, True)


class CacheOptions(LatentCacheOptions):
    """Images and captions that are encoded once before training."""

    cache_text_encoder_outputs: bool = flag("Encode every caption once before training and keep the results in memory.")
    cache_text_encoder_outputs_to_disk: bool = flag(
        "Keep the encoded captions on disk beside the images; implies --cache_text_encoder_outputs."
    )
    text_cache_variants: int = option(
        10, "Most texts each caption is encoded as where settings vary it, such as --shuffle_caption, and text is cached.", ge=1
    )

    @property
    def text(self) -> "CacheOptions | None":
        """The options of cached text where text is cached, else None."""
        return self if self.cache_text_encoder_outputs else None
