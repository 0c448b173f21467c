"""What the Open Inference Protocol calls models: the adapters of the routing table, and the base model."""

from dataclasses import dataclass

from loraserve.errors import BadInputError, NotFoundError, UnavailableError
from loraserve.rpc.oip import open_inference_pb2 as oip
from placement.table import RoutingTable
from placement.types import AdapterName, VersionId

BASE_ALIAS = "base"
"""Names the base model unless an adapter has this name."""

BASE_VERSION = "1"
PLATFORM = "loraserve"
SHAPE = (1,)

INPUTS = (
    ("text_input", "BYTES", False),
    ("streaming", "BOOL", True),
    ("sampling_parameters", "BYTES", True),
)
"""Name, datatype and whether it may be left out."""

TEXT_OUTPUT = "text_output"
FINISH_REASON = "finish_reason"
OUTPUTS = (TEXT_OUTPUT, FINISH_REASON)

_CONFIG_TYPES = (("BYTES", oip.TYPE_STRING), ("BOOL", oip.TYPE_BOOL))


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model under the name that the client used; `adapter` '' is the base model.

    `ready` says whether any replica can be sent its requests.
    """

    name: str
    adapter: str
    version: str
    ready: bool


def base_name(table: RoutingTable) -> str:
    """The last part of the base model's path: what the base model is called, adapters aside."""
    return table.base_model.rstrip("/").rpartition("/")[2] or BASE_ALIAS


def version_of(version_id: str) -> str:
    """The model version that stands for `name@digest16`; '' is the base model's."""
    return version_id.rpartition("@")[2] or BASE_VERSION


def find_model(table: RoutingTable, name: str, version: str) -> Model:
    """The model of this name and, unless `version` is empty, of this version.

    NotFoundError if the table has none, UnavailableError before the first table, BadInputError for
    an empty name. An adapter goes before the base model where both have the name.
    """
    if table.version == 0:
        raise UnavailableError("the router has no routing table yet; try again later")
    if not name:
        raise BadInputError(
            f"model_name: empty; give an adapter's name, or {base_name(table)} for the base model"
        )
    model = _model(table, name)
    if model is None:
        raise NotFoundError(f"model_name: no adapter is called {name}, and the base model is not either")
    if version not in ("", model.version):
        raise NotFoundError(
            f"model_version: {name} is served in version {model.version}, not {version};"
            " leave it empty for the current one"
        )
    return model


def all_models(table: RoutingTable) -> list[Model]:
    """The base model, unless adapters have both of its names, then the adapters by name."""
    names = sorted(table.entries)
    base = [name for name in (base_name(table), BASE_ALIAS) if name not in table.entries][:1]
    found = [_model(table, name) for name in (*base, *names)] if table.version else []
    return [model for model in found if model is not None]


def _model(table: RoutingTable, name: str) -> Model | None:
    entry = table.entries.get(AdapterName(name))
    if entry is not None:
        return Model(name=name, adapter=name, version=version_of(entry.version_id), ready=bool(entry.holders))
    if name in (base_name(table), BASE_ALIAS):
        return Model(name=name, adapter="", version=version_of(VersionId("")), ready=bool(table.replicas))
    return None


def encode_metadata(model: Model) -> oip.ModelMetadataResponse:
    """What `ModelMetadata` says of the model."""
    tensor = oip.ModelMetadataResponse.TensorMetadata
    return oip.ModelMetadataResponse(
        name=model.name,
        versions=[model.version],
        platform=PLATFORM,
        inputs=[tensor(name=name, datatype=datatype, shape=SHAPE) for name, datatype, _ in INPUTS],
        outputs=[tensor(name=name, datatype="BYTES", shape=SHAPE) for name in OUTPUTS],
    )


def encode_config(model: Model) -> oip.ModelConfigResponse:
    """What `ModelConfig` says of the model."""
    types = dict(_CONFIG_TYPES)
    return oip.ModelConfigResponse(
        config=oip.ModelConfig(
            name=model.name,
            platform=PLATFORM,
            backend=PLATFORM,
            max_batch_size=0,
            input=[
                oip.ModelInput(name=name, data_type=types[datatype], dims=SHAPE, optional=optional)
                for name, datatype, optional in INPUTS
            ],
            output=[oip.ModelOutput(name=name, data_type=oip.TYPE_STRING, dims=SHAPE) for name in OUTPUTS],
            # Several answers to one request, which is what a client needs to know before it streams.
            model_transaction_policy=oip.ModelTransactionPolicy(decoupled=True),
        )
    )


def encode_index(table: RoutingTable, *, ready_only: bool) -> oip.RepositoryIndexResponse:
    """What `RepositoryIndex` says of the table."""
    return oip.RepositoryIndexResponse(
        models=[
            oip.RepositoryIndexResponse.ModelIndex(
                name=model.name,
                version=model.version,
                state="READY" if model.ready else "UNAVAILABLE",
                reason="" if model.ready else "no replica holds it",
            )
            for model in all_models(table)
            if model.ready or not ready_only
        ]
    )
