"""The two C tools, compiled when they are missing or older than their source."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from bench.errors import BenchError

SOURCES = Path(__file__).parent
BUILD = SOURCES / "build"


def compile_tool(name: Literal["load", "limit"]) -> Path:
    """The path of the compiled tool. Raises BenchError without a C compiler."""
    source, binary = SOURCES / f"{name}.c", BUILD / name
    if binary.exists() and binary.stat().st_mtime > source.stat().st_mtime:
        return binary
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise BenchError("the bench needs a C compiler (cc, or the one that CC names)")
    BUILD.mkdir(exist_ok=True)
    # Built under another name and renamed, so that two runs at once never see half a binary.
    fresh = BUILD / f"{name}.{os.getpid()}"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(fresh), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{name}.c does not compile:\n{done.stderr}")
    fresh.replace(binary)
    return binary
