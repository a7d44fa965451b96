"""What to install for an optional feature, from the package's own metadata."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

from rabbit_engine.errors import MissingExtraError, first_line

DISTRIBUTION = "rabbit_engine"


def install_command(extra: str) -> str:
    """`install_command("plot") -> 'pip install "matplotlib>=3.10"'`; without metadata, the command for a clone."""
    try:
        texts = metadata.requires(DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        texts = ()
    packages = [f'"{need.name}{need.specifier}"' for need in map(Requirement, texts) if _belongs(need, extra)]
    return f"pip install {' '.join(packages)}" if packages else f'pip install ".[{extra}]" in a clone of {DISTRIBUTION}'


def _belongs(need: Requirement, extra: str) -> bool:
    """Whether the requirement belongs to the extra."""
    return need.marker is not None and need.marker.evaluate({"extra": extra}) and not need.marker.evaluate({"extra": ""})


def missing_extra(what: str, extra: str, error: ImportError) -> MissingExtraError:
    """The error for `what`, which needs packages that cannot be imported, with the command that installs them."""
    return MissingExtraError(f"{what} needs a package that is not installed ({first_line(error)}): {install_command(extra)}")
