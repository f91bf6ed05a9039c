"""W&B workspaces, reports and sweeps of a method, as code (`zoo dashboard`)."""
