"""jaxpaged as a stage of a Ray Data pipeline (docs/ray.md)."""

from jaxpaged.integrations.ray.generate import Generate

__all__ = ["Generate"]
