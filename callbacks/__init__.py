"""Lightning callbacks that every method of the zoo can use."""
