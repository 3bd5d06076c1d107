"""Where the UCX of the wheels libucx-cu12 and libucx-cu13 is."""

import importlib.util
from pathlib import Path


def ucx_wheel() -> str | None:
    """The folder with the wheel's libucp.so.0, if one is installed. Loads nothing."""
    spec = importlib.util.find_spec("libucx")
    for package in (spec and spec.submodule_search_locations) or ():
        folder = Path(package) / "lib"
        if (folder / "libucp.so.0").exists():
            return str(folder)
    return None
