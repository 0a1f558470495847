"""A local help desk: django-helpdesk itself, with the simulated ticket world behind it.

Belongs here: the server's process (``server``, ``desk``, ``watch``, ``settings``, ``urls``), the world's recipe
(``recipe``), and what other processes use (``client``). Does not: the connector, and changes to django-helpdesk.
"""

from delivery.sandbox.helpdesk.client import Controls, HelpdeskSandbox, SandboxError

__all__ = ["Controls", "HelpdeskSandbox", "SandboxError"]
