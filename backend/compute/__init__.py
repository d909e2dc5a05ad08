"""How arrays are gone through fast: compiled loops, and two threads at once."""
