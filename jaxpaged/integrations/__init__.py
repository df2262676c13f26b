"""Where other systems take jaxpaged in: each module needs a package that jaxpaged itself does not."""
