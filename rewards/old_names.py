"""Names that a module had before: they still work there, and warn. For all packages, since this one is the lowest."""

import warnings
from typing import Any


def keep_old_names(module: dict[str, Any], **renamed: str) -> None:
    """Let a module answer for its old names. To be called at its end, as ``keep_old_names(globals(), old="new")``.

    Whoever asks for an old name gets what the new one means, with a `DeprecationWarning` that tells the new name.
    """

    def __getattr__(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        warnings.warn(f"{module['__name__']}.{name} is now called {renamed[name]}", DeprecationWarning, stacklevel=2)
        return module[renamed[name]]

    module["__getattr__"] = __getattr__
