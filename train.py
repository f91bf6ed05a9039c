"""`python train.py fit --config configs/suave/fashion_mnist.yaml`: the console script `zoo`, from a checkout."""

import sys

from zoo.main import main

if __name__ == "__main__":
    sys.exit(main())
