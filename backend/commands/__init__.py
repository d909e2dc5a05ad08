"""Commands of the command line that have a module of their own, one a subject; backend.__main__ puts them on its app."""
