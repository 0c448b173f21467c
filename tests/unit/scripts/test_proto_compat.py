"""Every kind of break of the released client protocol is caught, and growth is not."""

import shutil
import subprocess
import sys
from pathlib import Path

import proto_compat
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "proto_compat.py"

BEFORE = """
syntax = "proto3";
package loraserve.v1;
service Inference {
  rpc Generate(Request) returns (stream Response);
  rpc Complete(Request) returns (Response);
}
message Request {
  string name = 1;
  optional int32 limit = 2;
  oneof prompt {
    string text = 3;
    bytes blob = 4;
  }
  repeated string stop = 5;
  Mode mode = 6;
  message Inner {
    string value = 1;
  }
  Inner inner = 7;
  enum Colour {
    COLOUR_UNSPECIFIED = 0;
  }
  Colour colour = 8;
}
message Response {
  string text = 1;
}
enum Mode {
  MODE_UNSPECIFIED = 0;
  MODE_FAST = 1;
}
"""


def compiled(folder: Path, text: str) -> FileDescriptorSet:
    source = folder / "loraserve" / "v1" / "api.proto"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text, encoding="utf-8")
    files = proto_compat.compile_protocol(folder)
    assert isinstance(files, FileDescriptorSet)
    return files


def changes(folder: Path, old: str, new: str) -> list[str]:
    assert old in BEFORE
    before = compiled(folder, BEFORE)
    found: list[str] = proto_compat.breaking_changes(before, compiled(folder, BEFORE.replace(old, new)))
    return found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  string name = 1;\n", "", "field loraserve.v1.Request.name = 1 is removed"),
        ("string name = 1", "string name = 9", "Request.name = 1 is renumbered to 9"),
        ("string name = 1", "string title = 1", "Request.name = 1 is renamed: from name to title"),
        ("string name = 1", "bytes name = 1", "is retyped: from TYPE_STRING to TYPE_BYTES"),
        ("Mode mode = 6", "int32 mode = 6", "is retyped: from .loraserve.v1.Mode to TYPE_INT32"),
        ("repeated string stop", "string stop", "from LABEL_REPEATED to LABEL_OPTIONAL"),
        ("string name = 1", "repeated string name = 1", "from LABEL_OPTIONAL to LABEL_REPEATED"),
        ("optional int32 limit", "int32 limit", "Request.limit = 2 is given another presence"),
        (
            "    bytes blob = 4;\n  }\n",
            "  }\n  bytes blob = 4;\n",
            "is moved between oneofs: from prompt to none",
        ),
        ("    string value = 1;\n", "", "field loraserve.v1.Request.Inner.value = 1 is removed"),
        ("  MODE_FAST = 1;\n", "", "enum value loraserve.v1.Mode.MODE_FAST = 1 is removed"),
        ("MODE_FAST = 1", "MODE_FAST = 2", "Mode.MODE_FAST = 1 is renumbered to 2"),
        ("MODE_FAST = 1", "MODE_QUICK = 1", "Mode.MODE_FAST = 1 is removed"),
        (
            "  rpc Complete(Request) returns (Response);\n",
            "",
            "method loraserve.v1.Inference.Complete is removed",
        ),
        ("Complete(Request)", "Complete(Response)", "Inference.Complete is given another request"),
        ("Request) returns (Response)", "Request) returns (Request)", "is given another response"),
        ("(stream Response)", "(Response)", "Inference.Generate is given another server stream"),
        (
            "Generate(Request)",
            "Generate(stream Request)",
            "Inference.Generate is given another client stream",
        ),
        ("service Inference", "service Serving", "service loraserve.v1.Inference is removed"),
    ],
)
def test_a_break_is_caught(tmp_path: Path, old: str, new: str, said: str) -> None:
    found = changes(tmp_path, old, new)
    assert any(said in line for line in found), found


def test_a_removed_message_and_enum_are_caught(tmp_path: Path) -> None:
    before = compiled(tmp_path, BEFORE)
    after = compiled(tmp_path, BEFORE.replace("Response", "Reply").replace("Mode ", "Manner "))
    found = proto_compat.breaking_changes(before, after)
    assert "message loraserve.v1.Response is removed" in found
    assert "enum loraserve.v1.Mode is removed" in found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("string name = 1;", "string name = 1; string added = 20;"),
        ("MODE_FAST = 1;", "MODE_FAST = 1; MODE_SLOW = 2;"),
        ("rpc Complete", "rpc Added(Request) returns (Response); rpc Complete"),
        ("message Response", "message Added {} message Response"),
        ("service Inference", "service Added {} service Inference"),
        ("    bytes blob = 4;", "    bytes blob = 4; string other = 21;"),
        ("  string name = 1;\n", "  // Said better.\n  string name = 1;\n"),
    ],
)
def test_growth_is_no_break(tmp_path: Path, old: str, new: str) -> None:
    assert changes(tmp_path, old, new) == []


def test_the_internal_protocol_is_exempt(tmp_path: Path) -> None:
    internal = FileDescriptorSet()
    internal.file.add(name="internal.proto", package="loraserve.internal.v1").message_type.add(name="Gone")
    assert proto_compat.breaking_changes(internal, compiled(tmp_path, BEFORE)) == []


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("loraserve.v1", {"loraserve/v1/inference.proto", "loraserve/v1/management.proto"}),
        ("inference", {"inference/open_inference.proto"}),
    ],
)
def test_the_present_protocol_keeps_the_released_one(package: str, files: set[str]) -> None:
    released = FileDescriptorSet.FromString(proto_compat.released_file(package).read_bytes())
    assert {file.name for file in released.file} == files
    present = proto_compat.compile_protocol(package=package)
    assert proto_compat.breaking_changes(released, present, package) == []


def test_the_command_fails_on_a_break_and_freezes(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    compiled(tmp_path / "proto", BEFORE)
    standard = shutil.copytree(ROOT / "proto" / "inference", tmp_path / "proto" / "inference")
    command = [sys.executable, str(tmp_path / "scripts" / "proto_compat.py")]
    assert subprocess.run([*command, "--freeze"], check=False).returncode == 0
    assert subprocess.run(command, check=False).returncode == 0
    compiled(tmp_path / "proto", BEFORE.replace("  string name = 1;\n", ""))
    broken = subprocess.run(command, capture_output=True, text=True, check=False)
    assert broken.returncode == 1
    assert "breaking change of loraserve.v1: field loraserve.v1.Request.name = 1 is removed" in broken.stdout
    compiled(tmp_path / "proto", BEFORE)
    source = standard / "open_inference.proto"
    source.write_text(source.read_text(encoding="utf-8").replace("bool live = 1", "bool live = 2"))
    broken = subprocess.run(command, capture_output=True, text=True, check=False)
    assert broken.returncode == 1
    assert "field inference.ServerLiveResponse.live = 1 is renumbered to 2" in broken.stdout
