"""Prints which files and functions are longer than we want them: advice for the reviewer, no gate."""

import ast
import sys
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def too_long(path: Path) -> list[str]:
    """A line per finding in one file; a file that does not parse is another step's finding."""
    text = path.read_text(encoding="utf-8")
    found = []
    if (num_lines := text.count("\n")) > MAX_FILE_LINES:
        found.append(f"{path}: {num_lines} lines (want {MAX_FILE_LINES} at most)")
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name}: {length} lines (want {MAX_FUNCTION_LINES})")
    return found


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        for source in sorted(Path(folder).rglob("*.py")):
            if not source.name.endswith(GENERATED):
                for line in too_long(source):
                    print(line)
