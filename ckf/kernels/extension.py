"""Loading what setup.py builds: ``ckf._C`` and ``ckf._cpu``."""

import importlib
from types import ModuleType


def load_extension(name: str, advice: str) -> tuple[ModuleType | None, str]:
    """The module ``ckf.NAME``, or None and why; ``advice``: how it is built."""
    try:
        return importlib.import_module(f"ckf.{name}"), ""
    except ModuleNotFoundError:
        return None, (
            f"the extension ckf.{name} is not built for this Python; {advice} "
            "(or python setup.py build_ext --inplace)"
        )
    except ImportError as error:
        return None, f"the extension ckf.{name} does not load ({error}); build it again"


def extension_info(extension: ModuleType | None, reason: str) -> dict:
    """What it was built from; ``{"built": False, "reason": ...}`` where there is none."""
    if extension is None:
        return {"built": False, "reason": reason}
    return {"built": True, **extension.build_info()}
