"""Local stand-ins for downstream systems, so that everything can be tried without an account anywhere.

Not here: connectors to real systems.
"""
