"""`python -m gmask`, and so `torchrun -m gmask`."""

from gmask.cli import main

if __name__ == "__main__":
    main()
