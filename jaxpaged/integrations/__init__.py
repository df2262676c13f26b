"""Where other systems take jaxpaged in: a folder for each of them."""
