"""Where downloads and measurements are kept from one process to the next."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$CKF_CACHE, else ~/.cache/ckf."""
    return Path(os.path.expanduser(os.environ.get("CKF_CACHE") or "~/.cache/ckf"))
