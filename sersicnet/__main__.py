"""``python -m sersicnet``, where the command is not on the path."""

from sersicnet.cli import main

if __name__ == "__main__":
    main()
