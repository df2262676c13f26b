"""What a user writes and gets: parameters, outputs, and how values are read. Imports nothing of ours; any room but the
kernels may import it."""
