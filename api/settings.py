"""Settings of the API process."""

from pydantic import Field

from core.settings import ServiceSettings


class ApiSettings(ServiceSettings):
    """Where the API listens and how much it takes."""

    host: str = Field("127.0.0.1", validation_alias="TRIMTAB_HOST")
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65535, validation_alias="TRIMTAB_PORT")
    """Port to listen on."""
    max_body_bytes: int = Field(1_000_000, ge=1024, validation_alias="TRIMTAB_MAX_BODY_BYTES")
    """Largest JSON body; larger ones are refused while they arrive."""
    max_file_bytes: int = Field(200_000_000, ge=1024, validation_alias="TRIMTAB_MAX_FILE_BYTES")
    """Largest uploaded file."""
    num_threads: int = Field(16, ge=1, le=256, validation_alias="TRIMTAB_API_THREADS")
    """Requests served at once, and database connections for them."""
    streams_per_tenant: int = Field(20, ge=1, validation_alias="TRIMTAB_STREAMS_PER_TENANT")
    """Open streams a tenant may have in this process."""
    heartbeat_seconds: float = Field(15, gt=0, validation_alias="TRIMTAB_STREAM_HEARTBEAT_SECONDS")
    """Silence after which a stream says that it lives."""
    stream_seconds: float = Field(3600, gt=0, validation_alias="TRIMTAB_STREAM_SECONDS")
    """Longest life of one stream; the client comes back with its last id."""
    key_check_seconds: float = Field(60, gt=0, validation_alias="TRIMTAB_KEY_CHECK_SECONDS")
    """Period after which an open stream looks whether its key is still valid."""
    metrics_host: str = Field("127.0.0.1", validation_alias="TRIMTAB_METRICS_HOST")
    """Address of `/metrics`, which asks for no key: never a public one."""
    metrics_port: int = Field(0, ge=0, le=65535, validation_alias="TRIMTAB_METRICS_PORT")
    """Port of `/metrics` for Prometheus; 0 is none."""
