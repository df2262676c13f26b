"""Prompts and parameters in, sequence groups for the engine out; and what comes back, as the user gets it. Imported by
`LLM`, trees and commands."""
