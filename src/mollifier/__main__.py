"""`python -m mollifier`: the same as the `mollifier` command."""

from mollifier.cli import main

if __name__ == "__main__":
    main()
