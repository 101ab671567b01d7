"""What a request asks for: its own options over the configured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..calibration import LayerSchedule
from ..config import ConfigError, RequestOptions, VLCacheConfig
from ..selection import Budget, Selection, first_k_by_layer, make_selectors


class OptionsPolicy:
    """Reads requests' options, and selects tokens to recompute by them.

    Args:
        num_layers: decoder layers of the model.
        schedules: of the `layer_aware` selector.

    Raises:
        ConfigError: the configured selector needs a schedule, and there is none.
    """

    def __init__(
        self, config: VLCacheConfig, num_layers: int, schedules: Sequence[LayerSchedule]
    ) -> None:
        self._config = config
        self._num_layers = num_layers
        self._selectors = make_selectors(num_layers, schedules)
        if config.selector not in self._selectors:
            raise ConfigError(
                "kv_connector_extra_config: selector='layer_aware' needs a schedule of this model; "
                "run `vlcache calibrate` and name its file in `calibration`, or choose "
                "selector='first_k'"
            )

    def read(self, params: Mapping[str, Any] | None) -> RequestOptions:
        """The options in a request's `kv_transfer_params`.

        Raises:
            ConfigError: they are not valid, or not allowed here.
        """
        options = RequestOptions.from_params(params)
        ratios = options.layer_ratios
        if ratios is not None and len(ratios) != self._num_layers:
            raise ConfigError(
                f"kv_transfer_params.vlcache: layer_ratios={ratios!r} has {len(ratios)} entries, "
                f"the model {self._num_layers} layers"
            )
        if self._config.gate == "require" and options.enabled and self.is_below_default(options):
            raise ConfigError(
                "kv_transfer_params.vlcache: with gate=require a request can only switch reuse "
                f"off or raise recompute_ratio above {self._config.recompute_ratio}"
            )
        if options.selector is not None and options.selector not in self._selectors:
            raise ConfigError(
                f"kv_transfer_params.vlcache: selector={options.selector!r} needs a calibration "
                f"file; allowed are {', '.join(self._selectors)}"
            )
        return options

    def is_below_default(self, options: RequestOptions) -> bool:
        """Whether less may be recomputed than the server's operator, or its gate, settled on."""
        ratio = options.recompute_ratio
        return (
            options.selector is not None
            or options.layer_ratios is not None
            or (ratio is not None and ratio < self._config.recompute_ratio)
        )

    def policy(self, options: RequestOptions) -> str:
        """The same for all requests that recompute the same tokens of a reused item."""
        config, ratio = self._config, options.recompute_ratio
        return repr(
            (
                float(config.recompute_ratio if ratio is None else ratio),
                options.layer_ratios or options.selector or config.selector,
            )
        )

    def select(self, options: RequestOptions, num_tokens: int) -> Selection:
        """Tokens to recompute of a reused item of so many."""
        ratio, min_tokens = options.recompute_ratio, self._config.min_recompute_tokens
        budget = Budget(self._config.recompute_ratio if ratio is None else ratio, min_tokens)
        if options.layer_ratios is not None:
            return first_k_by_layer(num_tokens, options.layer_ratios, budget)
        return self._selectors[options.selector or self._config.selector].select(num_tokens, budget)

    def saved_tokens(self, options: RequestOptions, num_tokens: int) -> int:
        """How many of an item's tokens need not be computed if it is reused."""
        selection = self.select(options, num_tokens)
        if selection.blend is not None:
            return num_tokens - selection.blend.count(num_tokens)
        return num_tokens - len(selection.stages[0][1])
