"""What the storage half is told: a frozen value that crosses to the engine process. No reader of the environment."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """The settings under "Where the model comes from", as `Settings.storage` gives them. Secrets stay out of the repr.

    AWS_ACCESS_KEY_ID and what else botocore's own chain reads are not here: botocore reads them itself.
    """

    cache_dir: str | None = None
    load_mode: str = "auto"
    threads: int = 8
    aws_endpoint_url: str | None = None
    aws_s3_endpoint: str | None = None
    s3_endpoint: str | None = None
    bucket: str | None = None
    region: str | None = None
    use_https: bool = True
    verify_ssl: bool = True
    ca_bundle: str | None = None
    anonymous: bool = False
    config: str | None = field(default=None, repr=False)  # STORAGE_CONFIG, JSON
    override_config: str | None = field(default=None, repr=False)
    offline: bool = False
    hf_endpoint: str | None = None
    hf_token: str | None = field(default=None, repr=False)
