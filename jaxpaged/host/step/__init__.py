"""One step: what is decided of it, and the arrays that are made of that. Imported by the rest of the host, the engine,
requests, trees and studies."""
