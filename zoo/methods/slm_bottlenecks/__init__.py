"""What training a small language model costs: a trainer with the levers as options, a cost model, measurements."""
