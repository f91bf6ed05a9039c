"""How fast a method trains, and what the Trainer costs beside a plain PyTorch loop (`zoo bench`)."""
