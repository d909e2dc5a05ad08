"""Commands of the command line that have a module of their own; backend.__main__ puts them on its app."""
