"""Pages and who holds them: the allocator, block tables, shared prefixes, swap. Imported by the rest of the host, the
engine, trees and studies."""
