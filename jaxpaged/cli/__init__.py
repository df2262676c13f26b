"""The command `jaxpaged`: a module a command, its flags, tables and pictures. Imported by `__main__` alone."""
