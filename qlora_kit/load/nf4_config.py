"""`NF4Config`: how transformers carries our quantization in a model's config.json.

The same fields as `QuantConfig`, in the class transformers asks for. It travels
as `quantization_config` of a saved model and is what `from_pretrained` takes.
"""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_kit.core.errors import ConfigError, FormatError
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.format import FORMAT_VERSION

QUANT_METHOD = "qlora_kit_nf4"
"""Name under which transformers finds the quantizer."""

_FIELDS = tuple(field.name for field in fields(QuantConfig))
_DEFAULT = QuantConfig()


@register_quantization_config(QUANT_METHOD)
class NF4Config(QuantizationConfigMixin):
    """Quantize to NF4 while loading; see `QuantConfig` for the fields.

    Example:
        >>> NF4Config(block_size=128).quant.block_size
        128
    """

    def __init__(
        self,
        *,
        block_size: int = _DEFAULT.block_size,
        double_quant: bool = _DEFAULT.double_quant,
        skip: tuple[str, ...] = _DEFAULT.skip,
        target: tuple[str, ...] = _DEFAULT.target,
    ) -> None:
        """Check and keep the fields.

        Args:
            block_size: weights that share one scale.
            double_quant: store the scales in 8 bits.
            skip: modules left in the compute dtype: name endings, or `re:` and a
                regular expression.
            target: modules to quantize, in the same notation; empty for every linear.

        Raises:
            ConfigError: a field is out of range.
        """
        self.quant_method = QUANT_METHOD
        self.format_version = FORMAT_VERSION
        self.block_size = block_size
        self.double_quant = double_quant
        self.skip = list(skip)
        self.target = list(target)
        _ = self.quant

    @property
    def quant(self) -> QuantConfig:
        """The same settings as the rest of the package takes them."""
        return QuantConfig(
            block_size=self.block_size,
            double_quant=self.double_quant,
            skip=tuple(self.skip),
            target=tuple(self.target),
        )

    @classmethod
    def from_quant(cls, quant: QuantConfig) -> "NF4Config":
        """Wrap a `QuantConfig`.

        Args:
            quant: the settings.

        Returns:
            The same settings for transformers.
        """
        return cls(**{name: getattr(quant, name) for name in _FIELDS})

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read the settings from a config.json.

        Args:
            config_dict: the `quantization_config` object.
            return_unused_kwargs: return `kwargs` too, as transformers may ask.
            **kwargs: none are used; transformers' signature.

        Returns:
            The settings, and with `return_unused_kwargs` a pair of them and `kwargs`.

        Raises:
            ConfigError: a key is unknown.
            FormatError: a newer version of this package wrote the model.
        """
        values = dict(config_dict)
        values.pop("quant_method", None)
        version = values.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise FormatError(
                f"the model is stored in version {version!r} of the {QUANT_METHOD} format, this "
                f"package reads version {FORMAT_VERSION}. Upgrade qlora_kit."
            )
        for key in values:
            if key not in _FIELDS:
                near = get_close_matches(key, _FIELDS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"unknown key {key!r} in quantization_config; known: "
                    f"{', '.join(_FIELDS)}.{hint}"
                )
        config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config
