"""Commands of the command line, one module a subject; each has a register(app, bar) that backend.__main__ calls."""
