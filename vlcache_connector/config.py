"""Configuration of VLCache, read from `kv_connector_extra_config`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
)

SelectorName = Literal["first_k", "layer_aware", "cacheblend", "random_k", "none", "full"]
GateMode = Literal["require", "warn", "off"]
DonorMode = Literal["first_seen", "canonical"]

ADAPTER_TYPES = ("fs", "fs_native", "valkey", "resp", "mooncake")
"""LMCache's L2 adapters that VLCache is tested with, the nearest first."""

_TIER_KEYS = ("disk_path", "l2_adapters", "lmcache_config_file", "redis_url")


def _byte_size(value: Any) -> Any:
    return TypeAdapter(ByteSize).validate_python(value) if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(_byte_size)]
"""A number of bytes: an integer, or a string with a unit."""


class ConfigError(Exception):
    """A configuration key that VLCache can't accept; the message names key, value and remedy.

    No ValueError: pydantic, which vLLM's configuration is made with, would wrap that in a report of
    its own.
    """


class VLCacheConfig(BaseModel):
    """Options of `VLCacheConnector`; unknown keys are refused.

    Byte sizes take integers or strings such as `"4GiB"`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enabled: bool = True
    """Reuse and store segments. With `false` vLLM runs as without the connector."""

    selector: SelectorName = "first_k"
    """Rule that picks the tokens of a reused segment to recompute."""

    recompute_ratio: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of a reused segment's tokens that is recomputed; 1.0 recomputes all of them."""

    min_recompute_tokens: int = Field(default=8, ge=0)
    """Least number of tokens recomputed per segment when the ratio is above zero."""

    calibration: str | None = None
    """Name or path of the model's calibration file; by default the one of the model's name."""

    gate: GateMode = "warn"
    """What a model that `vlcache verify` has not passed gets: no reuse, a warning, or nothing."""

    donor: DonorMode = "first_seen"
    """In which context stored KV is computed: the first request's, or a clean one of its own."""

    donor_variants: int = Field(default=3, ge=1)
    """Most segments kept of one image, each with another number of images in front of it."""

    min_segment_tokens: int = Field(default=16, ge=1)
    """Images and videos with fewer tokens are neither stored nor reused."""

    cpu_bytes: Bytes = Field(default=4 << 30, gt=0)
    """Host memory for KV segments of one engine, shared out over its tensor-parallel ranks."""

    encoder_cpu_bytes: Bytes = Field(default=1 << 30, gt=0)
    """Host memory for vision encoder outputs, per tensor-parallel rank."""

    device_bytes: Bytes = Field(default=0, ge=0)
    """Device memory for copies of the KV segments used last, per tensor-parallel rank; 0: none."""

    disk_path: str | None = None
    """Directory for segments that survive a restart; None: no disk tier."""

    disk_bytes: Bytes = Field(default=50 << 30, gt=0)
    """Most bytes in `disk_path`, of all servers that share it."""

    l2_adapters: list[dict[str, Any]] = []
    """Storage below host memory, nearest first: LMCache's JSON objects, `{"type": "fs", ...}`."""

    lmcache_config_file: str | None = None
    """YAML or JSON file with more of them, under its key `l2_adapters`; None: there are no more."""

    redis_url: str | None = None
    """Redis or Valkey that several servers share, without credentials; None: no such tier."""

    redis_tls_ca_file: str | None = None
    """Certificates that a `rediss://` server is checked against; None: the system's."""

    encryption_key_file: str | None = None
    """File of at least 32 random bytes, by which all that is stored below host memory is encrypted;
    None: it is not."""

    deployment: str = Field(default="default", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Servers that share segments below host memory have the same one."""

    ttl_seconds: int = Field(default=7 * 24 * 3600, gt=0)
    """Age at which segments in `disk_path` and in Redis or Valkey are dropped."""

    fetch_deadline_seconds: float = Field(default=1.0, gt=0.0)
    """Longest that a request waits for segments from below host memory."""

    salt_quota_bytes: Bytes | None = Field(default=None, gt=0)
    """Most bytes of one `cache_salt` that this server keeps in each tier below host memory, of what
    it has stored since it started; None: as many as there is room for."""

    require_tiers: bool = False
    """Don't start while a tier below host memory can't be used; with `false` it is tried again."""

    write_queue_bytes: Bytes = Field(default=1 << 30, gt=0)
    """Most bytes on their way to tiers below host memory; what doesn't fit is not written."""

    store_at_sight: int = Field(default=1, ge=1, le=2)
    """When segments are written below host memory: 1, once they are computed; 2, once this server
    has been asked for them again."""

    break_even: bool = True
    """Compute an image where that takes less time than reusing it, or loading it from a tier."""

    prefill_tokens_per_second: float | None = Field(default=None, gt=0.0)
    """Speed of computing, for `break_even`; None: measured."""

    share_unsalted: bool = True
    """Requests without a `cache_salt` share their segments; with `false` they reuse nothing."""

    trust_client_names: bool = False
    """Take the names that requests give to images and videos (`multi_modal_uuids`, hashes in the
    body) for what they are; only behind a gateway that makes the names."""

    lazy_decoding: bool = True
    """Decode an image that this process has decoded before only if its pixels are needed."""

    @property
    def tier_keys(self) -> list[str]:
        """The keys that ask for storage below host memory, nearest first, of those that are set."""
        return [key for key in _TIER_KEYS if getattr(self, key)]

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> VLCacheConfig:
        """Validate `extra`.

        Raises:
            ConfigError: one line per bad key, with its value and what is allowed.
        """
        try:
            return cls.model_validate(dict(extra))
        except ValidationError as error:
            raise ConfigError(_explain(error, "kv_connector_extra_config", cls)) from None


class RequestOptions(BaseModel):
    """Per-request switches: `kv_transfer_params: {"vlcache": {...}}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enabled: bool = True
    recompute_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    selector: SelectorName | None = None
    layer_ratios: list[Annotated[float, Field(ge=0.0, le=1.0)]] | None = None
    """A schedule of its own: the share that each decoder layer recomputes, never rising."""

    @field_validator("layer_ratios")
    @classmethod
    def _never_rising(cls, ratios: list[float] | None) -> list[float] | None:
        if any(below < above for below, above in pairwise(ratios or ())):
            raise ValueError("shares must not rise from layer to layer")
        return ratios

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> RequestOptions:
        """Read the `vlcache` entry of a request's `kv_transfer_params`.

        Raises:
            ConfigError: the entry is not valid.
        """
        entry = (params or {}).get("vlcache")
        if entry is None:
            return cls()
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f"kv_transfer_params.vlcache={entry!r}: a JSON object is needed, "
                f"with the keys {', '.join(cls.model_fields)}"
            )
        try:
            return cls.model_validate(dict(entry))
        except ValidationError as error:
            raise ConfigError(_explain(error, "kv_transfer_params.vlcache", cls)) from None


def _explain(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            allowed = ", ".join(model.model_fields)
            lines.append(f"{where}: unknown key {key}={item['input']!r}; allowed keys: {allowed}")
        else:
            lines.append(f"{where}: {key}={item['input']!r} is refused: {item['msg']}")
    return "\n".join(lines)
