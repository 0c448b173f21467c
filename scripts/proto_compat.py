"""Compares the client protocols with their released form: what a released client relies on must stay.

usage: proto_compat.py            compare proto/loraserve/v1 with proto/released/v1.binpb, and
                                  proto/inference with proto/released/inference.binpb; exit 1 on a break
       proto_compat.py --freeze   make the present protocols the released ones; part of a release

Allowed: new files, messages, fields, values, services and methods. Not allowed: to remove, rename,
renumber or retype anything, or to change a label, a oneof or what a method takes and streams.
loraserve.internal.v1 is exempt: both of its ends refuse another protocol_version.
"""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).resolve().parents[1]
PROTO = ROOT / "proto"
RELEASED = PROTO / "released"
PACKAGE = "loraserve.v1"
PACKAGES = (PACKAGE, "inference")

type_name = FieldDescriptorProto.Type.Name
label_name = FieldDescriptorProto.Label.Name


def released_file(package: str) -> Path:
    """Where the released form of a package is kept."""
    return RELEASED / f"{package.rpartition('.')[2]}.binpb"


def compile_protocol(proto: Path = PROTO, package: str = PACKAGE) -> FileDescriptorSet:
    """The present form of a package, compiled by the protoc that generates our code."""
    from grpc_tools import protoc

    sources = sorted(str(path) for path in (proto / package.replace(".", "/")).glob("*.proto"))
    include = str(resources.files("grpc_tools") / "_proto")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "present.binpb"
        options = [f"-I{proto}", f"-I{include}", "--include_imports", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", *options, *sources]) != 0:
            raise SystemExit("proto_compat: protoc refuses the present protocol")
        return FileDescriptorSet.FromString(out.read_bytes())


def breaking_changes(old: FileDescriptorSet, new: FileDescriptorSet, package: str = PACKAGE) -> list[str]:
    """One line per thing that a client of `old` relies on and `new` does not keep."""
    old_types, new_types = dict(_types(old, package)), dict(_types(new, package))
    found = []
    for name, before in old_types.items():
        after = new_types.get(name)
        if after is None or type(after) is not type(before):
            found.append(f"{_kind(before)} {name} is removed")
        elif isinstance(before, DescriptorProto) and isinstance(after, DescriptorProto):
            found += _message_changes(name, before, after)
        elif isinstance(before, EnumDescriptorProto) and isinstance(after, EnumDescriptorProto):
            found += _enum_changes(name, before, after)
        elif isinstance(before, ServiceDescriptorProto) and isinstance(after, ServiceDescriptorProto):
            found += _service_changes(name, before, after)
    return found


_Declared = DescriptorProto | EnumDescriptorProto | ServiceDescriptorProto


def _types(files: FileDescriptorSet, package: str) -> Iterator[tuple[str, _Declared]]:
    """Every message, enum and service of the package, by its full name."""
    for file in files.file:
        if file.package != package:
            continue
        for message in file.message_type:
            yield from _nested(package, message)
        for enum in file.enum_type:
            yield f"{package}.{enum.name}", enum
        for service in file.service:
            yield f"{package}.{service.name}", service


def _nested(prefix: str, message: DescriptorProto) -> Iterator[tuple[str, _Declared]]:
    name = f"{prefix}.{message.name}"
    yield name, message
    for enum in message.enum_type:
        yield f"{name}.{enum.name}", enum
    for inner in message.nested_type:
        yield from _nested(name, inner)


def _kind(declared: _Declared) -> str:
    if isinstance(declared, DescriptorProto):
        return "message"
    return "enum" if isinstance(declared, EnumDescriptorProto) else "service"


def _message_changes(name: str, before: DescriptorProto, after: DescriptorProto) -> Iterator[str]:
    fields = {field.number: field for field in after.field}
    for old in before.field:
        where = f"field {name}.{old.name} = {old.number}"
        new = fields.get(old.number)
        if new is None:
            moved = [field.number for field in after.field if field.name == old.name]
            yield f"{where} is renumbered to {moved[0]}" if moved else f"{where} is removed"
            continue
        compared = {
            "renamed": (old.name, new.name),
            "retyped": (_field_type(old), _field_type(new)),
            "relabelled": (label_name(old.label), label_name(new.label)),
            "given another presence": (old.proto3_optional, new.proto3_optional),
            "moved between oneofs": (_oneof(before, old), _oneof(after, new)),
        }
        yield from _differences(where, compared)


def _differences(where: str, compared: Mapping[str, tuple[object, object]]) -> Iterator[str]:
    for what, (old, new) in compared.items():
        if old != new:
            yield f"{where} is {what}: from {old or 'none'} to {new or 'none'}"


def _field_type(field: FieldDescriptorProto) -> str:
    return field.type_name or type_name(field.type)


def _oneof(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """The real oneof that holds the field; `optional` makes one of its own, which does not count."""
    if not field.HasField("oneof_index") or field.proto3_optional:
        return ""
    return message.oneof_decl[field.oneof_index].name


def _enum_changes(name: str, before: EnumDescriptorProto, after: EnumDescriptorProto) -> Iterator[str]:
    numbers = {value.name: value.number for value in after.value}
    for value in before.value:
        where = f"enum value {name}.{value.name} = {value.number}"
        if value.name not in numbers:
            yield f"{where} is removed"
        elif numbers[value.name] != value.number:
            yield f"{where} is renumbered to {numbers[value.name]}"


def _service_changes(
    name: str, before: ServiceDescriptorProto, after: ServiceDescriptorProto
) -> Iterator[str]:
    methods = {method.name: method for method in after.method}
    for old in before.method:
        where = f"method {name}.{old.name}"
        new = methods.get(old.name)
        if new is None:
            yield f"{where} is removed"
            continue
        compared = {
            "given another request": (old.input_type, new.input_type),
            "given another response": (old.output_type, new.output_type),
            "given another client stream": (old.client_streaming, new.client_streaming),
            "given another server stream": (old.server_streaming, new.server_streaming),
        }
        yield from _differences(where, compared)


def main(arguments: Iterable[str]) -> int:
    """Compare, or freeze."""
    match list(arguments):
        case ["--freeze"]:
            RELEASED.mkdir(exist_ok=True)
            for package in PACKAGES:
                present = compile_protocol(package=package)
                released_file(package).write_bytes(present.SerializeToString(deterministic=True))
            return 0
        case []:
            pass
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    broken = False
    for package in PACKAGES:
        released = FileDescriptorSet.FromString(released_file(package).read_bytes())
        for line in breaking_changes(released, compile_protocol(package=package), package):
            print(f"breaking change of {package}: {line}")
            broken = True
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
