"""CiterConfig: which SLM, which LLM, which router, which threshold."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .compat import CACHE_NAMES
from .routers import as_threshold, as_veto

CONFIG_VERSION = 1


class CiterConfig(PreTrainedConfig):
    """Configuration of a pair of causal language models and the router that chooses between them token by token.

    Args:
        slm_config: Configuration (object or dict) of the small language model. Default: `LlamaConfig()`.
        llm_config: Configuration (object or dict) of the large language model. Default: `LlamaConfig()`.
        router: Kind and options of the router, for example `{"type": "mlp"}`; a bare string is the kind.
        router_threshold: The SLM writes a token when the router's score reaches this number, from 0 (the SLM alone)
            to 2 (above 1: the LLM alone) (CITER, section 3: τ).
        llm_veto: The LLM takes back an SLM's token when it gives it less than this part of its best token's
            probability, from 0 (no veto) to 1 (the LLM's own text).
        slm_reference: Where the SLM's weights are: `{"name_or_path", "revision", ...}`. `None` means that they
            are in this repository's own `model.safetensors`. `adapter` in it says where its adapter is, likewise.
        llm_reference: The same for the LLM.
        calibration: Thresholds and vetoes by quality, and for which pair: what `citer calibrate --quality` found.
        use_cache: Whether `forward` returns a cache when it is not told.
        citer_version: Version of this format that wrote the configuration.

    Raises:
        ValueError: for a threshold or a veto out of range, or a router that does not name its type.
    """

    model_type = "citer"
    sub_configs = {"slm_config": AutoConfig, "llm_config": AutoConfig}
    keys_to_ignore_at_inference = list(CACHE_NAMES)

    def __init__(
        self,
        slm_config: PreTrainedConfig | dict[str, Any] | None = None,
        llm_config: PreTrainedConfig | dict[str, Any] | None = None,
        router: str | dict[str, Any] = "confidence",
        router_threshold: float = 0.5,
        llm_veto: float = 0.0,
        slm_reference: dict[str, Any] | None = None,
        llm_reference: dict[str, Any] | None = None,
        calibration: dict[str, Any] | None = None,
        use_cache: bool = True,
        citer_version: int = CONFIG_VERSION,
        **kwargs: Any,
    ):
        self.slm_config = _as_config(slm_config)
        self.llm_config = _as_config(llm_config)
        self.router: dict[str, Any] = {"type": router} if isinstance(router, str) else dict(router)
        if not isinstance(self.router.get("type"), str):
            raise ValueError(f"router: expected a kind or a dictionary with its 'type', got {router!r}.")
        self.router_threshold: float = as_threshold(router_threshold)
        self.llm_veto: float = as_veto(llm_veto)
        self.slm_reference = slm_reference
        self.llm_reference = llm_reference
        self.calibration = calibration
        self.use_cache = use_cache
        self.citer_version = min(citer_version, CONFIG_VERSION)
        # The base class hands its own attention and experts implementation (`None` here) down to the
        # sub-configurations. For models that are loaded already, this would silently change how they mask.
        kept = [
            (config, f"_{key}", getattr(config, f"_{key}"))
            for config in (self.slm_config, self.llm_config)
            for key in ("attn_implementation", "experts_implementation")
            if kwargs.get(key) is None and hasattr(config, f"_{key}")
        ]
        super().__init__(**kwargs)
        for config, key, value in kept:
            setattr(config, key, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from its JSON form, which must be that of a pair."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"config: expected a CITER router repository, got model_type {model_type!r}.")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary; the base models' quantization is left to the base models."""
        output = super().to_dict()
        # A repository refers to the base models as they are published; how this user loaded them is no part of it.
        for key, reference in (("slm_config", self.slm_reference), ("llm_config", self.llm_reference)):
            if reference is not None and isinstance(output.get(key), dict):
                output[key].pop("quantization_config", None)
                output[key].pop("_name_or_path", None)
                output[key].pop("is_remote", None)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, and always the two sub-configurations with their types."""
        diff, full = super().to_diff_dict(), self.to_dict()
        for key in ("slm_config", "llm_config", "router", "router_threshold", "llm_veto", "citer_version"):
            diff[key] = full[key]
        self._remove_keys_not_serialized(diff)
        return diff

    @property
    def vocab_size(self) -> int:
        """Size of the shared vocabulary: the smaller of the two tables, the larger one's other rows are padding."""
        return min(table_size(self.slm_config), table_size(self.llm_config))

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the SLM's input and output embeddings are one; set, it is set for both models."""
        return bool(getattr(self.slm_config.get_text_config(), "tie_word_embeddings", False))

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.slm_config.get_text_config().tie_word_embeddings = value
        self.llm_config.get_text_config().tie_word_embeddings = value

    @property
    def max_position_embeddings(self) -> int | None:
        """Longest text both models can read, in tokens; `None` when neither states a limit."""
        return min(filter(None, map(context_length, (self.slm_config, self.llm_config))), default=None)


def _slm_attribute(name: str) -> property:
    return property(
        lambda self: getattr(self.slm_config.get_text_config(), name),
        lambda self, value: setattr(self.slm_config.get_text_config(), name, value),
        doc=f"`{name}` of the SLM, whose hidden states and attentions `forward` returns.",
    )


# What `forward` returns as hidden states, attentions and `past_key_values.layers` is the SLM's, and code that reads
# their shapes asks the top-level configuration.
_shapes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
for _name in (*_shapes, "bos_token_id", "eos_token_id", "pad_token_id"):
    setattr(CiterConfig, _name, _slm_attribute(_name))


def table_size(config: PreTrainedConfig) -> int:
    """Number of rows of a model's vocabulary table."""
    return int(config.get_text_config().vocab_size)


def router_width(config: PreTrainedConfig) -> int:
    """Return the width of an SLM's last hidden state, as its head takes it."""
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest text that a model states it can read, in tokens, or `None` when it states no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def _as_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    if config is None:
        return AutoConfig.for_model("llama")
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config)
    model_type = config.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"slm_config, llm_config: expected a dictionary with a model_type, got {sorted(config)}.")
    if model_type not in CONFIG_MAPPING:
        # A model whose code lies in its own repository: it brings its configuration when it is loaded.
        return type("UnknownConfig", (PreTrainedConfig,), {"model_type": model_type})(**config)
    return AutoConfig.for_model(model_type, **config)
