"""What several switches say about the attention of a model."""


class AttentionChoice:
    """Which attention is in effect; to be mixed into groups that have some of its switches."""

    @property
    def wants_xformers(self) -> bool:
        """Whether the attention of xformers was asked for, by either name: there is one U-Net and so one switch."""
        return any(getattr(self, name, False) for name in ("xformers", "diffusers_xformers"))

    @property
    def attention(self) -> str:
        """The attention in effect: "mem_eff_attn", "xformers" or "sdpa"."""
        return "mem_eff_attn" if getattr(self, "mem_eff_attn", False) else "xformers" if self.wants_xformers else "sdpa"
