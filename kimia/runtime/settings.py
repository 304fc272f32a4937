"""Every setting of every process, on one page. Environment variables: the name below in capitals after `KIMIA_`.

`docs/operations.md` shows the same table; a test holds both together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar, overload

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from kimia.errors import SettingsError
from kimia.streams import keys
from kimia.streams.addresses import check_url

if TYPE_CHECKING:
    from kimia.streams.wire import WireOptions

__all__ = ["Settings", "read_settings"]

ADDRESS = r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):\d{1,5}$"

S = TypeVar("S", bound=BaseSettings)


class Settings(BaseSettings):
    """What a process is told by its environment. Never changed while it runs."""

    model_config = SettingsConfigDict(env_prefix="KIMIA_", frozen=True, extra="ignore", hide_input_in_errors=True)

    # ---- the wire ----
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,  # may hold a password
        description="Journal: sessions, jobs and logs. `redis://`, `rediss://`, `unix://`, `redis+sentinel://`, "
        "`redis+cluster://`; empty: a stage alone",
    )
    blob_url: str = Field("", repr=False, description="Blobs, which may be lost. Empty: the journal's server")
    partitions: int = Field(
        1,
        ge=1,
        le=keys.MOST_PARTITIONS,
        description="Partitions of sessions, 16 or more on a cluster; the same in every process",
    )
    lease_seconds: float = Field(1.6, gt=0, description="Silence of a worker after which others take its turns over")
    turn_ttl_seconds: float = Field(900.0, gt=0, description="Life of a turn's keys after its last write")
    session_ttl_seconds: float = Field(3600.0, gt=0, description="Life of a session after its last turn")
    blob_ttl_seconds: float = Field(900.0, gt=0, description="Life of a blob after its last use")
    max_deliveries: int = Field(3, ge=1, description="Attempts at a turn without progress before it is given up")

    lead_seconds: float = Field(
        4.0,
        gt=0,
        description="Speech that is kept ahead of what the caller has heard; beyond it a turn's row is parked",
    )

    # ---- the model ----
    model: str = Field("moonshotai/Kimi-Audio-7B-Instruct", description="Model folder or hub id")
    vq_tokenizer: str = Field("", description="Folder or hub id of the VQ tokenizer. Empty: where the model's lies")
    device: str = Field("", description="`cpu`, `cuda` or `cuda:N`. Empty: CUDA where there is one")
    dtype: Literal["", "float32", "bfloat16", "float16"] = Field(
        "", description="Type of weights and activations. Empty: bfloat16 on CUDA, float32 on the CPU"
    )
    quantize: Literal["", "int8", "fp8"] = Field(
        "",
        description="One byte for each weight of the llm's matrices: `int8`, or `fp8` on an Ada, Hopper or newer GPU. "
        "Empty: as `KIMIA_DTYPE` says. The same for all llm workers",
    )
    engine: str = Field(
        "",
        pattern=r"^(triton://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):\d{1,5})?$",
        description="`triton://host:port`: a Triton server computes encoders and vocoder. Empty: the process does",
    )
    presets: str = Field(
        "",
        description="Preset files (`kimia calibrate-flow`), separated by commas, which turns may then name; "
        "the same in every process",
    )
    preset: str = Field("", description="Preset of turns that name none. Empty: `low-latency`")
    rows: int = Field(4, ge=1, description="Turns that a stage computes at once. The same for all llm workers")
    tokenizer_rows: int = Field(0, ge=0, description="The same of the tokenizer in a co-located host. 0: `KIMIA_ROWS`")
    llm_rows: int = Field(0, ge=0, description="The same of the llm in a co-located host. 0: `KIMIA_ROWS`")
    detokenizer_rows: int = Field(
        0, ge=0, description="The same of the detokenizer in a co-located host. 0: `KIMIA_ROWS`"
    )
    prefix_bytes: int = Field(
        -1,
        ge=-1,
        description="Bytes of KV, that of running turns counted, up to which a conversation's is kept for its next "
        "turn. -1: what `KIMIA_ROWS` turns that fill the context take; 0: none is kept",
    )
    threads: int = Field(0, ge=0, description="Threads of torch on the CPU. 0: as torch chooses")

    # ---- gRPC ----
    listen: str = Field(
        "127.0.0.1:50051", pattern=ADDRESS, description="Address of the gRPC server. Port 0: any free one"
    )
    ready_file: str = Field("", description="File that gets the address once the process serves. Empty: none")
    max_message_bytes: int = Field(8 << 20, ge=1 << 16, description="Largest message, received or sent")
    max_rpcs: int = Field(1024, ge=1, description="Calls at once, health checks included; more are refused")
    keepalive_seconds: float = Field(30.0, ge=1, description="Pause between pings of a connection")
    max_connection_age_seconds: float = Field(
        1800.0, gt=0, description="Age at which clients are asked to connect again, so that load spreads after scaling"
    )
    connection_grace_seconds: float = Field(
        3600.0, gt=0, description="Time that calls then have to end; the longest call that is never cut"
    )
    reflection: bool = Field(False, description="Offer gRPC reflection (for grpcurl)")
    tls_certificate: str = Field("", description="PEM file of the server's certificate chain. Empty: no TLS")
    tls_key: str = Field("", description="PEM file of its private key")
    tls_client_ca: str = Field(
        "", description="PEM file of the authority of clients. Given: clients must show a certificate"
    )
    tls_name: str = Field(
        "localhost", description="Name in the certificate, as which the container's probe knows the server"
    )

    # ---- limits ----
    tenant_sessions: int = Field(
        0, ge=0, description="Sessions that one tenant may have at once. 0: no limit of its own"
    )
    turn_deadline_seconds: float = Field(120.0, gt=0, description="Time for a turn whose caller sets no deadline")
    call_idle_seconds: float = Field(
        300.0,
        gt=0,
        description="Time without a message or a running turn after which a call is ended: others get its rows",
    )
    max_clip_bytes: int = Field(32 << 20, ge=1, description="Bytes of one clip of a turn")
    max_turn_bytes: int = Field(64 << 20, ge=1, description="Bytes of all the input of a turn")
    drain_seconds: float = Field(
        30.0, ge=0, description="Time for running turns to end after SIGTERM; then they are handed over"
    )

    # ---- what is told ----
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of Prometheus metrics, on the host of `listen`. 0: off"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged")
    log_format: Literal["json", "text"] = Field("json", description="One JSON object per line, or text to read")

    @field_validator("redis_url", "blob_url")
    @classmethod
    def _is_redis_url(cls, url: str) -> str:
        if url:
            try:
                check_url(url)
            except SettingsError as error:
                raise ValueError(str(error)) from None
        return url

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Settings:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("set both KIMIA_TLS_CERTIFICATE and KIMIA_TLS_KEY, or neither")
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("KIMIA_TLS_CLIENT_CA needs KIMIA_TLS_CERTIFICATE and KIMIA_TLS_KEY")
        return self

    @property
    def host(self) -> str:
        """Host part of `listen`, without brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    def wire_options(self) -> WireOptions:
        """The part that the Redis wire needs."""
        from kimia.streams.wire import WireOptions  # a stage without pipeline needs no redis

        return WireOptions(
            partitions=self.partitions,
            turn_ttl=self.turn_ttl_seconds,
            session_ttl=self.session_ttl_seconds,
            blob_ttl=self.blob_ttl_seconds,
            lease=self.lease_seconds,
            max_deliveries=self.max_deliveries,
            lead=self.lead_seconds,
        )


@overload
def read_settings() -> Settings: ...


@overload
def read_settings(kind: type[S]) -> S: ...


def read_settings(kind: type[BaseSettings] = Settings) -> BaseSettings:
    """This process's settings. Raises SettingsError: one line that names every variable that is wrong."""
    try:
        return kind()
    except ValidationError as error:
        raise SettingsError("; ".join(_lines(error, kind.model_config.get("env_prefix", "")))) from None
    except SourceError as error:
        raise SettingsError(f"the environment cannot be read: {error}") from None


def _lines(error: ValidationError, prefix: str) -> list[str]:
    """One phrase per mistake. The values stay out: they may be secrets."""
    return [_phrase(".".join(str(part) for part in item["loc"]), item["msg"], prefix) for item in error.errors()]


def _phrase(field: str, message: str, prefix: str) -> str:
    message = message.removeprefix("Value error, ")
    return f"{(prefix + field).upper()}: {message[:1].lower()}{message[1:]}" if field else message
