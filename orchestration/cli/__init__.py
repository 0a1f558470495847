"""The command ``signalbox``: what operations owners and CI do without a browser.

``command`` parses and dispatches, a module a group of commands does the work, ``console`` holds what they share.

Belongs here: arguments, exit codes, what is printed. Does not: deciding, sending, or the first day (``orchestration.demo``).
"""
