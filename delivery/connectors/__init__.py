"""Connectors: one module for each kind of downstream system, all behind the protocol of ``base``.

Belongs here: how a system is read and written. Does not: what is sent when, and what counts as delivered (``delivery.push``).
"""
