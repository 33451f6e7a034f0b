"""How does `python -m gmask` (and so `torchrun -m gmask`) start?"""

from gmask.cli import main

if __name__ == "__main__":
    main()
