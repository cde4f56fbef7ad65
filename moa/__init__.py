"""Many skills in one vision-language model: `from moa import load`, see docs/python.md."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moa.loaded import load as load

# DeepSpeed warns at each import on a machine without a GPU that it found none.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def __getattr__(name: str) -> Any:
    """`load`, once it is asked for: until then no torch is imported."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moa.loaded import load

    return load


def __dir__() -> list[str]:
    return [*globals(), "load"]
