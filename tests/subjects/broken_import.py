"""An executor module that cannot be imported."""

from __future__ import annotations

raise ImportError("libbroken.so.7: cannot open shared object file")
