"""The simulated truth behind the sandbox: pure, seeded, fast generators of what the world does in answer to decisions.

Not here: servers, HTTP, clocks, and anything that a policy is allowed to see other than through exported rows.
"""
