"""The home page of the product: a small server on the state folder, for people who do not sit at a terminal.

Belongs here: pages and the acts that their forms ask for. Does not: how a page looks (``common.page``), figures and acts (the rooms
below do, as for the command).
"""
